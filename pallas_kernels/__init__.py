"""Pallas GPU kernels, one folder per op, named like the op; imports only jax.

Every folder contains
  reference.py  what the kernels compute, in plain jnp
  tiles.py      inputs that they do not support, and sizes that affect speed: measured or guessed
  forward.py    a kernel, and likewise backward.py unless XLA does that part
  tiles.json    the measured sizes
and exports the same names: `obstacle(**shape)`; `choose_tiles`, `table_key` and `candidates`, which
take (part, **shape) with part 'forward' or 'backward'; `forward`, `backward`, `reference`.
"""

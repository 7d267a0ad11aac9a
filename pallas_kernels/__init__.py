"""Pallas GPU kernels, each in a folder that is called like its op; imports only jax.

All folders have one shape:
  reference.py  what the kernels compute, in plain jnp
  tiles.py      what they cannot take, and sizes that change speed: of tiles.json, else a guess
  forward.py    a kernel, as is backward.py where XLA does not do that part
and offer the same names: `obstacle(**shape)`; `choose_tiles`, `table_key` and `candidates`, each of
(part, **shape) with part 'forward' or 'backward'; `forward`, `backward`, `reference`.
"""

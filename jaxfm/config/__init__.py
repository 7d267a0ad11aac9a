"""The config of a run: read, checked whole and without jax, compared with an earlier one.

`load.py` is where it starts; `run.py` says what a config may hold, `checks.py` what must hold
between its values.
"""

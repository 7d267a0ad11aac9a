"""The config of a run: loading it, checking it without importing jax, comparing it on resume.

Start reading at `load.py`. `run.py` declares the groups and keys of a config; `checks.py` holds the
rules that relate several values.
"""

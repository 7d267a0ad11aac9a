"""Pure functions on arrays, one file per op; each chooses its implementation (None: best known).

An `implementation` given by name runs or raises an error; there is no silent fallback. The names
are listed here so that configs can be checked without importing jax; `choice.py` chooses.
"""

# The implementations of each op, best first; 'xla' runs everywhere.
IMPLEMENTATIONS = {
    'attention': ('mosaic', 'cudnn', 'fa3', 'xla', 'interpret'),
    'decode_attention': ('mosaic', 'xla', 'interpret'),
    'rms_norm': ('mosaic', 'xla', 'interpret'),
    'token_logprobs': ('mosaic', 'xla', 'interpret'),
}

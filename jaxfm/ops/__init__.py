"""Pure functions on arrays, one file an op; each chooses its implementation (None: the best known).

A name given as `implementation` means that one or an error, never a quiet fallback. What can be
named stands here, so that a config is checked without jax; `choice.py` chooses.
"""

# What each op can run as, best first; 'xla' runs everywhere.
IMPLEMENTATIONS = {
    'attention': ('mosaic', 'cudnn', 'fa3', 'xla', 'interpret'),
    'decode_attention': ('mosaic', 'xla', 'interpret'),
    'rms_norm': ('mosaic', 'xla', 'interpret'),
    'token_logprobs': ('mosaic', 'xla', 'interpret'),
}

"""Pure functions on arrays, one file an op; each chooses its implementation (None: the best known).

A name given as `implementation` means that one or an error, never a quiet fallback.
"""

# What each op can run as, best first; the start-up table of a run shows what None means.
IMPLEMENTATIONS = {
    'attention': ('xla',),
    'linear': ('xla',),
    'rms_norm': ('xla',),
    'token_logprobs': ('xla',),
}


def choose(op: str, implementation: str | None) -> str:
    """The implementation to run: the one that is named, or the best known for None.

    Raises:
      ValueError: the op has no implementation of that name.
    """
    known = IMPLEMENTATIONS[op]
    if implementation is None:
        return known[0]
    if implementation not in known:
        raise ValueError(f'{op} has no implementation {implementation!r}, only {", ".join(known)}')
    return implementation

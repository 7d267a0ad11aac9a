"""Pure functions on arrays, one file an op; each chooses its implementation (None: the best known).

A name given as `implementation` means that one or an error, never a quiet fallback.
"""

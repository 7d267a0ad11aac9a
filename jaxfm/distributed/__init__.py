"""Several processes as one run: `join` finds them, `agree` lets them talk, `preemption` stops them.

Nothing heavy is imported here: `main` ends a process that failed, with or without jax.
"""

from collections.abc import Callable

_end: Callable[[int], None] | None = None


def end_after_error(code: int) -> None:
    """Ends a process that failed without waiting for the others; returns if it joined none."""
    if _end is not None:
        _end(code)


def set_end_after_error(end: Callable[[int], None]) -> None:
    """Sets what `end_after_error` calls with the exit code; `join.initialize` does."""
    global _end
    _end = end

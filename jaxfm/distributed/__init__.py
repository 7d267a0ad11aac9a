"""Multi-process runs: `join` connects processes, `agree` coordinates, `preemption` handles signals.

This file imports nothing heavy, because `main` also calls it when importing jax has failed.
"""

from collections.abc import Callable

_end: Callable[[int], None] | None = None


def end_after_error(code: int) -> None:
    """Exits a failed process without waiting for the others; returns if it is not joined to any."""
    if _end is not None:
        _end(code)


def set_end_after_error(end: Callable[[int], None]) -> None:
    """Sets the function that `end_after_error` calls with the exit code; used by `join`."""
    global _end
    _end = end

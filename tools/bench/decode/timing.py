"""Works that alternate, so that whatever else the machine does disturbs all of them alike."""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

Work = Callable[[], dict[str, Any] | None]


def use_cores(count: int) -> None:
    """Restricts this process, before jax starts its threads, and the processes that it starts."""
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def timed(work: Work) -> dict[str, Any]:
    """{seconds, cpu_seconds} of a work in this process, unless the work tells its own."""
    began, cpu = time.perf_counter(), time.process_time()
    told = work() or {}
    took = {
        'seconds': time.perf_counter() - began,
        'cpu_seconds': time.process_time() - cpu,
    }
    return took | told


def alternate(works: dict[str, Work], repeats: int, warm_up: int = 1) -> dict[str, dict]:
    """-> {name: {figure: [one for each repeat]}}; every other round runs in reverse order."""
    rounds = []
    for index in range(warm_up + repeats):
        names = list(works) if index % 2 else list(reversed(works))
        rounds.append({name: timed(works[name]) for name in names})
    rounds = rounds[warm_up:]
    return {
        name: {figure: [one[name][figure] for one in rounds] for figure in rounds[0][name]}
        for name in works
    }


def ratios(results: dict[str, dict], name: str, peer: str) -> list[float]:
    """How many times as fast as the peer it was in each repeat."""
    return [
        theirs / ours for ours, theirs in zip(results[name]['seconds'], results[peer]['seconds'])
    ]


def spread(values: list[float], digits: int = 2) -> str:
    """The median, and the least and the most."""
    median = statistics.median(values)
    return f'{median:.{digits}f} ({min(values):.{digits}f} .. {max(values):.{digits}f})'


def bar(name: str, values: list[float], limit: float, *, is_least: bool = True) -> dict[str, Any]:
    """A limit for the median of some values."""
    median = statistics.median(values)
    return {
        'name': name,
        'median': median,
        'limit': limit,
        'is_least': is_least,
        'held': bool(median >= limit if is_least else median <= limit),
    }

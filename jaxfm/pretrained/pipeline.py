"""Prefetch: host threads work ahead while devices or files consume earlier results."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

AHEAD = 3  # threads, and results made ahead; bounds the host memory they take


def run_ahead(function: Callable, items: Iterable) -> Iterator:
    """Yields function(item) in order, computing up to AHEAD results in advance in threads.

    The caller's thread iterates over `items`.
    """
    with ThreadPoolExecutor(AHEAD) as pool:
        running = collections.deque()
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) > AHEAD:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()

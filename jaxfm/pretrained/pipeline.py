"""Work on the host while the devices, or a file, are busy with what was made before."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

AHEAD = 3  # results that wait, each made in a thread: what of the host's memory they may take


def run_ahead(function: Callable, items: Iterable) -> Iterator:
    """Results of the function, in order, of which AHEAD are made before they are asked for.

    The items are drawn by the caller's thread.
    """
    with ThreadPoolExecutor(AHEAD) as pool:
        running = collections.deque()
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) > AHEAD:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()

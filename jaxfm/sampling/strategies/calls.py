"""Calls of functions that may take long, raise or never return: each in a thread, with a limit."""

import collections
import dataclasses
import queue
import threading
import time
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Result:
    """What a call gave: a value or an error."""

    value: Any
    error: Exception | None
    seconds: float


@dataclasses.dataclass(eq=False)
class _Call:
    owner: Any
    index: int
    function: Callable
    arguments: tuple
    limit: float
    begun: float = 0.0


class Calls:
    """Runs a few calls at a time. One that never returns keeps its thread, but nobody waits.

    Args:
      most: calls at a time.
    """

    def __init__(self, most: int = 8):
        self._most, self._waiting = most, collections.deque()
        self._running: set[_Call] = set()
        self._done = queue.SimpleQueue()

    def __bool__(self) -> bool:
        return bool(self._running or self._waiting)

    def begin(self, owner, index: int, function: Callable, arguments: tuple, limit: float) -> None:
        """limit: seconds, from when the call runs."""
        self._waiting.append(_Call(owner, index, function, arguments, limit))
        self._fill()

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self._most:
            call = self._waiting.popleft()
            call.begun = time.monotonic()
            self._running.add(call)
            # A daemon: a call that never returns must not keep the process.
            threading.Thread(target=self._run, args=(call,), daemon=True).start()

    def _run(self, call: _Call) -> None:
        value = error = None
        try:
            value = call.function(*call.arguments)
        except Exception as raised:
            error = raised
        except BaseException as raised:  # such as SystemExit, of which nobody else would hear
            error = RuntimeError(f'{type(raised).__name__}: {raised}')
        self._done.put((call, Result(value, error, time.monotonic() - call.begun)))

    def drop(self, owner) -> None:
        """Forgets the calls of an owner."""
        self._waiting = collections.deque(c for c in self._waiting if c.owner is not owner)
        self._running = {call for call in self._running if call.owner is not owner}
        self._fill()

    def collect(self, *, is_idle: bool) -> list[tuple[Any, int, Result]]:
        """(owner, index, Result) of calls that have ended or taken too long.

        is_idle: there is nothing else to do, so wait until one has.
        """
        ended = self._take(is_idle)
        now = time.monotonic()
        for call in [call for call in self._running if now - call.begun >= call.limit]:
            self._running.remove(call)
            error = TimeoutError(f'took longer than {call.limit:.6g} s')
            ended.append((call.owner, call.index, Result(None, error, now - call.begun)))
        self._fill()
        return ended

    def _take(self, is_idle: bool) -> list[tuple[Any, int, Result]]:
        ended = []
        while self._running:
            wait = 0.0
            if is_idle and not ended:
                first = min(call.begun + call.limit for call in self._running)
                wait = max(0.0, first - time.monotonic())
            try:
                call, result = self._done.get(timeout=wait) if wait else self._done.get_nowait()
            except queue.Empty:
                break
            if call in self._running:  # otherwise nobody waits for it any more
                self._running.remove(call)
                ended.append((call.owner, call.index, result))
        return ended

"""Calls with a time limit, kept by a signal.

A signal interrupts what hangs: a loop, a regular expression, a wait for a socket. A thread could
only be left behind, where it goes on to compute, and a regular expression in it stops all others.
"""

import signal
import threading
from collections.abc import Callable
from typing import Any


class _Alarm(BaseException):
    """Not an Exception, which the function that is called may catch."""


_FIRST_GAP, _SHORTEST_GAP = 1.0, 1e-4  # seconds between two alarms


def call(function: Callable, arguments: tuple, seconds: float) -> Any:
    """What the function returns or raises.

    A function that catches even the alarm, in a loop with a bare `except:`, is interrupted again:
    at first it has time to clean up, then ever less, until an alarm meets it outside its `try`.

    Only the main thread gets signals: in others there is no limit. A library that sets an alarm of
    its own, such as math-verify, puts that one in place of ours.

    Raises:
      TimeoutError: it took longer than `seconds`.
    """
    if threading.current_thread() is not threading.main_thread():
        return function(*arguments)
    gap, is_over = min(2 * _FIRST_GAP, 2 * seconds), False

    def ring(number, frame) -> None:
        nonlocal gap
        if is_over:
            return
        gap = max(gap / 2, _SHORTEST_GAP)
        signal.setitimer(signal.ITIMER_REAL, gap)
        # What this module does before and after the function is not interrupted.
        if frame is None or frame.f_code not in (call.__code__, ring.__code__):
            raise _Alarm

    handler = signal.signal(signal.SIGALRM, ring)
    timer = signal.getitimer(signal.ITIMER_REAL)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        return _call(function, arguments)
    except _Alarm:
        raise TimeoutError(f'took longer than {seconds:.6g} s') from None
    finally:
        is_over = True
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def _call(function: Callable, arguments: tuple) -> Any:
    """A frame of its own, so that functions in C are interrupted, too."""
    return function(*arguments)

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


def call(function: Callable, arguments: tuple, seconds: float) -> Any:
    """What the function returns or raises.

    Only the main thread gets signals: in others there is no limit. A library that sets an alarm of
    its own, such as math-verify, puts that one in place of ours.

    Raises:
      TimeoutError: it took longer than `seconds`.
    """
    if threading.current_thread() is not threading.main_thread():
        return function(*arguments)
    handler = signal.signal(signal.SIGALRM, _ring)
    timer = signal.getitimer(signal.ITIMER_REAL)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            return function(*arguments)
        finally:
            signal.setitimer(signal.ITIMER_REAL, *timer)
    except _Alarm:
        raise TimeoutError(f'took longer than {seconds:.6g} s') from None
    finally:
        signal.signal(signal.SIGALRM, handler)


def _ring(number, frame) -> None:
    raise _Alarm

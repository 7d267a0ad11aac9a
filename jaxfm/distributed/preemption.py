"""Handles signals: all processes decide to stop at the same step."""

import ctypes
import logging
import os
import signal
import threading
import time

import jax
from jax.experimental import multihost_utils

log = logging.getLogger('jaxfm')


class Preemption:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a decision to stop, at the same step on every process.

    After the first signal, the run saves and exits with 75. A second signal exits immediately, with
    130 (SIGINT) or 143. SIGUSR1 is Slurm's warning before the time limit (`--signal=USR1@300`).

    This is a context manager, which restores the previous signal handlers on exit. Enter it in the
    main thread, after `initialize()`.

    A thread reads the signals from Python's wake-up pipe. A Python handler would have to wait for
    the main thread, which may be compiling for minutes.
    """

    _exit_codes = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 143}
    # Some senders (coreutils' timeout, process groups) deliver the same signal twice in a row.
    _same_request_seconds = 0.1

    def __init__(self):
        self._stopping = False
        self._requested_at = None
        self._pass_on = None

    def __enter__(self) -> 'Preemption':
        self.install()
        return self

    def __exit__(self, *exception) -> None:
        self.restore()

    def install(self) -> None:
        """Installs the handlers and starts the listening thread."""
        self._distributed = jax.distributed.is_initialized()
        self._actions = {number: _get_action(number) for number in self._exit_codes}
        if self._distributed:
            self._pass_on = _function_of(self._actions[signal.SIGTERM])
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._listener = threading.Thread(target=self._listen, name='signals', daemon=True)
        self._listener.start()
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._handlers = {
            number: signal.signal(number, lambda *_: None) for number in self._exit_codes
        }

    def restore(self) -> None:
        """Gives the signals back to whoever had them before; nothing if that is done already."""
        if not self._handlers:
            return
        for number, handler in self._handlers.items():
            if handler is not None:
                signal.signal(number, handler)
            _set_action(number, self._actions[number])
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)
        self._listener.join()
        os.close(self._reader)
        self._handlers = {}

    def should_stop(self, step: int) -> bool:
        """Whether to save and stop before this step.

        Every process must call it for every step, in the same order. Then all of them get True at
        the same step, about a second after any of them has received a signal.
        """
        if not self._stopping:
            if self._distributed:
                self._stopping = multihost_utils.reached_preemption_sync_point(step)
            else:
                self._stopping = self._requested_at is not None
        return self._stopping

    def _listen(self):
        while number := os.read(self._reader, 1):
            if number[0] in self._exit_codes:
                self._receive(signal.Signals(number[0]))

    def _receive(self, received):
        now = time.monotonic()
        if self._requested_at is None:
            self._requested_at = now
            if self._pass_on:
                self._pass_on(signal.SIGTERM)
            log.warning('%s: saving at the next step; a second signal exits at once', received.name)
        elif now - self._requested_at > self._same_request_seconds:
            os.write(2, f'second signal ({received.name}): exiting without saving\n'.encode())
            os._exit(self._exit_codes[received])


# JAX's preemption service handles SIGTERM in C++, where Python's `signal` module can neither see
# nor restore the handler. `struct sigaction` starts with the handler's address, and 256 bytes are
# enough for it on every platform.


def _get_action(number):
    action = ctypes.create_string_buffer(256)
    ctypes.CDLL(None).sigaction(int(number), None, action)
    return action


def _set_action(number, action):
    ctypes.CDLL(None).sigaction(int(number), action, None)


def _function_of(action):
    """The C handler itself. It only sets a flag, which JAX's preemption service polls."""
    pointer = ctypes.c_void_p.from_buffer(action).value
    if pointer in (None, 1):  # SIG_DFL, SIG_IGN
        raise RuntimeError("JAX's preemption service does not listen for SIGTERM")
    return ctypes.CFUNCTYPE(None, ctypes.c_int)(pointer)

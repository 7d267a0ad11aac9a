"""Several processes as one run: finding each other, stopping at the same step.

JAX ends the process in C++ when it cannot connect (no exception, no exit code of ours), so what can
be checked is checked before it starts, and it starts in a thread that we can stop waiting for.
"""

import ctypes
import itertools
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from jax._src.distributed import global_state  # the only way to a barrier without devices
from jax.experimental import multihost_utils

from jaxfm import errors
from jaxfm.errors import UnavailableError, UsageError

log = logging.getLogger('jaxfm')

# JAX aborts the whole process at its own time-out; ours must always come first.
_NEVER = 7 * 24 * 3600
_decisions = itertools.count()  # that the processes have taken together


def initialize(timeout_seconds: float = 300, heartbeat_seconds: int = 100) -> bool:
    """Joins the other processes of this run, if there are any; call it before any use of a device.

    They are found through JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, or inside a Slurm step (`srun`). One process alone needs no joining.

    Args:
        timeout_seconds: how long to wait for all processes to come.
        heartbeat_seconds: how long after a process has died the others end.

    Returns:
        Whether this run has more than one process.

    Raises:
        UsageError: the variables contradict each other.
        UnavailableError: the coordinator's port is taken, its host unknown, a process missing.
    """
    found = _from_environment() or _from_slurm()
    if found is None or found[1] == 1:
        return False
    address, num_processes, process_id = found
    deadline = time.monotonic() + timeout_seconds
    if process_id == 0:
        _check_port_is_free(address)
    else:
        _wait_for_host(address, min(deadline, time.monotonic() + 30))
    failures = []

    def join():
        try:
            jax.distributed.initialize(
                address,
                num_processes,
                process_id,
                initialization_timeout=_NEVER,
                heartbeat_timeout_seconds=heartbeat_seconds,
            )
        except Exception as error:
            failures.append(error)

    joining = threading.Thread(target=join, name='join', daemon=True)
    joining.start()
    joining.join(max(0.0, deadline - time.monotonic()))
    if joining.is_alive():
        raise UnavailableError(
            f'the {num_processes} processes of this run did not all meet at {address} within '
            f'{timeout_seconds:g} s (this is process {process_id}); are all of them started, and '
            'does the network let this port through?'
        )
    if failures:
        raise UnavailableError(f'cannot join the other processes at {address}: {failures[0]}')
    return True


def is_primary() -> bool:
    """Whether this is the one process that writes what must be written once."""
    return jax.process_index() == 0


def barrier(name: str, timeout_seconds: float = _NEVER) -> None:
    """Waits until all processes have come to the barrier of this name, which is used once.

    On the network of the coordinator: a barrier of the devices gives up after 30 s on CPU, and one
    process may have hours of work to do before it.
    """
    client = global_state.client
    if client is not None:
        client.wait_at_barrier(f'jaxfm/{name}', int(timeout_seconds * 1000))


def compared(name: str, value: str) -> dict[int, str]:
    """{process: its value} under a name, which is used once: the primary process sees all of them,
    the others theirs and that of the primary. So of two that differ at least both know."""
    client = global_state.client
    if client is None:
        return {0: value}
    client.key_value_set(f'jaxfm/{name}/{jax.process_index()}', value)
    wanted = range(jax.process_count()) if is_primary() else (0, jax.process_index())
    return {
        index: client.blocking_key_value_get(f'jaxfm/{name}/{index}', _NEVER * 1000)
        for index in wanted
    }


def publish(name: str, value: str) -> None:
    """Tells the other processes a value under a name, which is used once. Any thread may."""
    if global_state.client is not None:
        global_state.client.key_value_set(f'jaxfm/{name}', value)


def awaited(name: str, timeout_seconds: float = _NEVER) -> str:
    """What some process publishes under a name. Raises UnavailableError when nobody does."""
    try:
        return global_state.client.blocking_key_value_get(
            f'jaxfm/{name}', max(int(timeout_seconds * 1000), 1)
        )
    except jax.errors.JaxRuntimeError as error:
        if 'DEADLINE_EXCEEDED' not in str(error):
            raise
        raise UnavailableError(
            f'no process said {name} within {timeout_seconds:.0f} s; they may have died'
        ) from error


def from_primary(
    compute: Callable[[], Any], name: str = '', timeout_seconds: float = _NEVER
) -> Any:
    """What `compute` gives on the primary process, alone, or its RunError: the same on all.

    The value is JSON. A name is used once; calls without one meet in the order in which each
    process makes them, which must be that of a single thread.

    Raises:
      UnavailableError: the primary process does not say anything.
    """
    if global_state.client is None:
        return compute()
    name = name or f'decision/{next(_decisions)}'
    if not is_primary():
        answer = json.loads(awaited(name, timeout_seconds))
        if 'error' in answer:
            raise getattr(errors, answer['error'])(answer['message'])
        return answer['value']
    try:
        value = compute()
    except errors.RunError as error:
        publish(name, json.dumps({'error': type(error).__name__, 'message': str(error)}))
        raise
    publish(name, json.dumps({'value': value}))
    return value


def first_error(
    error: errors.RunError | None, name: str = '', timeout_seconds: float = _NEVER
) -> None:
    """Raises, on all processes, the RunError that the first of them has met, if one has.

    As `from_primary` for the rest.
    """
    if global_state.client is None:
        if error is not None:
            raise error
        return

    def look(met: list):
        for kind, message in filter(None, met):
            raise getattr(errors, kind)(message)

    _from_all(error and [type(error).__name__, str(error)], look, name, timeout_seconds)


def common(values: list[str]) -> list[str]:
    """Those of the values that every process has, in the order of the primary one."""
    if global_state.client is None:
        return values
    return _from_all(values, lambda all_: [v for v in all_[0] if all(v in one for one in all_)])


def _from_all(mine: Any, combine: Callable, name: str = '', timeout_seconds=_NEVER) -> Any:
    """What `combine` makes, on the primary process, of what every process brings: on all."""
    name = name or f'decision/{next(_decisions)}'
    publish(f'{name}/{jax.process_index()}', json.dumps(mine))

    def gather():
        names = [f'{name}/{index}' for index in range(jax.process_count())]
        return combine([json.loads(awaited(one, timeout_seconds)) for one in names])

    return from_primary(gather, f'{name}/all', timeout_seconds + 10)


def end_after_error(code: int) -> None:
    """Ends a process that failed without waiting for the others of the run, if there are any.

    JAX would wait for them at exit, for five minutes, and they for what this process was to do. Who
    fails at the same time (all of them see a mistake in the config) is given time to say so.
    """
    if not jax.distributed.is_initialized():
        return
    try:
        barrier('failed', timeout_seconds=5)
    except jax.errors.JaxRuntimeError:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Preemption:
    """Turns SIGTERM, SIGINT and SIGUSR1 into one decision to stop, the same step on every process.

    The first signal asks: the run saves and exits 75. The second exits at once, with 130 or 143.
    SIGUSR1 is Slurm's warning before the time limit (`--signal=USR1@300`). A context manager: what
    handled the signals before handles them again after it. Enter it after `initialize()`, in the
    main thread.

    Signals are read from Python's wake-up pipe by a thread, because a handler in Python waits for
    the main thread, which can sit in a compilation for minutes.
    """

    _exit_codes = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 143}
    # Some senders (coreutils' timeout, process groups) deliver one request twice at once.
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
        """Takes over the signals."""
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
        """Gives the signals back to whoever had them before."""
        for number, handler in self._handlers.items():
            if handler is not None:
                signal.signal(number, handler)
            _set_action(number, self._actions[number])
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)
        self._listener.join()
        os.close(self._reader)

    def should_stop(self, step: int) -> bool:
        """Whether to save and stop before this step.

        Every process must call it at every step, with the same steps in the same order: all of them
        then hear True at the same step, about a second after a signal reached any of them.
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


def _from_environment() -> tuple[str, int, int] | None:
    """(address, number of processes, process id) as JAX_* variables give them."""
    names = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
    address, *counts = (os.environ.get(name) for name in names)
    if counts == [None, None] and (address is None or 'SLURM_STEP_NODELIST' in os.environ):
        return None
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise UsageError(f'{" and ".join(missing)} not set: want all of {", ".join(names)}')
    given = ' '.join(f'{name}={os.environ[name]}' for name in names)
    if not all(count.isdecimal() for count in counts) or not int(counts[1]) < int(counts[0]):
        raise UsageError(f'want 0 <= JAX_PROCESS_ID < JAX_NUM_PROCESSES, got {given}')
    _split(address)
    return address, int(counts[0]), int(counts[1])


def _from_slurm() -> tuple[str, int, int] | None:
    """(address, number of processes, process id) inside a Slurm step; None in a batch shell.

    The first node of the step coordinates. The port comes from the job's number, as in JAX, so two
    steps of one job on one node need JAX_COORDINATOR_PORT (or JAX_COORDINATOR_ADDRESS) to differ.
    """
    env = os.environ
    names = ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID', 'SLURM_LOCALID')
    if not all(name in env for name in names):
        return None
    # 'node1,node2', 'node[001-004,7]' and 'node1' all begin with the first node.
    prefix, bracket, numbers = env['SLURM_STEP_NODELIST'].split(',')[0].partition('[')
    host = prefix + numbers.split('-')[0].rstrip(']') if bracket else prefix
    port = env.get('JAX_COORDINATOR_PORT') or int(env['SLURM_JOB_ID']) % 4096 + 61440
    address = env.get('JAX_COORDINATOR_ADDRESS') or f'{host}:{port}'
    return address, int(env['SLURM_NTASKS']), int(env['SLURM_PROCID'])


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(':')
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f'JAX_COORDINATOR_ADDRESS must be host:port, got {address!r}')
    return host.strip('[]'), int(port)


def _check_port_is_free(address):
    """Listens for a moment where the coordinator will: JAX crashes (SIGSEGV) on a port in use."""
    port = _split(address)[1]
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        socket.create_server(('', port), family=family, dualstack_ipv6=dual).close()
    except OSError as error:
        raise UnavailableError(
            f'cannot coordinate the run at {address}: {error.strerror}; choose another port'
        ) from None


def _wait_for_host(address, deadline):
    """Returns when the coordinator's name resolves; on Kubernetes it appears with its pod."""
    host, port = _split(address)
    while True:
        try:
            socket.getaddrinfo(host, port)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f'unknown host in the coordinator address {address}: {error.strerror}'
                ) from None
        time.sleep(0.5)


# JAX's preemption service handles SIGTERM in C++, where Python's `signal` module can neither see
# nor restore it. `struct sigaction` begins with the function; 256 bytes hold it on every platform.


def _get_action(number):
    action = ctypes.create_string_buffer(256)
    ctypes.CDLL(None).sigaction(int(number), None, action)
    return action


def _set_action(number, action):
    ctypes.CDLL(None).sigaction(int(number), action, None)


def _function_of(action):
    """The C handler itself, which only notes that the signal came: its service polls for that."""
    pointer = ctypes.c_void_p.from_buffer(action).value
    if pointer in (None, 1):  # SIG_DFL, SIG_IGN
        raise RuntimeError("JAX's preemption service does not listen for SIGTERM")
    return ctypes.CFUNCTYPE(None, ctypes.c_int)(pointer)

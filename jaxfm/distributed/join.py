"""Joins the other processes of a run, and exits without them after an error.

If JAX cannot connect, it ends the process in C++, without an exception or our exit code. So we
check what we can first, and connect in a thread whose result we can stop waiting for.
"""

import os
import re
import socket
import sys
import threading
import time

import jax

from jaxfm import distributed
from jaxfm.distributed.agree import NEVER, barrier
from jaxfm.errors import UnavailableError, UsageError

_THREADS_PER_DEVICE = 4


def provide_threads() -> None:
    """Gives XLA enough threads for several CPU devices. Call it before any use of a device.

    A collective blocks one thread of each device until all devices have joined it. By default XLA
    has as many threads as devices, or as cores if those are more. Then two collectives of a program
    that do not depend on each other can each hold threads that the other waits for, and after 40 s
    XLA ends the process. XLA reads the number of threads from NPROC, which stays if it is set.
    """
    devices = jax.config.jax_num_cpu_devices
    flag = re.search(
        r'--xla_force_host_platform_device_count=(\d+)', os.environ.get('XLA_FLAGS', '')
    )
    if flag:
        devices = int(flag[1])
    if devices > 1:
        threads = max(_THREADS_PER_DEVICE * devices, os.cpu_count() or 1)
        os.environ.setdefault('NPROC', str(threads))


def initialize(timeout_seconds: float = 300, heartbeat_seconds: int = 100) -> bool:
    """Joins the other processes of this run, if there are any. Call it before any use of a device.

    The processes are found through JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, or through Slurm's variables inside a job step (`srun`). With a single process
    it does nothing.

    Args:
        timeout_seconds: how long to wait until all processes have joined.
        heartbeat_seconds: how long after the death of one process the others exit.

    Returns:
        Whether this run has more than one process.

    Raises:
        UsageError: the variables are incomplete or contradict each other.
        UnavailableError: the coordinator's port is in use, its host cannot be resolved, or not all
            processes joined in time.
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
    distributed.set_end_after_error(_end_after_error)
    failures = []

    def join():
        try:
            jax.distributed.initialize(
                address,
                num_processes,
                process_id,
                initialization_timeout=NEVER,
                heartbeat_timeout_seconds=heartbeat_seconds,
            )
        except Exception as error:
            failures.append(error)

    joining = threading.Thread(target=join, name='join', daemon=True)
    joining.start()
    joining.join(max(0.0, deadline - time.monotonic()))
    if joining.is_alive():
        raise UnavailableError(
            f'not all {num_processes} processes of this run joined at {address} within '
            f'{timeout_seconds:g} s (this is process {process_id}); check that all of them are '
            'running and that the network allows connections to this port'
        )
    if failures:
        raise UnavailableError(f'cannot join the other processes at {address}: {failures[0]}')
    return True


def _end_after_error(code: int) -> None:
    """Exits a failed process without waiting for the others of the run, if there are any.

    JAX would wait for them at exit for five minutes, while they wait for work from this process.
    The barrier gives processes that fail at the same time (say, all of them on a mistake in the
    config) time to print their own message.
    """
    if not jax.distributed.is_initialized():
        return
    try:
        barrier('failed', timeout_seconds=5)
    except jax.errors.JaxRuntimeError:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _from_environment() -> tuple[str, int, int] | None:
    """(address, number of processes, process id) from the JAX_* variables; None without them."""
    names = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
    address, *counts = (os.environ.get(name) for name in names)
    if counts == [None, None] and (address is None or 'SLURM_STEP_NODELIST' in os.environ):
        return None
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise UsageError(f'{" and ".join(missing)} not set: set all of {", ".join(names)}')
    given = ' '.join(f'{name}={os.environ[name]}' for name in names)
    if not all(count.isdecimal() for count in counts) or not int(counts[1]) < int(counts[0]):
        raise UsageError(f'want 0 <= JAX_PROCESS_ID < JAX_NUM_PROCESSES, got {given}')
    _split(address)
    return address, int(counts[0]), int(counts[1])


def _from_slurm() -> tuple[str, int, int] | None:
    """(address, number of processes, process id) inside a Slurm step; None in a batch shell.

    The first node of the step is the coordinator. Its port is derived from the job id, as in JAX,
    so two steps of one job on the same node need different values of JAX_COORDINATOR_PORT (or
    JAX_COORDINATOR_ADDRESS).
    """
    env = os.environ
    names = ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID', 'SLURM_LOCALID')
    if not all(name in env for name in names):
        return None
    # 'node1,node2', 'node[001-004,7]' and 'node1' all start with the first node.
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
    """Listens briefly on the coordinator's port, because JAX crashes (SIGSEGV) if it is in use."""
    port = _split(address)[1]
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        socket.create_server(('', port), family=family, dualstack_ipv6=dual).close()
    except OSError as error:
        raise UnavailableError(
            f'cannot listen at the coordinator address {address}: {error.strerror}; '
            'choose another port'
        ) from None


def _wait_for_host(address, deadline):
    """Waits until the coordinator's name resolves: on Kubernetes it appears only with its pod."""
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

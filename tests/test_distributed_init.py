"""Real processes on the loopback interface, real signals.

A process under `jax.distributed` survives SIGTERM, so every one of them is ended with SIGKILL.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from jaxfm import distributed
from jaxfm.errors import UnavailableError, UsageError

LOOP = """
    import sys, time
    from jaxfm import distributed
    distributed.initialize(timeout_seconds=40, heartbeat_seconds=10)
    handler = distributed._get_action(15).raw[:8]
    with distributed.Preemption() as preemption:
        for step in range(2000):
            if preemption.should_stop(step):
                print('stopped at', step, flush=True)
                break
            print('step', step, flush=True)
            time.sleep(0.01)
    restored = distributed._get_action(15).raw[:8] == handler  # JAX's, where there are several
    sys.exit(75 if restored else 1)
"""


def free_port():
    with socket.create_server(('127.0.0.1', 0)) as server:
        return server.getsockname()[1]


def ranks(count):
    """The environments of `count` processes that are one run."""
    address = f'127.0.0.1:{free_port()}'
    return [
        dict(
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES=str(count),
            JAX_PROCESS_ID=str(rank),
        )
        for rank in range(count)
    ]


@contextlib.contextmanager
def started(program, environments=({},)):
    """Processes running `program` (Python source), SIGKILLed at the end."""
    command = [sys.executable, '-u', '-c', textwrap.dedent(program)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    base = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
    processes = [subprocess.Popen(command, env={**base, **env}, **pipes) for env in environments]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def read_until(process, word):
    for line in process.stdout:
        if line.startswith(word):
            return line
    raise AssertionError(f'{word!r} never came: {process.stderr.read()}')


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_first_signal_stops_a_single_process_gracefully(number):
    with started(LOOP) as [process]:
        read_until(process, 'step 3')
        process.send_signal(number)
        read_until(process, 'stopped at')
        assert process.wait(10) == 75
        assert 'a second signal exits at once' in process.stderr.read()


STUCK = """
    import ctypes
    from jaxfm import distributed
    with distributed.Preemption():
        print('ready', flush=True)
        ctypes.CDLL(None).sleep(60)  # the main thread is in C, as in a compilation
"""


@pytest.mark.parametrize(
    'first, second, code',
    [(signal.SIGINT, signal.SIGINT, 130), (signal.SIGTERM, signal.SIGTERM, 143)],
)
def test_second_signal_exits_at_once_though_the_main_thread_is_busy(first, second, code):
    # sleep(3) returns early on a signal, so it is called until the process ends.
    program = STUCK.replace('ctypes.CDLL', 'while True: ctypes.CDLL')
    with started(program) as [process]:
        read_until(process, 'ready')
        process.send_signal(first)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(second)
        assert process.wait(5) == code


def test_one_request_delivered_twice_is_one_request():
    with started(LOOP) as [process]:
        read_until(process, 'step 3')
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 75


def test_handlers_are_restored():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    pointers = [distributed._get_action(number).raw[:8] for number in before]
    with distributed.Preemption() as preemption:
        assert not preemption.should_stop(0)
        assert signal.getsignal(signal.SIGINT) is not before[signal.SIGINT]
    assert {number: signal.getsignal(number) for number in before} == before
    assert [distributed._get_action(number).raw[:8] for number in before] == pointers
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signal_to_one_rank_stops_all_ranks_at_the_same_step(number):
    with started(LOOP, ranks(2)) as processes:
        for process in processes:
            read_until(process, 'step 3')
        processes[1].send_signal(number)
        stops = [read_until(process, 'stopped at') for process in processes]
        assert stops[0] == stops[1]
        assert [process.wait(20) for process in processes] == [75, 75]


def test_second_signal_ends_a_rank_at_once():
    endless = LOOP.replace('preemption.should_stop(step)', 'False')
    with started(endless, ranks(2)) as processes:
        read_until(processes[1], 'step 3')
        processes[1].send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert processes[1].poll() is None
        processes[1].send_signal(signal.SIGTERM)
        assert processes[1].wait(5) == 143


def test_one_rank_is_primary_and_barriers_hold_under_an_explicit_mesh():
    program = """
        import jax, time
        from jaxfm import distributed
        distributed.initialize(timeout_seconds=40)
        rank = jax.process_index()
        explicit = (jax.sharding.AxisType.Explicit,)
        mesh = jax.make_mesh((jax.device_count(),), ('all',), axis_types=explicit)
        start = time.monotonic()
        time.sleep(rank)
        with jax.set_mesh(mesh), jax.transfer_guard('disallow'):
            distributed.barrier('loaded')
        waited = time.monotonic() - start
        print('rank', rank, distributed.is_primary(), waited > 0.9, flush=True)
    """
    with started(program, ranks(2)) as processes:
        assert read_until(processes[0], 'rank') == 'rank 0 True True\n'
        assert read_until(processes[1], 'rank') == 'rank 1 False True\n'


def test_what_one_rank_decides_or_meets_is_that_of_all():
    program = """
        import jax
        from jaxfm import distributed
        from jaxfm.errors import DamagedError, LockedError, StorageError, UnavailableError
        distributed.initialize(timeout_seconds=40)
        rank = jax.process_index()

        def outcome(function, *arguments, **options):
            try:
                return function(*arguments, **options)
            except Exception as error:
                return f'{type(error).__name__}: {error}'

        def lock():
            raise LockedError('held')

        print('said', [
            outcome(distributed.from_primary, lambda: [rank, 'value']),
            outcome(distributed.from_primary, lock),
            outcome(distributed.first_error, DamagedError('bad') if rank == 1 else None),
            outcome(distributed.first_error, None),
            outcome(distributed.common, ['a', 'b', 'c'] if rank == 0 else ['c', 'x', 'b']),
        ], flush=True)
        late = outcome(distributed.awaited, 'never', 0.2)
        print('late', late.startswith('UnavailableError'), flush=True)
        distributed.barrier('end')
    """
    said = [[0, 'value'], 'LockedError: held', 'DamagedError: bad', None, ['b', 'c']]
    with started(program, ranks(2)) as processes:
        for process in processes:
            assert read_until(process, 'said') == f'said {said}\n'
            assert read_until(process, 'late') == 'late True\n'


@pytest.fixture
def environment(monkeypatch):
    """Sets the variables that describe a run, after removing those of a surrounding one."""
    for name in list(os.environ):
        if name.startswith('SLURM_') or name in ranks(1)[0]:
            monkeypatch.delenv(name)

    def update(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return update


def test_alone_there_is_nothing_to_join(environment):
    assert not distributed.initialize()
    environment(**ranks(1)[0])
    assert not distributed.initialize()


def test_port_in_use_names_host_and_port(environment):
    with socket.create_server(('127.0.0.1', 0)) as taken:
        address = f'127.0.0.1:{taken.getsockname()[1]}'
        environment(**ranks(2)[0] | {'JAX_COORDINATOR_ADDRESS': address})
        with pytest.raises(UnavailableError, match=f'{address}.*in use'):
            distributed.initialize()


def test_unknown_host_is_named(environment):
    environment(**ranks(2)[1] | {'JAX_COORDINATOR_ADDRESS': 'nowhere.invalid:4321'})
    with pytest.raises(UnavailableError, match='unknown host.*nowhere.invalid:4321'):
        distributed.initialize(timeout_seconds=0.1)


def test_missing_processes_are_an_error_with_an_exit_code():
    program = """
        import sys
        from jaxfm import distributed, errors
        try:
            distributed.initialize(timeout_seconds=1)
        except errors.UnavailableError as error:
            print('error', error, flush=True)
            sys.exit(error.exit_code)
    """
    env = ranks(2)[1]
    with started(program, [env]) as [process]:
        assert env['JAX_COORDINATOR_ADDRESS'] in read_until(process, 'error')
        assert process.wait(10) == 69


@pytest.mark.parametrize(
    'change, message',
    [
        ({'JAX_PROCESS_ID': '2'}, 'JAX_PROCESS_ID=2'),
        ({'JAX_NUM_PROCESSES': 'two'}, 'JAX_NUM_PROCESSES=two'),
        ({'JAX_COORDINATOR_ADDRESS': 'host'}, "host:port, got 'host'"),
    ],
)
def test_contradictory_variables_are_a_usage_error(environment, change, message):
    environment(**ranks(2)[0] | change)
    with pytest.raises(UsageError, match=message):
        distributed.initialize()


@pytest.mark.parametrize('kept', list(ranks(1)[0]))
def test_variables_that_are_missing_are_named(environment, kept):
    all_names = ranks(2)[0]
    environment(**{kept: all_names.pop(kept)})
    with pytest.raises(UsageError, match=f'{" and ".join(all_names)} not set'):
        distributed.initialize()


@pytest.mark.parametrize(
    'nodes, host',
    [('a1', 'a1'), ('a1,b2', 'a1'), ('n[001-004]', 'n001'), ('n[7,9-12],x', 'n7'), ('n[3]', 'n3')],
)
def test_slurm_step_is_found(environment, nodes, host):
    step = dict(SLURM_NTASKS='4', SLURM_PROCID='3', SLURM_LOCALID='0')
    environment(SLURM_JOB_ID='4099', SLURM_STEP_NODELIST=nodes, **step)
    assert distributed._from_slurm() == (f'{host}:61443', 4, 3)
    environment(JAX_COORDINATOR_PORT='7000')
    assert distributed._from_slurm() == (f'{host}:7000', 4, 3)

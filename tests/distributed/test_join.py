"""How processes find each other, and the errors when they do not."""

import os
import socket
import types

import pytest

from jaxfm import distributed
from jaxfm.distributed import join
from jaxfm.errors import UnavailableError, UsageError
from tests.distributed.processes import ranks, read_until, start
from tests.runs import PATIENCE


@pytest.fixture
def environment(monkeypatch):
    """Sets the variables that describe a run, after removing any from the outer environment."""
    for name in list(os.environ):
        if name.startswith('SLURM_') or name in ranks(1)[0]:
            monkeypatch.delenv(name)

    def update(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return update


def test_a_single_process_joins_nothing(environment):
    assert not join.initialize()
    environment(**ranks(1)[0])
    assert not join.initialize()


def test_port_in_use_names_host_and_port(environment):
    with socket.create_server(('127.0.0.1', 0)) as taken:
        address = f'127.0.0.1:{taken.getsockname()[1]}'
        environment(**ranks(2)[0] | {'JAX_COORDINATOR_ADDRESS': address})
        with pytest.raises(UnavailableError, match=f'{address}.*in use'):
            join.initialize()


def test_unknown_host_is_named(environment):
    environment(**ranks(2)[1] | {'JAX_COORDINATOR_ADDRESS': 'nowhere.invalid:4321'})
    with pytest.raises(UnavailableError, match='unknown host.*nowhere.invalid:4321'):
        join.initialize(timeout_seconds=0.1)


def test_missing_processes_are_an_error_with_an_exit_code():
    program = """
        import sys
        from jaxfm import errors
        from jaxfm.distributed import join
        try:
            join.initialize(timeout_seconds=1)
        except errors.UnavailableError as error:
            print('error', error, flush=True)
            sys.exit(error.exit_code)
    """
    env = ranks(2)[1]
    with start(program, [env]) as [process]:
        assert env['JAX_COORDINATOR_ADDRESS'] in read_until(process, 'error')
        assert process.wait(PATIENCE) == 69


FAILING = """
    import os, sys, time
    from jaxfm import main
    from jaxfm.distributed import join

    def fail(argv):
        join.initialize(timeout_seconds=40)
        print('joined', flush=True)
        if argv == ['0']:
            time.sleep(60)
        return 65

    main.main = fail
    sys.exit(main._run([os.environ['JAX_PROCESS_ID']]))
"""


def test_a_process_that_failed_does_not_wait_for_the_others():
    with start(FAILING, ranks(2)) as processes:
        for process in processes:
            read_until(process, 'joined')
        assert processes[1].wait(PATIENCE) == 65  # JAX would keep it for five minutes
        assert processes[0].poll() is None


def test_a_single_process_exits_as_usual(environment, monkeypatch):
    calls = []
    monkeypatch.setattr(distributed, '_end', None)
    assert distributed.end_after_error(65) is None
    assert not join.initialize()
    assert distributed.end_after_error(65) is None
    distributed.set_end_after_error(calls.append)
    distributed.end_after_error(65)
    assert calls == [65]


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
        join.initialize()


@pytest.mark.parametrize('kept', list(ranks(1)[0]))
def test_missing_variables_are_named(environment, kept):
    all_names = ranks(2)[0]
    environment(**{kept: all_names.pop(kept)})
    with pytest.raises(UsageError, match=f'{" and ".join(all_names)} not set'):
        join.initialize()


@pytest.mark.parametrize(
    'nodes, host',
    [('a1', 'a1'), ('a1,b2', 'a1'), ('n[001-004]', 'n001'), ('n[7,9-12],x', 'n7'), ('n[3]', 'n3')],
)
def test_slurm_step_is_found(environment, nodes, host):
    step = dict(SLURM_NTASKS='4', SLURM_PROCID='3', SLURM_LOCALID='0')
    environment(SLURM_JOB_ID='4099', SLURM_STEP_NODELIST=nodes, **step)
    assert join._from_slurm() == (f'{host}:61443', 4, 3)
    environment(JAX_COORDINATOR_PORT='7000')
    assert join._from_slurm() == (f'{host}:7000', 4, 3)


@pytest.mark.parametrize(
    'devices, flags, before, after',
    [
        (1, '', None, None),
        (8, '', None, '32'),
        (8, '', '5', '5'),
        (2, '', None, '9'),
        (-1, '--xla_force_host_platform_device_count=4', None, '16'),
    ],
)
def test_several_cpu_devices_have_more_threads_than_xla_would_give_them(
    devices, flags, before, after, monkeypatch
):
    monkeypatch.setenv('NPROC', 'restored after the test')
    monkeypatch.delenv('NPROC')
    monkeypatch.setenv('XLA_FLAGS', flags)
    monkeypatch.setattr(os, 'cpu_count', lambda: 9)
    if before:
        monkeypatch.setenv('NPROC', before)
    monkeypatch.setattr(
        join,
        'jax',
        types.SimpleNamespace(config=types.SimpleNamespace(jax_num_cpu_devices=devices)),
    )
    join.provide_threads()
    assert os.environ.get('NPROC') == after

"""Real signals, sent to real processes."""

import signal
import time

import pytest

from jaxfm.distributed import preemption
from tests.distributed.processes import ranks, read_until, start
from tests.runs import PATIENCE

LOOP = """
    import sys, time
    from jaxfm.distributed import join, preemption
    join.initialize(timeout_seconds=40, heartbeat_seconds=10)
    handler = preemption._get_action(15).raw[:8]
    with preemption.Preemption() as signals:
        for step in range(10**6):
            if signals.should_stop(step):
                print('stopped at', step, flush=True)
                break
            print('step', step, flush=True)
            time.sleep(0.01)
    restored = preemption._get_action(15).raw[:8] == handler  # JAX's, where there are several
    sys.exit(75 if restored else 1)
"""


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_first_signal_stops_a_single_process_gracefully(number):
    with start(LOOP) as [process]:
        read_until(process, 'step 3')
        process.send_signal(number)
        read_until(process, 'stopped at')
        assert process.wait(PATIENCE) == 75
        assert 'a second signal exits at once' in process.stderr.read()


STUCK = """
    import ctypes
    from jaxfm.distributed import preemption
    with preemption.Preemption():
        print('ready', flush=True)
        ctypes.CDLL(None).sleep(60)  # the main thread is in C, as in a compilation
"""


@pytest.mark.parametrize(
    'first, second, code',
    [(signal.SIGINT, signal.SIGINT, 130), (signal.SIGTERM, signal.SIGTERM, 143)],
)
def test_second_signal_exits_at_once_though_the_main_thread_is_busy(first, second, code):
    # sleep(3) returns early on a signal, so call it in a loop.
    program = STUCK.replace('ctypes.CDLL', 'while True: ctypes.CDLL')
    with start(program) as [process]:
        read_until(process, 'ready')
        process.send_signal(first)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(second)
        assert process.wait(PATIENCE) == code


def test_one_request_delivered_as_two_signals_counts_once():
    with start(LOOP) as [process]:
        read_until(process, 'step 3')
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 75


def test_handlers_are_restored():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    pointers = [preemption._get_action(number).raw[:8] for number in before]
    with preemption.Preemption() as signals:
        assert not signals.should_stop(0)
        assert signal.getsignal(signal.SIGINT) is not before[signal.SIGINT]
    assert {number: signal.getsignal(number) for number in before} == before
    assert [preemption._get_action(number).raw[:8] for number in before] == pointers
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signal_to_one_rank_stops_all_ranks_at_the_same_step(number):
    with start(LOOP, ranks(2)) as processes:
        for process in processes:
            read_until(process, 'step 3')
        processes[1].send_signal(number)
        stops = [read_until(process, 'stopped at') for process in processes]
        assert stops[0] == stops[1]
        assert [process.wait(PATIENCE) for process in processes] == [75, 75]


def test_second_signal_ends_a_rank_at_once():
    endless = LOOP.replace('signals.should_stop(step)', 'False')
    with start(endless, ranks(2)) as processes:
        read_until(processes[1], 'step 3')
        processes[1].send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert processes[1].poll() is None
        processes[1].send_signal(signal.SIGTERM)
        assert processes[1].wait(PATIENCE) == 143

"""StepClock: throughput over training time only, MFU, ETA, time per bucket; peaks of devices."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxfm.metrics import clock, goodput
from jaxfm.metrics.clock import StepClock
from jaxfm.metrics.devices import peak_flops


class Hands:
    """A clock that moves when told."""

    seconds = 100.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def hands():
    return Hands()


@pytest.fixture
def in_loop(hands):
    """Makes clocks inside a running loop of 100 steps."""
    with contextlib.ExitStack() as stack:

        def make(**options):
            clock = StepClock(100, now=hands, **options)
            stack.enter_context(clock.training())
            return clock

        yield make


def run_steps(clock, hands, count, tokens=1000, seconds=0.5):
    for _ in range(count):
        clock.step(tokens)
        hands.seconds += seconds


def spent(clock):
    """The account without empty buckets."""
    return {bucket: seconds for bucket, seconds in clock.account().items() if seconds}


def test_throughput_excludes_time_outside_training(hands, in_loop):
    clock = in_loop()
    with clock.aside('compile'):
        hands.seconds += 30
    run_steps(clock, hands, 4)
    with clock.aside('eval'):
        hands.seconds += 7
    with clock.aside('checkpoint_save'):
        hands.seconds += 1
    values = clock.log(4)
    assert values['perf/tokens_per_second'] == 2000
    assert values['perf/step_seconds'] == 0.5
    assert values['perf/total_tokens'] == 4000
    assert values['perf/elapsed_seconds'] == 40
    assert 'perf/mfu' not in values
    assert spent(clock) == {'compile': 30, 'eval': 7, 'checkpoint_save': 1, 'step': 2}


def test_each_log_begins_a_new_window(hands, in_loop):
    clock = in_loop()
    run_steps(clock, hands, 4)
    clock.log(4)
    run_steps(clock, hands, 2, seconds=2)
    assert clock.log(6)['perf/step_seconds'] == 2


def test_a_window_without_steps_has_no_speed(hands, in_loop):
    clock = in_loop()
    hands.seconds += 1
    values = clock.log(0)
    assert {name for name in values if name.startswith('perf/')} == {
        'perf/elapsed_seconds',
        'perf/total_tokens',
    }
    assert clock.eta(0) is None


def test_nested_time_is_counted_once(hands, in_loop):
    clock = in_loop()
    with clock.aside('eval'), clock.aside('compile'):
        hands.seconds += 3
    run_steps(clock, hands, 1)
    assert clock.log(1)['perf/step_seconds'] == 0.5
    assert clock.seconds['eval'] == 3 and clock.seconds['compile'] == 0


def test_time_of_a_context_that_raises_is_counted(hands, in_loop):
    clock = in_loop()
    with pytest.raises(OSError), clock.aside('checkpoint_save'):
        hands.seconds += 3
        raise OSError
    assert clock.seconds['checkpoint_save'] == 3


def test_mfu_is_the_share_of_the_peak(hands, in_loop):
    clock = in_loop(peak_flops=8e12)
    clock.flops_per_token = 1e9  # 1000 tokens a step
    run_steps(clock, hands, 4)
    assert clock.log(4)['perf/mfu'] == 0.25


def test_the_eta_includes_evaluation_but_not_compilation(hands, in_loop):
    clock = in_loop()
    with clock.aside('compile'):
        hands.seconds += 50
    with clock.aside('eval'):
        hands.seconds += 500  # before the first step: it does not come again
    run_steps(clock, hands, 5)
    with clock.aside('eval'):
        hands.seconds += 5
    run_steps(clock, hands, 5)
    assert clock.log(10)['perf/eta_seconds'] == pytest.approx(90 * (0.5 + 0.5))
    assert clock.eta(100) == 0


def test_the_first_step_alone_gives_no_eta(hands, in_loop):
    clock = in_loop()
    run_steps(clock, hands, 1)
    assert 'perf/eta_seconds' not in clock.log(1)


# The account


def test_every_second_is_in_one_bucket(hands):
    clock = StepClock(100, now=hands, started=hands.seconds - 8)
    with clock.aside('checkpoint_restore'):
        hands.seconds += 2
    hands.seconds += 1
    with clock.training():
        with clock.aside('data_wait'):
            hands.seconds += 4
        with clock.aside('compile'):
            hands.seconds += 30
        run_steps(clock, hands, 4)
        with clock.aside('eval'):
            hands.seconds += 7
    hands.seconds += 5
    wanted = dict(init=9, checkpoint_restore=2, data_wait=4, compile=30, step=2, eval=7, other=5)
    assert spent(clock) == wanted
    assert clock.elapsed == sum(wanted.values())


def test_a_log_reports_the_seconds_of_every_bucket_so_far(hands, in_loop):
    clock = in_loop()
    for step in (4, 8):
        run_steps(clock, hands, 4)
        with clock.aside('eval'):
            hands.seconds += 3
        values = clock.log(step)
    assert {name: values[name] for name in values if name.startswith('goodput/')} == {
        **{goodput.name_of(bucket): 0 for bucket in goodput.BUCKETS},
        'goodput/step_seconds': 4,
        'goodput/eval_seconds': 6,
        'goodput/ratio': 0.4,
    }
    assert values['perf/elapsed_seconds'] == 10


def test_time_between_two_loops_is_not_step_time(hands):
    clock = StepClock(100, now=hands)
    with clock.training():
        run_steps(clock, hands, 2)
        clock.log(2)
    hands.seconds += 20
    with clock.training():
        run_steps(clock, hands, 2)
        assert clock.log(4)['perf/step_seconds'] == 0.5
    assert spent(clock) == {'step': 2, 'other': 20}


def test_a_run_that_waits_for_data_does_not_look_fast(hands, in_loop):
    clock = in_loop(peak_flops=8e12)
    clock.flops_per_token = 1e9  # 1000 tokens a step
    for _ in range(4):
        with clock.aside('data_wait'):
            hands.seconds += 1.5
        run_steps(clock, hands, 1)
    values = clock.log(4)
    assert values['perf/step_seconds'] == 2
    assert values['perf/tokens_per_second'] == 500
    assert values['perf/mfu'] == 1 / 16
    assert values['perf/eta_seconds'] == 96 * 2
    assert values['goodput/data_wait_seconds'] == 6 and values['goodput/step_seconds'] == 2


def saved(clock):
    """The clock's state after a round trip through JSON, as in a checkpoint."""
    with clock.aside('checkpoint_save'):
        return json.loads(json.dumps(clock.get_state()))


def test_a_resumed_clock_goes_on_without_the_pause(hands, in_loop):
    clock = in_loop()
    run_steps(clock, hands, 10)
    state = saved(clock)
    hands.seconds += 10_000
    resumed = StepClock(100, now=hands)
    hands.seconds += 3
    resumed.set_state(state)
    with resumed.training():
        run_steps(resumed, hands, 2)
        assert resumed.log(12)['perf/step_seconds'] == 0.5
    assert resumed.total_tokens == 12_000
    assert resumed.elapsed == 9
    assert spent(resumed) == {'init': 3, 'step': 6}


def test_time_after_the_last_checkpoint_of_a_dead_process_is_wasted(hands, in_loop):
    clock = in_loop()
    run_steps(clock, hands, 10)
    state = saved(clock)
    run_steps(clock, hands, 8)
    with clock.aside('eval'):
        hands.seconds += 6
    died = clock.log(18)['perf/elapsed_seconds']
    resumed = StepClock(100, now=hands)
    resumed.set_state(state)
    hands.seconds += 3
    assert resumed.waste(died) == 10
    assert resumed.elapsed == died + 3
    assert spent(resumed) == {'step': 5, 'wasted': 10, 'init': 3}


def test_all_time_of_a_process_that_died_without_a_checkpoint_is_wasted(in_loop):
    clock = in_loop()
    assert clock.waste(40.0) == 40
    assert spent(clock) == {'wasted': 40}


def test_without_records_after_the_checkpoint_nothing_is_wasted(hands, in_loop):
    clock = in_loop()
    run_steps(clock, hands, 10)
    resumed = in_loop()
    resumed.set_state(saved(clock))
    assert resumed.waste(0.0) == 0
    assert spent(resumed) == {'step': 5}


def test_the_eta_ignores_evaluation_and_saving_before_a_resume(hands, in_loop):
    clock = in_loop()
    run_steps(clock, hands, 5)
    for bucket in ('eval', 'checkpoint_save'):
        with clock.aside(bucket):
            hands.seconds += 500
    run_steps(clock, hands, 5)
    resumed = in_loop()
    resumed.set_state(saved(clock))
    run_steps(resumed, hands, 5)
    with resumed.aside('eval'):
        hands.seconds += 5
    run_steps(resumed, hands, 5)
    assert resumed.log(20)['perf/eta_seconds'] == pytest.approx(80 * (0.5 + 0.5))


def test_the_start_of_a_process_is_before_its_imports_and_before_an_exec():
    program = (
        'import time; from jaxfm.metrics.clock import process_start;'
        'print(time.monotonic() - process_start())'
    )
    command = ['sh', '-c', 'sleep 0.5; exec "$@"', 'sh', sys.executable, '-c', program]
    started = time.monotonic()
    age = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    tick = 0.02  # the kernel reports start times in hundredths of a second
    assert 0.5 <= age <= time.monotonic() - started + tick


def test_without_proc_a_process_starts_with_its_imports(monkeypatch):
    monkeypatch.setattr(clock, '_STAT', Path('/no/proc/self/stat'))
    monkeypatch.delattr(time, 'CLOCK_BOOTTIME')  # macOS
    assert clock.process_start() == clock._IMPORTED


# Peaks


@pytest.mark.parametrize(
    ('kind', 'dtype', 'tflops'),
    [
        ('NVIDIA H100 80GB HBM3', 'bfloat16', 989.5),
        ('NVIDIA H100 80GB HBM3', 'float32', 494.5),
        ('NVIDIA H100 80GB HBM3', 'float8_e4m3fn', 1979),
        ('NVIDIA H100 PCIe', 'bfloat16', 756),
        ('NVIDIA H100 NVL', 'bfloat16', 835.5),
        ('NVIDIA H200', 'bfloat16', 989.5),
        ('NVIDIA B200', 'bfloat16', 2250),
        ('NVIDIA GB200', 'bfloat16', 2500),
        ('NVIDIA A100-SXM4-80GB', 'bfloat16', 312),
        ('NVIDIA A100-PCIE-40GB', 'float16', 312),
        ('NVIDIA L40S', 'bfloat16', 362),
        ('NVIDIA L4', 'bfloat16', 121),
        ('NVIDIA GeForce RTX 4090', 'bfloat16', 165.2),
        ('NVIDIA GeForce RTX 5090', 'bfloat16', 209.5),
    ],
)
def test_peaks_of_known_devices(kind, dtype, tflops):
    assert peak_flops(kind, dtype) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    ('kind', 'dtype'),
    [
        ('cpu', 'bfloat16'),
        ('NVIDIA A100-SXM4-80GB', 'float8_e4m3fn'),
        ('NVIDIA H100 80GB HBM3', 'int4'),
        ('NVIDIA GeForce RTX 4090 Laptop GPU', 'bfloat16'),
        ('NVIDIA GeForce RTX 4090 D', 'bfloat16'),
        ('NVIDIA A100-SXM4-40GB MIG 1g.5gb', 'bfloat16'),
        ('NVIDIA L400', 'bfloat16'),
    ],
)
def test_an_unknown_device_or_dtype_has_no_peak(kind, dtype):
    assert peak_flops(kind, dtype) is None

"""Throughput over training time alone, MFU, the time to come; peaks of devices."""

import json

import pytest

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


def run_steps(clock, hands, count, tokens=1000, seconds=0.5):
    for _ in range(count):
        clock.step(tokens)
        hands.seconds += seconds


def test_throughput_leaves_out_what_is_no_training(hands):
    clock = StepClock(100, now=hands)
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
    assert clock.seconds == {'compile': 30, 'eval': 7, 'checkpoint_save': 1, 'step': 2}


def test_each_log_begins_a_new_window(hands):
    clock = StepClock(100, now=hands)
    run_steps(clock, hands, 4)
    clock.log(4)
    run_steps(clock, hands, 2, seconds=2)
    assert clock.log(6)['perf/step_seconds'] == 2


def test_a_window_without_steps_has_no_speed(hands):
    clock = StepClock(100, now=hands)
    hands.seconds += 1
    assert clock.log(0) == {'perf/elapsed_seconds': 1, 'perf/total_tokens': 0}
    assert clock.eta(0) is None


def test_time_inside_time_is_counted_once(hands):
    clock = StepClock(100, now=hands)
    with clock.aside('eval'), clock.aside('compile'):
        hands.seconds += 3
    run_steps(clock, hands, 1)
    assert clock.log(1)['perf/step_seconds'] == 0.5
    assert clock.seconds['eval'] == 3 and clock.seconds['compile'] == 0


def test_time_aside_counts_when_it_ends_in_an_error(hands):
    clock = StepClock(100, now=hands)
    with pytest.raises(OSError), clock.aside('checkpoint_save'):
        hands.seconds += 3
        raise OSError
    assert clock.seconds['checkpoint_save'] == 3


def test_mfu_is_the_share_of_the_peak(hands):
    clock = StepClock(100, peak_flops=8e12, now=hands)
    clock.flops_per_step = 1e12
    run_steps(clock, hands, 4)
    assert clock.log(4)['perf/mfu'] == 0.25


def test_the_time_to_come_includes_evaluation_but_not_compilation(hands):
    clock = StepClock(100, now=hands)
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


def test_the_very_first_step_alone_foretells_nothing(hands):
    clock = StepClock(100, now=hands)
    run_steps(clock, hands, 1)
    assert 'perf/eta_seconds' not in clock.log(1)


def test_a_resumed_clock_goes_on_without_the_pause(hands):
    clock = StepClock(100, now=hands)
    run_steps(clock, hands, 10)
    state = json.loads(json.dumps(clock.get_state()))
    hands.seconds += 10_000
    resumed = StepClock(100, now=hands)
    hands.seconds += 3
    resumed.set_state(state)
    run_steps(resumed, hands, 2)
    assert resumed.total_tokens == 12_000
    assert resumed.elapsed == 6


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
def test_what_is_unknown_has_no_peak(kind, dtype):
    assert peak_flops(kind, dtype) is None

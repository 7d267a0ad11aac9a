"""When evaluators run, and the Wilson interval."""

import pytest

from jaxfm.evals.base import Periodic, wilson_interval


def due(every, at_start, last):
    cadence = Periodic(every, at_start)
    return [step for step in range(last + 1) if cadence.is_due(step, last)]


@pytest.mark.parametrize(
    'every, at_start, last, steps',
    [
        (3, True, 7, [0, 3, 6, 7]),
        (3, False, 6, [3, 6]),
        (0, True, 5, [0, 5]),
        (0, False, 5, [5]),
        (9, False, 5, [5]),
        (2, False, 0, [0]),  # evaluate only
    ],
)
def test_an_evaluator_runs_at_its_cadence_and_always_at_the_end(every, at_start, last, steps):
    assert due(every, at_start, last) == steps


@pytest.mark.parametrize(
    'successes, total, low, high',
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (1, 1, 0.2065, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe (1998), table I
        (15, 148, 0.0624, 0.1605),
    ],
)
def test_the_wilson_interval_has_its_published_values(successes, total, low, high):
    assert wilson_interval(successes, total) == pytest.approx((low, high), abs=5e-5)

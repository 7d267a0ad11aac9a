"""When evaluators run."""

import pytest

from jaxfm.evals.base import Periodic


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

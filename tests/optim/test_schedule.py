"""Learning rates by update."""

import numpy as np
import pytest

from jaxfm.optim import AdamWConfig
from jaxfm.optim.schedule import make_schedule

pytestmark = pytest.mark.usefixtures('quick_compilation')


def rates(count, **options):
    config = AdamWConfig(**dict(learning_rate=0.8, final_fraction=0.25) | options)
    schedule = make_schedule(config, count)
    return [float(schedule(step)) for step in range(count + 1)]


def test_warmup_rises_linearly_from_the_first_update_to_the_peak():
    values = rates(8, warmup_steps=4, schedule='constant')
    np.testing.assert_allclose(values, [0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8], rtol=1e-6)


@pytest.mark.parametrize('warmup_steps', [0, 1])
def test_a_warmup_of_one_update_or_none_starts_at_the_peak(warmup_steps):
    assert rates(4, warmup_steps=warmup_steps)[0] == pytest.approx(0.8)


def test_cosine_falls_to_the_final_fraction_at_the_last_step():
    values = rates(10, warmup_steps=2)
    wanted = [0.2 + 0.3 * (1 + np.cos(np.pi * step / 8)) for step in range(9)]
    np.testing.assert_allclose(values[:2], [0.4, 0.8], rtol=1e-6)
    np.testing.assert_allclose(values[2:], wanted, rtol=1e-5)


def test_linear_falls_to_the_final_fraction_and_stays():
    values = rates(6, schedule='linear', decay_steps=3)
    np.testing.assert_allclose(values, [0.8, 0.6, 0.4, 0.2, 0.2, 0.2, 0.2], rtol=1e-5)

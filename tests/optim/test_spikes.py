"""Which losses are spikes."""

import math

import numpy as np
import pytest

from jaxfm.optim import SpikesConfig
from jaxfm.optim.spikes import FEWEST, Spikes


def spikes_of(losses, **config):
    """The steps (from 1 on) of these losses that are spikes, all of them applied."""
    return list(judge_all(Spikes(SpikesConfig(**config)), losses))


def judge_all(spikes, losses, first=1):
    for step, loss in enumerate(losses, first):
        spikes.begin(step, step)
        if found := spikes.judge(step, loss, math.isfinite(loss), math.isfinite(loss)):
            yield found.step


def noisy(count, seed=0):
    return list(3 + 0.1 * np.random.default_rng(seed).standard_normal(count))


def test_a_loss_far_above_those_before_it_is_a_spike():
    losses = noisy(200)
    assert spikes_of(losses) == []
    losses[150] = 4.0
    assert spikes_of(losses) == [151]
    assert spikes_of(losses, policy='off') == []
    assert spikes_of(losses, sigmas=12) == []
    losses[150] = 2.0
    assert spikes_of(losses) == []


def test_the_limit_is_mean_plus_sigmas_of_the_window_up_to_the_step_before_the_last():
    losses = noisy(300)
    spikes = Spikes(SpikesConfig(window=100, sigmas=4))
    assert list(judge_all(spikes, losses)) == []
    seen = np.array(losses[199:299])  # of steps 200 to 299
    assert spikes.limit(301) == pytest.approx(seen.mean() + 4 * seen.std(), rel=1e-6)
    losses[-1] = 100.0  # too new to judge the next step by, but not the one after it
    other = Spikes(SpikesConfig(window=100, sigmas=4))
    assert list(judge_all(other, losses)) == [300]
    assert other.limit(301) == spikes.limit(301)
    assert other.limit(302) > spikes.limit(302)


def test_too_few_losses_judge_nothing():
    early = FEWEST + 1
    assert spikes_of([3.0] * (early - 1) + [100.0]) == []
    assert spikes_of([3.0] * early + [100.0]) == [early + 1]


def test_constant_losses_have_a_smallest_sigma():
    """Rounding is no spike."""
    assert spikes_of([2.0] * 50 + [2.001, 2.0, 2.013]) == [53]


def test_losses_that_stay_high_become_normal():
    assert len(spikes_of(noisy(100) + [6.0 + one for one in noisy(100)])) < 5


def test_a_loss_that_is_not_finite_is_no_spike_and_does_not_count():
    losses = noisy(60)
    assert spikes_of(losses[:40] + [math.nan, math.inf] + losses[40:] + [9.0]) == [63]


def test_a_step_that_was_skipped_does_not_count():
    spikes = Spikes(SpikesConfig())
    list(judge_all(spikes, noisy(50)))
    before = spikes.get_state()['losses']
    spikes.begin(51, None)
    assert spikes.judge(51, 9.0, is_finite=True, is_applied=False).loss == 9.0
    assert spikes.get_state()['losses'] == before
    assert spikes.judge(52, 3.0, is_finite=False, is_applied=False) is None


def test_a_window_that_was_saved_judges_as_one_that_was_not():
    losses = noisy(200)
    losses[90], losses[91], losses[180] = 4.5, 4.5, 4.0
    straight = Spikes(SpikesConfig(window=64))
    found = list(judge_all(straight, losses))
    assert found == [91, 92, 181]
    for cut in (20, 90, 91, 92, 150):
        first, second = Spikes(SpikesConfig(window=64)), Spikes(SpikesConfig(window=64))
        early = list(judge_all(first, losses[:cut]))
        second.set_state(first.get_state())
        assert early + list(judge_all(second, losses[cut:], cut + 1)) == found
        assert second.get_state() == straight.get_state()
    old = Spikes(SpikesConfig())
    old.set_state(None)  # a checkpoint of before losses were judged
    assert old.get_state() == Spikes(SpikesConfig()).get_state()


def test_going_back_forgets_later_losses_but_counts():
    spikes = Spikes(SpikesConfig())
    list(judge_all(spikes, noisy(40)))
    saved = spikes.get_state()
    assert list(judge_all(spikes, [9.0], 41)) == [41]
    spikes.go_back(saved)
    assert spikes.get_state() == saved | {'count': 1, 'rewinds': 1}
    spikes.go_back(None)
    assert spikes.get_state() == {'losses': [], 'count': 1, 'rewinds': 2, 'last_good': 0}


def test_the_last_good_step_applied_an_update_and_was_no_spike():
    spikes = Spikes(SpikesConfig())
    list(judge_all(spikes, noisy(40)))
    assert spikes.last_good == 40
    spikes.begin(41, None)
    found = spikes.judge(41, 9.0, is_finite=True, is_applied=True)
    assert (found.last_good, spikes.last_good) == (40, 40)
    assert spikes.judge(42, math.nan, is_finite=False, is_applied=False) is None
    assert spikes.last_good == 40
    spikes.begin(43, None)
    assert spikes.judge(43, 3.0, is_finite=True, is_applied=True) is None
    assert spikes.last_good == 43

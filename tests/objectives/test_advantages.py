"""Advantages against what their definitions say; test_policy_gradient.py compares TRL's."""

import numpy as np
import pytest

from jaxfm.objectives import PolicyGradientConfig, ReinforcePlusPlusConfig
from jaxfm.objectives.advantages import advantages

BASELINES, SCALES = ('group', 'leave_one_out', 'batch', 'none'), ('group', 'batch', 'none')
REWARDS = np.random.default_rng(0).random((5, 6))


def of(rewards, baseline='group', scale='none'):
    return advantages(rewards, PolicyGradientConfig(baseline=baseline, scale=scale))


@pytest.mark.parametrize('scale', SCALES)
@pytest.mark.parametrize('baseline', BASELINES)
def test_every_part_is_what_its_definition_says(baseline, scale):
    wanted = np.zeros(REWARDS.shape)
    for p, group in enumerate(REWARDS):
        for g, reward in enumerate(group):
            subtracted = {
                'group': sum(group) / 6,
                'leave_one_out': (sum(group) - reward) / 5,
                'batch': REWARDS.sum() / 30,
                'none': 0.0,
            }
            variance = np.sum((group - group.mean()) ** 2) / 5
            of_all = np.sum((REWARDS - REWARDS.mean()) ** 2) / 29
            divisor = {'group': variance**0.5 + 1e-4, 'batch': of_all**0.5 + 1e-4, 'none': 1.0}
            wanted[p, g] = (reward - subtracted[baseline]) / divisor[scale]
    result = of(REWARDS, baseline, scale)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('scale', SCALES)
@pytest.mark.parametrize('baseline', ['group', 'leave_one_out'])
def test_advantages_of_a_group_add_up_to_zero(baseline, scale):
    np.testing.assert_allclose(of(REWARDS, baseline, scale).sum(1), 0, atol=1e-5)


@pytest.mark.parametrize('scale', SCALES)
@pytest.mark.parametrize('baseline', ['group', 'leave_one_out'])
@pytest.mark.parametrize('reward', [0.1, 1 / 3, -7.3, 1e6])
def test_equal_rewards_have_no_advantage_at_all(baseline, scale, reward):
    """The mean of equal numbers is not always that number."""
    rewards = np.concatenate([REWARDS[:, :3], np.full((2, 3), reward)])
    result = of(rewards, baseline, scale)
    assert not result[-2:].any()
    assert result[:-2].all()


def test_reinforce_plus_plus_normalizes_over_the_batch():
    result = advantages(REWARDS, ReinforcePlusPlusConfig())
    np.testing.assert_allclose(result.mean(), 0, atol=1e-6)
    np.testing.assert_allclose(result.std(ddof=1), 1, rtol=1e-3)


def test_rewards_stay_as_they_are():
    rewards = REWARDS.copy()
    for baseline in BASELINES:
        of(rewards, baseline, 'batch')
    np.testing.assert_array_equal(rewards, REWARDS)


@pytest.mark.parametrize(
    'parts', [('group', 'none'), ('leave_one_out', 'none'), ('none', 'group'), ('batch', 'group')]
)
def test_a_group_of_one_is_refused(parts):
    message = 'a baseline or scale of the group needs at least 2 samples of each prompt'
    with pytest.raises(ValueError, match=message):
        of(REWARDS[:, :1], *parts)


@pytest.mark.parametrize('parts', [('batch', 'none'), ('none', 'batch')])
def test_a_batch_of_one_is_refused(parts):
    with pytest.raises(ValueError, match='of the batch needs at least 2 samples'):
        of(REWARDS[:1, :1], *parts)
    of(REWARDS[:, :1], *parts)


def test_one_sample_without_a_baseline_has_its_reward():
    np.testing.assert_array_equal(of([[0.5]], 'none'), [[0.5]])

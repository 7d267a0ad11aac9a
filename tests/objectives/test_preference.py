"""Preferences: TRL's losses and gradients, what must be equal, and mistakes that must be found."""

import json

import jax
import numpy as np
import pytest

from jaxfm.objectives import (
    DPOConfig,
    IPOConfig,
    KTOConfig,
    PreferenceConfig,
    SimPOConfig,
)
from jaxfm.objectives.preference import Preference
from tests.models.goldens import Golden

pytestmark = pytest.mark.usefixtures('quick_compilation')

GOLDEN = Golden('preference')
PAIRS = 6
CONFIGS = {
    'dpo': DPOConfig(beta=0.3),
    'hinge': DPOConfig(beta=0.3, loss='hinge'),
    'ipo': IPOConfig(beta=0.3),
    'robust': DPOConfig(beta=0.3, label_smoothing=0.2, smoothing='robust'),
    'mean': DPOConfig(beta=0.3, logprobs='mean'),
    'with_sft': DPOConfig(beta=0.3, sft=0.4),
    'kto': KTOConfig(beta=0.3),
    'kto_weights': KTOConfig(beta=0.5, desirable_weight=0.7, undesirable_weight=1.4),
    'simpo': SimPOConfig(beta=2.0, margin=0.8),
    'simpo_smoothed': SimPOConfig(beta=2.0, margin=0.8, label_smoothing=0.1),
    'cpo': PreferenceConfig(beta=0.3, reference='none'),
    'cpo_hinge': PreferenceConfig(beta=0.3, reference='none', loss='hinge'),
}


def lay_out(rows):
    """[[(number of a pair, ...)] for each row] -> the batch, and where each token of it is.

    Each chat has a prompt of two inputs; its answer's last token is an input without a target.
    """
    lengths = GOLDEN.arrays['lengths']
    width = max(sum(lengths[p] + lengths[p + PAIRS] + 4 for p in row) for row in rows) + 3
    shape = (len(rows), width)
    batch = {name: np.zeros(shape, np.int32) for name in ('segment_ids', 'pair_ids')}
    batch |= {name: np.zeros(shape, np.float32) for name in ('loss_mask', 'sides')}
    places = {}
    for row, pairs in enumerate(rows):
        start = segment = 0
        for number, pair in enumerate(pairs, start=1):
            for chat, side in ((pair, 1), (pair + PAIRS, -1)):
                size = int(lengths[chat])
                stop, segment = start + 2 + size, segment + 1
                batch['segment_ids'][row, start:stop] = segment
                batch['pair_ids'][row, start:stop] = number
                batch['loss_mask'][row, start + 1 : stop - 1] = 1
                batch['sides'][row, start + 1 : stop - 1] = side
                places[chat] = row, slice(start + 1, stop - 1)
                start = stop
    batch['reference_logprobs'] = spread(GOLDEN.arrays['reference'], places, shape)
    mask = np.arange(GOLDEN.arrays['policy'].shape[1]) < lengths[:, None]
    more = GOLDEN.arrays['mismatched'] - GOLDEN.arrays['mismatched_reference']
    kl = max((more * mask).sum(1).mean(), 0)
    batch['kl'] = np.full(shape, kl, np.float32)
    return batch, places


def spread(values, places, shape):
    """[chats, L] -> [B, T], with nonsense elsewhere."""
    result = np.full(shape, np.nan, np.float32)
    for chat, (row, slots) in places.items():
        result[row, slots] = values[chat, : slots.stop - slots.start]
    return result


ROWS = [[0, 1, 2], [], [3, 4], [5]]


def run(config, rows=ROWS, change=None):
    """-> loss, gradient [chats, L] with respect to the policy's log-probs, metrics."""
    batch, places = lay_out(rows)
    if change:
        change(batch)
    objective = Preference(config)
    shape = batch['loss_mask'].shape

    def total(logprobs_BT):
        sums, metrics = objective.terms(logprobs_BT, batch)
        weights = objective.weights(batch)
        terms = [objective.coefficients[name] * sums[name] / weights[name] for name in sums]
        return sum(terms), metrics

    given = spread(GOLDEN.arrays['policy'], places, shape)
    (loss, metrics), gradient = jax.value_and_grad(total, has_aux=True)(given)
    found = np.zeros_like(GOLDEN.arrays['policy'])
    for chat, (row, slots) in places.items():
        found[chat, : slots.stop - slots.start] = gradient[row, slots]
    assert np.count_nonzero(found) == np.count_nonzero(gradient)  # nothing goes anywhere else
    return float(loss), found, {name: float(a / b) for name, (a, b) in metrics.items()}


@pytest.mark.parametrize('name', CONFIGS)
def test_loss_and_gradient_are_those_of_trl(name):
    theirs = GOLDEN.about['cases'][name]
    loss, gradient, metrics = run(CONFIGS[name])
    assert loss == pytest.approx(theirs['loss'], abs=1e-5)
    np.testing.assert_allclose(gradient, GOLDEN.arrays[f'gradient/{name}'], atol=1e-5)
    names = {
        'rewards/chosen': 'reward_chosen',
        'rewards/rejected': 'reward_rejected',
        'rewards/accuracies': 'accuracy',
        'rewards/margins': 'margin',
        'kl': 'kl',
    }
    for key, value in theirs['metrics'].items():
        # Their margins are of all losses those of DPO's sums; KTO has no pairs.
        if key == 'rewards/margins' and 'kto' in name:
            continue
        if CONFIGS[name].logprobs == 'sum':
            assert metrics[names[key]] == pytest.approx(value, abs=1e-5), key


def test_every_case_of_trl_is_compared():
    assert CONFIGS.keys() == GOLDEN.about['cases'].keys()


@pytest.mark.parametrize('name', ['dpo', 'kto', 'with_sft', 'simpo'])
def test_where_pairs_are_packed_changes_nothing(name):
    loss, gradient, metrics = run(CONFIGS[name])
    for rows in ([[0], [1], [2], [3], [4], [5]], [[5, 3, 1, 0, 2, 4]]):
        other = run(CONFIGS[name], rows)
        assert other[0] == pytest.approx(loss, abs=2e-6)
        np.testing.assert_allclose(other[1], gradient, atol=2e-6)
        assert other[2] == pytest.approx(metrics, rel=1e-6, abs=2e-6)


def test_conservative_smoothing_is_the_loss_with_sides_swapped_at_times():
    loss, gradient, _ = run(DPOConfig(beta=0.3, label_smoothing=0.3))

    def swap(batch):
        batch['sides'] *= -1

    straight, swapped = run(DPOConfig(beta=0.3)), run(DPOConfig(beta=0.3), change=swap)
    assert loss == pytest.approx(0.7 * straight[0] + 0.3 * swapped[0], abs=1e-6)
    np.testing.assert_allclose(gradient, 0.7 * straight[1] + 0.3 * swapped[1], atol=1e-6)


def _swap_reference(batch):
    """The reference of each answer is taken from its neighbour."""
    batch['reference_logprobs'] = np.roll(batch['reference_logprobs'], 1, axis=0)


def _shift_reference(batch):
    batch['reference_logprobs'] = np.roll(batch['reference_logprobs'], 1, axis=1)


def _swap_sides(batch):
    batch['sides'] *= -1


def _merge_pairs(batch):
    batch['pair_ids'] = np.minimum(batch['pair_ids'], 1)


def _no_reference(batch):
    batch['reference_logprobs'] *= 0


@pytest.mark.parametrize(
    'mistake', [_swap_reference, _shift_reference, _swap_sides, _merge_pairs, _no_reference]
)
def test_the_goldens_find_a_mistake(mistake):
    loss, gradient, _ = run(CONFIGS['dpo'], change=mistake)
    right = GOLDEN.about['cases']['dpo']['loss'], GOLDEN.arrays['gradient/dpo']
    assert not abs(loss - right[0]) < 1e-3 or not np.allclose(gradient, right[1], atol=1e-3)


@pytest.mark.parametrize(
    'config, values, said',
    [
        (PreferenceConfig, {'loss': 'squared', 'margin': 1.0}, 'margin 1 would do nothing'),
        (PreferenceConfig, {'loss': 'kto', 'label_smoothing': 0.1}, 'label_smoothing 0.1 would do'),
        (DPOConfig, {'desirable_weight': 2.0}, 'desirable_weight 2 would do nothing'),
        (KTOConfig, {'reference': 'none'}, 'loss kto compares with a reference'),
        (DPOConfig, {'smoothing': 'robust'}, 'label_smoothing is 0'),
        (
            KTOConfig,
            {'desirable_weight': 0.0, 'undesirable_weight': 0.0},
            'must be more than 0',
        ),
    ],
)
def test_keys_that_would_do_nothing_are_refused(config, values, said):
    found = config.find_conflicts({**dict(config()), **values})
    assert any(said in problem.sentence for problem in found), json.dumps(str(found))


@pytest.mark.parametrize('config', [DPOConfig, IPOConfig, KTOConfig, SimPOConfig, PreferenceConfig])
def test_presets_have_no_conflict(config):
    assert not config.find_conflicts(dict(config()))

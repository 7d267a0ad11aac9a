"""The table of policy-gradient estimators: what is unbiased is, and biases have the known signs."""

import functools
import json
import math

import numpy as np
import pytest

from tests.conftest import ROOT
from tools.bench.policy_gradient import __main__ as bench
from tools.bench.policy_gradient import estimators
from tools.bench.policy_gradient.estimators import GROUP, Estimator
from tools.bench.policy_gradient.measure import measure, share
from tools.bench.policy_gradient.world import (
    COMPLETIONS,
    DIFFICULTIES,
    SUCCESS,
    make_world,
    probabilities,
)

WORLDS = {rewards: make_world(rewards) for rewards in ('graded', 'binary')}
EXACT = estimators.VALUES + estimators.CORRECTIONS
SAMPLED = estimators.BASELINES + estimators.PIECES + estimators.PRESETS
CUTS = ('PPO', 'truncated', 'masked')
CUT = [each for each in estimators.CORRECTIONS if each.name.startswith(CUTS)]
BATCHES = 1000
pytestmark = pytest.mark.usefixtures('quick_compilation')


def find(name: str) -> Estimator:
    return next(each for each in SAMPLED + EXACT if each.name == name)


def sample(estimator, staleness, rewards='graded'):
    world = WORLDS[rewards]
    return measure(world, estimator, world.sampler(staleness), BATCHES), world.true_gradient()


@functools.cache
def compute(estimator, staleness, rewards='graded'):
    return measure(WORLDS[rewards], estimator, WORLDS[rewards].sampler(staleness), 0).mean_PXV


def bias(estimator, staleness):
    """As a share of the true gradient."""
    true = WORLDS['graded'].true_gradient()
    return np.linalg.norm(compute(estimator, staleness) - true) / np.linalg.norm(true)


def chances(world, staleness):
    """[P, Y]: p / q, and q."""
    q_PY = probabilities(world.sampler(staleness))
    return probabilities(world.logits_PXV) / q_PY, q_PY


def test_the_true_gradient_is_the_slope_of_the_expected_reward():
    world, step = WORLDS['graded'], 1e-5
    for seed in range(3):
        direction = np.random.default_rng(seed).normal(size=world.logits_PXV.shape)
        ends = [world.expected_reward(world.logits_PXV + end * direction) for end in (step, -step)]
        slope = (ends[0] - ends[1]) / (2 * step)
        assert slope == pytest.approx(np.vdot(world.true_gradient(), direction), rel=1e-6)


@pytest.mark.parametrize('estimator', EXACT, ids=lambda estimator: estimator.name)
def test_on_samples_of_the_policy_only_values_with_errors_have_a_bias(estimator):
    assert bias(estimator, 0.0) < 1e-12 if estimator.scale else bias(estimator, 0.0) > 0.05


@pytest.mark.parametrize('estimator', EXACT, ids=lambda estimator: estimator.name)
def test_on_stale_samples_only_the_ratio_of_the_sample_has_no_bias(estimator):
    assert bias(estimator, 0.5) < 1e-12 if estimator.stays_unbiased else bias(estimator, 0.5) > 0.05


WITH_THEORY = [
    pytest.param(each, staleness, id=f'{each.name}, stale {staleness:g}')
    for each in SAMPLED
    for staleness in (0.0, 0.5)
    if each.scale and (each.stays_unbiased or not staleness)
]


@pytest.mark.parametrize('estimator, staleness', WITH_THEORY)
def test_unbiased_within_four_sigma(estimator, staleness):
    moments, true = sample(estimator, staleness)
    assert moments.sigmas(estimator.scale * true, true) < 4


def test_the_mean_of_the_group_takes_its_share_away():
    """(G - 1) / G, and nothing else, as the test above shows."""
    moments, true = sample(find('mean of the group'), 0.0)
    assert moments.sigmas(true, true) > 4
    row = bench.describe(find('mean of the group'), moments, true, 0.0)
    assert row['theory'] == 1 - 1 / GROUP and row['is_unbiased'] and row['sigmas'] < 4
    assert row['scale'] == pytest.approx(1, abs=0.04) and row['cosine'] > 0.98


def test_a_missing_correction_is_seen():
    config = estimators._leave_one_out(old_logprobs='recomputed')
    moments, true = sample(Estimator('log-probs of the policy itself', config), 0.5)
    assert moments.sigmas(true, true) > 4


def test_sampled_moments_are_the_exact_ones():
    sampled, true = sample(find('no baseline'), 0.5)
    world = WORLDS['graded']
    exact = measure(world, find('no baseline (exact)'), world.sampler(0.5), 0)
    assert sampled.sigmas(exact.mean_PXV, true) < 4
    assert sampled.variance == pytest.approx(exact.variance, rel=0.1)


# Clipping and truncation


@pytest.mark.parametrize('estimator', CUT, ids=lambda estimator: estimator.name)
def test_what_is_cut_is_missing_along_the_true_gradient_the_more_the_staler(estimator):
    """Against the same ratios uncut, which for tokens have a bias of their own."""
    true = WORLDS['binary'].true_gradient()
    uncut = find('p/q of each token' if 'tokens' in estimator.name else 'p/q of the sample')
    cases = (0.0, 0.25, 0.5, 1.0)
    means = [compute(estimator, staleness, 'binary') for staleness in cases]
    whole = [compute(uncut, staleness, 'binary') for staleness in cases]
    missing = [share(all_of_it - mean, true) for mean, all_of_it in zip(means, whole)]
    biases = [np.linalg.norm(mean - true) for mean in means]
    assert abs(missing[0]) < 1e-12 and min(missing[2:]) > 0.03
    assert biases == sorted(biases)


def test_what_is_cut_is_what_theory_says():
    world = WORLDS['graded']
    ratio_PY, q_PY = chances(world, 0.5)
    gain_PY = world.rewards_PY - (q_PY * world.rewards_PY).sum(axis=1, keepdims=True)
    is_cut_PY = np.where(gain_PY > 0, ratio_PY > 1.2, ratio_PY < 0.8)
    weights = {
        'truncated at 2, samples': np.minimum(ratio_PY, 2),
        'masked outside 0.5..2, samples': ratio_PY * ((ratio_PY >= 0.5) & (ratio_PY <= 2)),
        'PPO clip of samples': ratio_PY * ~is_cut_PY,
    }
    for name, weight_PY in weights.items():
        expected = world.sum_scores(q_PY * weight_PY * gain_PY)
        np.testing.assert_allclose(compute(find(name), 0.5), expected, rtol=0, atol=1e-12)


# The two biases of GRPO (Liu et al. 2025, arXiv 2503.20783)


def test_the_std_of_the_group_weighs_a_prompt_by_its_difficulty():
    moments, true = sample(find('std of the group'), 0.0, 'binary')
    world = WORLDS['binary']
    mean_P = (probabilities(world.logits_PXV) * world.rewards_PY).sum(axis=1)
    assert mean_P == pytest.approx([SUCCESS[kind] for kind in DIFFICULTIES], abs=0.02)
    scales = [share(*pair) for pair in zip(moments.mean_PXV, true)]
    for scale, error, mean in zip(scales, moments.errors.prompts, mean_P):
        expected = sum(
            math.comb(GROUP, k) * mean**k * (1 - mean) ** (GROUP - k) * _weight(k)
            for k in range(GROUP + 1)
        )
        assert abs(scale - expected / (mean * (1 - mean))) < 4 * error
    weights = {kind: np.mean(np.array(scales)[np.equal(DIFFICULTIES, kind)]) for kind in SUCCESS}
    assert min(weights['hard'], weights['easy']) > 1.15 * weights['middling']


def _weight(successes: int) -> float:
    std = math.sqrt(successes * (GROUP - successes) / (GROUP * (GROUP - 1)))
    return std**2 / (std + 1e-4)


def test_the_mean_over_tokens_pays_for_short_successes_and_long_failures():
    world = WORLDS['binary']
    config = estimators._plain(ratio='token')
    mean = compute(Estimator('mean over the tokens of a sample', config, 'prompt'), 0.0, 'binary')
    p_PY = probabilities(world.logits_PXV)
    gain_PY = world.rewards_PY - (p_PY * world.rewards_PY).sum(axis=1, keepdims=True)
    expected = world.sum_scores(p_PY * gain_PY / COMPLETIONS.lengths_Y[None])
    np.testing.assert_allclose(mean, expected, rtol=0, atol=1e-12)
    config = estimators._plain(aggregation='sum')
    mean_of_sums = compute(Estimator('summed over tokens', config, 'prompt'), 0.0, 'binary')
    expected = world.sum_scores(p_PY * gain_PY * COMPLETIONS.lengths_Y[None])
    np.testing.assert_allclose(mean_of_sums, expected, rtol=0, atol=1e-12)
    true = world.true_gradient()
    turn = mean / share(mean, true) - true
    for is_kind_PY, sign in ((world.rewards_PY, -1), (1 - world.rewards_PY, 1)):
        of_kind_PY = p_PY * is_kind_PY / (p_PY * is_kind_PY).sum(axis=1, keepdims=True)
        lengths_PY = np.broadcast_to(COMPLETIONS.lengths_Y, p_PY.shape)
        mean_P1 = (of_kind_PY * lengths_PY).sum(axis=1, keepdims=True)
        slope = world.sum_scores(of_kind_PY * (lengths_PY - mean_P1))
        assert sign * np.vdot(turn, slope) > 0


# The command


def test_the_command_writes_what_it_measures(tmp_path, monkeypatch, capsys):
    few = {'values': estimators.VALUES[:2]}
    monkeypatch.setattr(bench, 'SECTIONS', few)
    bench.main(['--out', str(tmp_path), '--batches', '100'])
    [path] = tmp_path.iterdir()
    record = json.loads(path.read_text(encoding='utf-8'))
    assert len(record['results']) == 2 * 5 * 2 and record['batches'] == 100
    assert bench.show(record) in capsys.readouterr().out
    exact = [each for each in record['results'] if each['estimator'] == 'value of the prompt']
    assert all(each['bias'] < 1e-12 and each['cosine'] == pytest.approx(1) for each in exact)


def test_too_few_batches_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench.parse(['--out', 'x', '--batches', '120'])
    assert '--batches 120 must be a multiple of 50, at least 100' in capsys.readouterr().err


def test_the_page_has_the_tables_of_the_newest_result():
    path = max((ROOT / 'tools' / 'bench' / 'results').glob('policy_gradient-*.json'))
    page = (ROOT / 'docs' / 'policy_gradient.md').read_text(encoding='utf-8')
    tables = bench.show(json.loads(path.read_text(encoding='utf-8')))
    assert all(table in page for table in tables.split('\n\n'))
    assert path.stem.removeprefix('policy_gradient-') in page

"""Estimates against brute force over all subsets, published values, and simulated coverage."""

import itertools

import numpy as np
import pytest

from jaxfm.evals import statistics

CASES = 40


def subsets(n, k):
    return [list(chosen) for chosen in itertools.combinations(range(n), k)]


def draws(seed):
    """Yields (scores, values, answers, k) of one question with up to 7 samples."""
    random = np.random.default_rng(seed)
    for case in range(CASES):
        n = int(random.integers(1, 8))
        scores = random.integers(0, 2, n) if case % 2 else random.random(n).round(1)
        values = random.integers(0, 4, n)
        answers = [None if random.random() < 0.3 else random.integers(0, 3) for _ in range(n)]
        yield scores.astype(float), values, answers, int(random.integers(1, n + 1))


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
    interval = statistics.wilson_interval(successes, total)
    assert interval == pytest.approx((low, high), abs=5e-5)
    assert statistics.wilson_interval(0, 6)[0] == 0 and statistics.wilson_interval(7, 7)[1] == 1


def test_pass_at_k_is_the_mean_over_all_subsets():
    for scores, _, _, k in draws(0):
        best = np.mean([max(scores[chosen]) for chosen in subsets(len(scores), k)])
        worst = np.mean([min(scores[chosen]) for chosen in subsets(len(scores), k)])
        assert statistics.pass_at_k(scores, k) == pytest.approx(best, abs=1e-12)
        assert statistics.all_of_k(scores, k) == pytest.approx(worst, abs=1e-12)


def test_pass_at_k_is_not_biased_as_the_plug_in_is():
    """16 samples of a question that is solved with probability 0.1, as in Chen et al. (2021)."""
    random, p, k = np.random.default_rng(1), 0.1, 8
    solved = random.binomial(16, p, 20_000)
    scores = [[1.0] * c + [0.0] * (16 - c) for c in range(17)]
    each = np.array([statistics.pass_at_k(one, k) for one in scores])
    truth = 1 - (1 - p) ** k
    assert each[solved].mean() == pytest.approx(truth, abs=0.006)
    plug_in = 1 - (1 - solved / 16) ** k
    assert plug_in.mean() < truth - 0.02


def test_the_best_of_k_by_a_scorer_is_the_mean_over_all_subsets():
    for scores, values, _, k in draws(2):
        found = []
        for chosen in subsets(len(scores), k):
            largest = max(values[chosen])
            found.append(np.mean([scores[i] for i in chosen if values[i] == largest]))
        assert statistics.best_of_k(scores, values, k) == pytest.approx(np.mean(found), abs=1e-12)
    assert statistics.best_of_k([1.0, 0.0], [np.nan, -5.0], 2) == 0.0


def vote(answers, scores, chosen):
    """The score of the most frequent answer of the chosen samples; None never votes."""
    counts = {}
    for i in chosen:
        if answers[i] is not None:
            counts[answers[i]] = counts.get(answers[i], 0) + 1
    winners = [answer for answer, count in counts.items() if count == max(counts.values())]
    score = {a: np.mean([s for s, b in zip(scores, answers) if b == a]) for a in winners}
    return np.mean(list(score.values())) if winners else 0.0


def test_a_majority_is_the_mean_over_all_subsets_with_ties_split():
    for scores, _, answers, k in draws(3):
        truth = np.mean([vote(answers, scores, chosen) for chosen in subsets(len(scores), k)])
        assert statistics.majority_at_k(answers, scores, k) == pytest.approx(truth, abs=1e-12)


def test_an_answer_that_no_parser_takes_never_votes():
    answers, scores = [None, None, None, 'right'], [0.0, 0.0, 0.0, 1.0]
    assert statistics.majority_at_k(answers, scores, 4) == 1.0
    assert statistics.majority_at_k(answers, scores, 1) == 0.25
    assert statistics.majority_at_k([None] * 3, [0.0] * 3, 3) == 0.0


def test_a_majority_of_many_samples_is_exact_and_quick():
    answers = [str(i % 7) for i in range(200)]
    scores = [float(answer == '0') for answer in answers]
    assert statistics.majority_at_k(answers, scores, 200) == pytest.approx(1 / 4)  # of 0 to 3
    with pytest.raises(ValueError, match='k is 9 of 8 samples'):
        statistics.majority_at_k(answers[:8], scores[:8], 9)


def test_k_beyond_the_samples_is_refused():
    for k in (0, 4):
        with pytest.raises(ValueError, match=f'k is {k}, .* from 1 to the number of samples 3'):
            statistics.pass_at_k([0.0, 0.0, 0.0], k)
    assert statistics.powers(6) == [1, 2, 4, 6]
    assert statistics.powers(1) == [1]


def test_single_answers_of_questions_have_wilsons_interval():
    found = statistics.share([1.0, 0.0, 0.0])
    assert (found.low, found.high) == statistics.wilson_interval(1, 3)
    assert found.values('pass@1').keys() == {'pass@1', 'pass@1_low', 'pass@1_high'}


def test_equal_scores_still_have_an_interval():
    low, high = statistics.wilson_interval(3, 3)
    found = statistics.share([1.0] * 6, clusters='aabbcc')
    assert (found.value, found.low, found.high) == (1.0, low, high)


@pytest.mark.parametrize('score', [0.1, 0.2, 1 / 3])
def test_equal_fractions_have_one_too_whatever_their_mean_rounds_to(score):
    for count in (3, 7, 30):
        found = statistics.share([score] * count)
        low, high = statistics.wilson_interval(score * count, count)
        np.testing.assert_allclose((found.low, found.high), (low, high), rtol=1e-9)


SIZES = [  # clusters, questions in each, samples of a question, mean, spread between clusters
    (40, 1, 8, 0.5, 0.3),
    (20, 5, 1, 0.5, 0.2),
    (60, 1, 4, 0.85, 0.1),
    (15, 4, 2, 0.3, 0.2),
]


@pytest.mark.parametrize('size', SIZES, ids=str)
def test_clustered_intervals_cover_the_truth_95_times_in_100(size):
    clusters, questions, samples, centre, spread = size
    random, repeats = np.random.default_rng(0), 400
    a = centre * (centre * (1 - centre) / spread**2 - 1)  # of a beta distribution
    names = np.repeat(np.arange(clusters), questions).tolist()
    covered = dict.fromkeys(('share', 'mean', 'naive'), 0)
    for _ in range(repeats):
        chances = np.repeat(random.beta(a, a * (1 - centre) / centre, clusters), questions)
        drawn = random.binomial(samples, chances)
        low, high = statistics.wilson_interval(drawn.sum(), drawn.size * samples)
        covered['naive'] += low <= centre <= high
        for name in ('share', 'mean'):
            found = getattr(statistics, name)(drawn / samples, names)
            covered[name] += found.low <= centre <= found.high
    assert covered['share'] / repeats == pytest.approx(0.95, abs=0.03)
    assert covered['mean'] / repeats == pytest.approx(0.95, abs=0.03)
    # As if every sample were a question of its own.
    assert covered['naive'] / repeats < 0.93 or questions == 1


def test_the_interval_of_a_ratio_covers_its_truth():
    random, hits = np.random.default_rng(4), 0
    for _ in range(400):
        tokens = random.integers(20, 200, 40)
        nats = tokens * (2 + random.normal(0, 0.5, 40))
        found = statistics.ratio(nats, tokens)
        hits += found.low <= 2 <= found.high
    assert hits / 400 == pytest.approx(0.95, abs=0.03)
    assert statistics.ratio([6.0], [3.0]).value == 2.0


def test_questions_that_are_hard_for_both_cancel_in_a_paired_difference():
    random = np.random.default_rng(5)
    hard = random.random(200)
    first = (random.random(200) < hard).astype(float)
    second = np.where(random.random(200) < 0.1, 0.0, first)
    paired = statistics.paired_difference(first, second)
    assert paired.value == pytest.approx(first.mean() - second.mean())
    separate = np.hypot(*(statistics.mean(x).standard_error for x in (first, second)))
    assert paired.standard_error < separate / 2
    assert paired.low > 0
    assert statistics.mean([1.0]).high == np.inf
    assert statistics.mean([1.0]).values('x') == {'x': 1.0}


def test_mcnemar_is_the_exact_binomial_test():
    assert statistics.mcnemar(0, 0) == 1.0
    assert statistics.mcnemar(3, 0) == 0.25
    assert statistics.mcnemar(5, 15) == pytest.approx(0.041389465)  # scipy.stats.binomtest(5, 20)
    assert statistics.mcnemar(15, 5) == statistics.mcnemar(5, 15)


def test_student_quantiles_are_those_of_the_tables():
    for freedom, quantile in {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262, 29: 2.045}.items():
        assert statistics.student_t(freedom) == pytest.approx(quantile, rel=5e-3)

"""Every estimate of an evaluation: scores of samples -> a mean with its interval.

- `share` and `mean`: over questions, with standard errors clustered by question or by group.
- `pass_at_k`, `all_of_k`, `best_of_k`, `majority_at_k`: what k of a question's n samples give, in
  expectation over all subsets of k, without bias.
- `paired_difference`, `mcnemar`: two models on the same questions.

The sample of a question and the choice of the question are both random, so the unit of every
standard error is the question: a question with n samples counts once, by the mean of these (Miller
2024, "Adding Error Bars to Evals").
"""

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution
_ROUNDING = 1e-12  # of a mean of scores in [0, 1]; below it, all of them are equal
MAX_VOTES = 1000  # samples of a question: binomials of more exceed a float
# The cluster of each question; None: every question is a cluster of its own.
Clusters = Sequence[Hashable] | None


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over questions with its standard error and its 95 % interval."""

    value: float
    low: float
    high: float
    standard_error: float = math.nan

    def values(self, name: str) -> dict[str, float]:
        """{name, name_low, name_high}; without an interval if a single cluster gives none."""
        if math.isinf(self.high):
            return {name: self.value}
        return {name: self.value, f'{name}_low': self.low, f'{name}_high': self.high}


def clusters_of(questions: Iterable[tuple[str, str]]) -> Clusters:
    """(id, group) of each question -> a cluster for each group, and for each without one."""
    return [('group', group) if group else ('id', id) for id, group in questions]


def wilson_interval(successes: float, total: float, z: float = Z) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion (Wilson, 1927).

    Unlike the normal approximation, it is valid for small samples and for proportions of 0 and 1.
    """
    share = successes / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # The ends are exactly 0 and 1 there, which rounding may miss.
    low = (centre - spread) / scale if share > 0 else 0.0
    return max(0.0, low), min(1.0, (centre + spread) / scale) if share < 1 else 1.0


def share(scores: Sequence[float], clusters: Clusters = None) -> Estimate:
    """The mean of scores in [0, 1], one per question: an interval inside [0, 1].

    For scores of 0 and 1 of separate questions, the interval is Wilson's. Otherwise it is Wilson's
    for the number of independent 0/1 questions that has the same clustered standard error, with the
    quantile of Student's t (Korn and Graubard, 1998), because that error is itself an estimate.

    Args:
      clusters: the cluster of each question, if questions come in clusters, such as several about
        one text; None: every question is a cluster of its own.
    """
    scores = _floats(scores)
    value = float(scores.mean())
    error, count = _clustered_error(scores, clusters)
    if clusters is None and np.isin(scores, (0.0, 1.0)).all():
        size = len(scores)
    elif error > _ROUNDING and count > 1:
        size = value * (1 - value) / error**2 * (Z / student_t(count - 1)) ** 2
    else:  # all clusters are equal: as many as these were seen
        size = count
    return Estimate(value, *wilson_interval(value * size, size), error)


def mean(values: Sequence[float], clusters: Clusters = None) -> Estimate:
    """The mean of any numbers, one per question, with Student's t interval; clusters as `share`."""
    values = _floats(values)
    error, count = _clustered_error(values, clusters)
    return _interval(float(values.mean()), error, count)


def ratio(tops: Sequence[float], bottoms: Sequence[float]) -> Estimate:
    """sum(tops) / sum(bottoms) over documents, such as nats per token, with its interval.

    The standard error is that of the linearised ratio (Cochran 1977, chapter 6).
    """
    tops, bottoms = _floats(tops), _floats(bottoms)
    value = float(tops.sum() / bottoms.sum())
    error, count = _clustered_error((tops - value * bottoms) / bottoms.mean(), None)
    return _interval(value, error, count)


def paired_difference(
    first: Sequence[float], second: Sequence[float], clusters: Clusters = None
) -> Estimate:
    """The mean of first - second, question by question (Miller 2024).

    Questions that are hard for both cancel, so the interval is narrower than that of two separate
    evaluations.
    """
    return mean(_floats(first) - _floats(second), clusters)


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p-value of McNemar's test (McNemar 1947; exact binomial form).

    Args:
      only_first: questions that only the first model solves. only_second: only the second. What
        both or neither solve does not count.
    """
    total = only_first + only_second
    fewer = min(only_first, only_second)
    tail = sum(math.comb(total, i) for i in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)


def _floats(values) -> np.ndarray:
    return np.asarray(values, np.float64)


def _interval(value: float, error: float, count: int) -> Estimate:
    """Infinite if a single cluster says nothing about the spread."""
    reach = student_t(count - 1) * error if count > 1 else math.inf
    return Estimate(value, value - reach, value + reach, error)


def _clustered_error(values: np.ndarray, clusters: Clusters) -> tuple[float, int]:
    """-> the standard error of the mean, and the number of clusters G.

    sqrt(G / (G - 1) * sum over clusters of (sum of deviations)^2) / n: Miller 2024, with the
    usual correction for few clusters. For a single cluster nan.
    """
    deviations = values - values.mean()
    if clusters is not None:
        sums = defaultdict(float)
        for cluster, deviation in zip(clusters, deviations, strict=True):
            sums[cluster] += deviation
        deviations = _floats(list(sums.values()))
    count = len(deviations)
    if count < 2:
        return math.nan, count
    spread = math.sqrt(float(np.sum(deviations**2)) * count / (count - 1))
    return spread / len(values), count


def student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, from a few degrees of freedom on within 1 %.

    Expansion 26.7.5 of Abramowitz and Stegun (1964); exact values for 1 and 2.
    """
    if freedom <= 2:
        return {1: 12.7062, 2: 4.3027}[freedom]
    z, v = Z, freedom
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / v ** (i + 1) for i, term in enumerate(terms))


# Below: one question with n samples, of which k are used.


def _chance(n: int, c: int, k: int) -> float:
    """The probability that k of n samples, without replacement, include one of c marked ones.

    1 - C(n - c, k) / C(n, k) as a product, which cannot overflow (Chen et al. 2021, "Evaluating
    Large Language Models Trained on Code", section 2.1).
    """
    if not 1 <= k <= n:
        raise ValueError(f'k is {k}, but must be from 1 to the number of samples {n}')
    if n - c < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def pass_at_k(scores: Sequence[float], k: int) -> float:
    """The expected best score of k samples: for scores of 0 and 1, the unbiased pass@k.

    The plug-in estimate 1 - (1 - c/n)^k is too low (Chen et al. 2021).
    """
    scores = _floats(scores)
    levels = np.unique(scores[scores > 0])
    steps = np.diff(levels, prepend=0.0)
    reached = [_chance(len(scores), int((scores >= level).sum()), k) for level in levels]
    return float(np.dot(steps, reached)) if len(levels) else _chance(len(scores), 0, k)


def all_of_k(scores: Sequence[float], k: int) -> float:
    """pass^k, the expected worst score of k samples: all of them pass (Yao et al. 2024, tau-bench).

    For scores of 0 and 1 it is C(c, k) / C(n, k).
    """
    return 1.0 - pass_at_k(1.0 - _floats(scores), k)


def best_of_k(scores: Sequence[float], values: Sequence[float], k: int) -> float:
    """The expected score of that one of k samples to which a scorer gives the largest value.

    Samples with equal values are chosen from at random. NaN is less than every other value.
    """
    scores, values = _floats(scores), _floats(values)
    values = np.where(np.isnan(values), -np.inf, values)
    expected, before = 0.0, 0.0
    for value in np.unique(values)[::-1]:
        up_to = _chance(len(scores), int((values >= value).sum()), k)
        expected += (up_to - before) * float(scores[values == value].mean())
        before = up_to
    return expected


def majority_at_k(answers: Sequence[str | None], scores: Sequence[float], k: int) -> float:
    """maj@k: the expected score of the most frequent answer of k samples (Wang et al. 2023).

    The expectation is exact, over all subsets of k samples; answers with equally many votes share
    the score. A sample without an answer (None) has no vote; if none has one, the score is 0. The
    score of an answer is the mean over its samples.

    Raises:
      ValueError: k is not from 1 to n, or n is more than MAX_VOTES.
    """
    if not 1 <= k <= len(scores) <= MAX_VOTES:
        raise ValueError(f'k is {k} of {len(scores)} samples, but must be from 1 to {MAX_VOTES}')
    votes = defaultdict(list)
    for answer, score in zip(answers, scores, strict=True):
        if answer is not None:
            votes[answer].append(float(score))
    classes = sorted((len(each), sum(each) / len(each)) for each in votes.values())
    silent = len(scores) - sum(count for count, _ in classes)
    return _majority(tuple(classes), silent, k)


@functools.lru_cache(1 << 14)
def _majority(classes: tuple[tuple[int, float], ...], silent: int, k: int) -> float:
    """Sums over m, the votes of the winning answers.

    Subsets are counted by their size and by how many answers tie at m; beside each count lies the
    sum of the scores of the tied ones.
    """
    total = 0.0
    for m in range(1, min(k, max((count for count, _ in classes), default=0)) + 1):
        # Any number of those that cannot reach m votes may be in the subset.
        free = silent + sum(count for count, _ in classes if count < m)
        others = _floats([math.comb(free, j) for j in range(k + 1)])
        total += _ties(others, [each for each in classes if each[0] >= m], m, k)
    return total / math.comb(silent + sum(count for count, _ in classes), k)


def _ties(others: np.ndarray, classes: list[tuple[int, float]], m: int, k: int) -> float:
    """The sum, over the subsets of k in which m votes win, of the mean score of the winners."""
    ways, sums = np.zeros((k // m + 1, k + 1)), np.zeros((k // m + 1, k + 1))
    ways[0] = others
    for count, score in classes:
        fewer = _floats([math.comb(count, j) for j in range(m)])
        win = float(math.comb(count, m))
        new_ways = _times(ways, fewer)
        new_sums = _times(sums, fewer)
        new_ways[1:, m:] += win * ways[:-1, : k + 1 - m]
        new_sums[1:, m:] += win * (sums[:-1, : k + 1 - m] + score * ways[:-1, : k + 1 - m])
        ways, sums = new_ways, new_sums
    return float(sum(sums[ties, k] / ties for ties in range(1, k // m + 1)))


def _times(rows: np.ndarray, polynomial: np.ndarray) -> np.ndarray:
    """Each row times the polynomial, up to the row's own degree."""
    result = np.zeros_like(rows)
    for power, factor in enumerate(polynomial):
        result[:, power:] += factor * rows[:, : rows.shape[1] - power]
    return result


def powers(n: int) -> list[int]:
    """1, 2, 4, ... and n: the numbers of samples of a curve."""
    return sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n})


def exp(value: float) -> float:
    """e to this power; inf where a float cannot hold it."""
    return math.exp(value) if value < 700 else math.inf

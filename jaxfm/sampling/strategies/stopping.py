"""When a vote may stop early: with which lead, so that the vote of all n would rarely differ.

The n answers come in random order, whatever they are. After k of them, an answer that does not win
in the end leads the later winner by d or more with a probability that the counts of a random subset
(multivariate hypergeometric) give exactly. A lead is enough if this probability, for the worst n
answers there could be, is within what delta leaves for this look. So the bound
P(the early answer is not the vote of all n) <= delta holds for every model and every problem, not
on average over a prior.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np

from jaxfm.sampling.strategies.replay import tally


def rounds_of(n: int, adaptive: str) -> tuple[int, ...]:
    """The numbers of samples after which a vote looks: 2, 4, 8 ... n, or all from 2 to n."""
    if adaptive == 'off' or n == 1:
        return (n,)
    if adaptive == 'one':
        return tuple(range(2, n + 1))
    doubled = [2**i for i in range(1, n.bit_length()) if 2**i < n]
    return (*doubled, n)


class Rule:
    """Decides whether a vote is settled.

    Args:
      rounds: as from `rounds_of`.
      delta: most probability to stop with another answer than the vote of all n.
      is_weighted: votes have weights in [0, 1]; then only certainty stops.
    """

    def __init__(self, rounds: Sequence[int], delta: float, is_weighted: bool = False):
        self.rounds, self._n = tuple(rounds), rounds[-1]
        looks = self.rounds[:-1]
        if is_weighted or delta == 0:
            self._leads = {}
        else:
            self._leads = dict(zip(looks, enough_leads(self._n, looks, delta)))

    def is_settled(
        self, answers: Sequence[str | None], weights: Sequence[float | None] | None = None
    ) -> bool:
        """Whether the answers so far, None where there is none, decide the vote."""
        first, second = sorted([*tally(answers, weights).values(), 0, 0], reverse=True)[:2]
        left = self._n - len(answers)
        lead = first - second
        return left <= 0 or lead > left or lead >= self._leads.get(len(answers), math.inf)


@functools.lru_cache(maxsize=64)
def enough_leads(n: int, looks: tuple[int, ...], delta: float) -> tuple[int, ...]:
    """The least sufficient lead over the second answer at each look."""
    leads, left = [], delta
    for i, k in enumerate(looks):
        errors = error_of_leads(n, k)
        share = left / (len(looks) - i)  # what a look does not use, the later ones may
        lead = next((d for d in range(1, k + 1) if errors[d] <= share), k + 1)
        left -= errors[lead] if lead <= k else 0.0
        leads.append(lead)
    return tuple(leads)


def error_of_leads(n: int, k: int) -> np.ndarray:
    """[k + 1]: bounds P(a wrong answer leads the winner of all n by d or more after k), for each d.

    With y votes for the winner and x <= y for another answer this is P(a - b >= d) of the counts in
    a random subset. Of n - y votes there are at most (n - y) / x such answers, so the sum over them
    is at most (n - y) times the worst P / x.
    """
    choose = _log_choose(n)
    most = np.zeros(k + 1)
    for y in range(1, n + 1):
        x = np.arange(1, min(y, n - y) + 1)
        if len(x):
            worst = (_lead_tails(choose, n, k, x, y) / x[:, None]).max(axis=0)
            most = np.maximum(most, (n - y) * worst)
    return np.minimum(most, 1.0)


def _lead_tails(choose: np.ndarray, n: int, k: int, x: np.ndarray, y: int) -> np.ndarray:
    """[X, k + 1]: P(a - b >= d), if k of n are drawn, of which x and y are of the two kinds."""
    a, b = np.arange(k + 1)[:, None], np.arange(min(y, k) + 1)
    a = a[: min(int(x[-1]), k) + 1]
    rest = k - a - b
    logs = choose[x][:, a] + choose[y, b]
    logs = logs + choose[(n - x - y)[:, None, None], np.maximum(rest, 0)] - choose[n, k]
    chance = np.where(rest >= 0, np.exp(logs), 0.0)
    lead = np.broadcast_to(np.maximum(a - b, 0), chance.shape[1:])
    at = lead + (k + 1) * np.arange(len(x))[:, None, None]
    sums = np.bincount(at.ravel(), chance.ravel(), minlength=len(x) * (k + 1))
    return np.cumsum(sums.reshape(len(x), k + 1)[:, ::-1], axis=1)[:, ::-1]


def _log_choose(n: int) -> np.ndarray:
    """[n + 1, n + 1]: log of the binomial coefficients, -inf where there is none."""
    logs = np.array([math.lgamma(i + 1) for i in range(n + 1)])
    i, j = np.arange(n + 1)[:, None], np.arange(n + 1)
    return np.where(j <= i, logs[:, None] - logs - logs[np.maximum(i - j, 0)], -np.inf)

"""Adaptive stopping: the early answer rarely differs from the vote of all, whatever the answers."""

import collections
import itertools
import math
import random

import pytest

from jaxfm.sampling.strategies import replay
from jaxfm.sampling.strategies.stopping import Rule, enough_leads, error_of_leads, rounds_of


def early(rule, answers):
    """-> (samples taken, the answer)."""
    records = [{'answer': answer} for answer in answers]
    n, chosen = replay.adaptive_vote(records, rule.rounds, rule.is_settled)
    return n, None if chosen is None else answers[chosen]


def full(answers):
    chosen = replay.winner(answers)
    return None if chosen is None else answers[chosen]


POPULATIONS = {  # probability of each answer; None: no answer
    'even': {'a': 0.5, 'b': 0.5},
    'close': {'a': 0.52, 'b': 0.48},
    'clear': {'a': 0.8, 'b': 0.15, 'c': 0.05},
    'long tail': {'a': 0.3, **{f'x{i}': 0.05 for i in range(14)}},
    'many': {f'x{i}': 1 / 6 for i in range(6)},
    'pairs': {f'x{i}': 1 / 30 for i in range(30)},
    'often none': {None: 0.7, 'a': 0.18, 'b': 0.12},
}


@pytest.mark.parametrize('adaptive, n', [('doubling', 16), ('doubling', 64), ('one', 16)])
@pytest.mark.parametrize('delta', [0.05, 0.2])
def test_stopping_early_disagrees_with_the_full_vote_at_most_delta_of_the_time(adaptive, n, delta):
    rule, draw, trials = Rule(rounds_of(n, adaptive), delta), random.Random(0), 400
    taken = collections.Counter()
    for name, population in POPULATIONS.items():
        wrong = 0
        for _ in range(trials):
            answers = draw.choices(list(population), population.values(), k=n)
            count, answer = early(rule, answers)
            wrong += answer != full(answers)
            taken[name] += count / trials
        # Three standard deviations of the estimate above delta would be a proof against it.
        assert wrong / trials <= delta + 3 * math.sqrt(delta * (1 - delta) / trials), name
    assert taken['clear'] < 0.75 * n  # it does save something


def partitions(total, largest):
    if not total:
        yield ()
    for first in range(min(total, largest), 0, -1):
        for rest in partitions(total - first, first):
            yield (first, *rest)


@pytest.mark.parametrize('looks', [(2, 4), (3,), (2, 3, 4, 5)])
@pytest.mark.parametrize('delta', [0.1, 0.3, 0.5])
def test_the_bound_holds_exactly_for_every_multiset_of_six_answers(looks, delta):
    """In all orders, with ties and with samples without an answer."""
    rule, n = Rule((*looks, 6), delta), 6
    for size in range(1, n + 1):
        for counts in partitions(size, size):
            kinds = [*enumerate(counts), (None, n - size)]
            answers = [kind for kind, count in kinds for _ in range(count)]
            orders = set(itertools.permutations(answers))
            wrong = sum(early(rule, order)[1] != full(order) for order in orders)
            assert wrong <= delta * len(orders), counts


@pytest.mark.parametrize('n, adaptive', [(16, 'doubling'), (64, 'doubling'), (24, 'one')])
@pytest.mark.parametrize('delta', [0.05, 0.3])
def test_the_errors_of_all_looks_are_within_delta_together(n, adaptive, delta):
    looks = rounds_of(n, adaptive)[:-1]
    leads = enough_leads(n, looks, delta)
    errors = [error_of_leads(n, k)[d] for k, d in zip(looks, leads) if d <= k]
    assert 0.2 * delta < sum(errors) <= delta


def test_many_rare_answers_make_a_lead_likely():
    """Fifteen answers twice each: some pair is soon complete, and the winner not seen yet."""
    n, k = 30, 8
    unseen = math.comb(28, 8) / math.comb(n, k)
    pair = 1 - math.comb(14, 8) * 2**8 / math.comb(28, 8)  # among the 14 others
    assert error_of_leads(n, k)[2] >= unseen * pair > 0.2


def test_the_error_of_a_lead_is_that_of_two_even_answers_for_large_leads():
    """n = 10, k = 4: five votes each; all four are of the wrong one with C(5, 4) / C(10, 4)."""
    errors = error_of_leads(10, 4)
    assert errors[4] == pytest.approx(math.comb(5, 4) / math.comb(10, 4))
    assert errors[0] == 1 and list(errors) == sorted(errors, reverse=True)


def test_a_lead_that_the_others_cannot_catch_up_is_always_enough():
    rule = Rule((4, 8), 0.0)
    assert not rule.is_settled(['a'] * 4)  # four others could make a tie
    assert Rule((5, 8), 0.0).is_settled(['a'] * 5)
    assert rule.is_settled(['a'] * 8) and rule.is_settled([None] * 8)
    assert not rule.is_settled([None] * 4)


def test_weighted_votes_stop_only_when_the_others_could_not_change_them():
    rule = Rule((2, 4, 6, 8), 0.2, is_weighted=True)
    assert not rule.is_settled(['a'] * 4, [1.0] * 4)
    assert not rule.is_settled(['a'] * 6, [0.33] * 6)
    assert rule.is_settled(['a'] * 6, [0.34] * 6)
    assert not rule.is_settled(['a'] * 6, [0.34] * 5 + [None])


def test_rounds_double_or_grow_by_one():
    assert rounds_of(12, 'doubling') == (2, 4, 8, 12)
    assert rounds_of(8, 'doubling') == (2, 4, 8)
    assert rounds_of(4, 'one') == (2, 3, 4)
    assert rounds_of(4, 'off') == (4,)
    assert rounds_of(1, 'one') == rounds_of(1, 'doubling') == (1,)
    assert rounds_of(2, 'doubling') == (2,)


def test_a_smaller_delta_asks_for_larger_leads():
    strict, loose = (enough_leads(32, (8, 16), delta) for delta in (0.01, 0.2))
    assert all(a > b for a, b in zip(strict, loose))

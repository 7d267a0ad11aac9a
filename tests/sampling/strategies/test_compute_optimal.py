"""A strategy for each difficulty: the estimate, the samples that are shared, the allocation."""

import itertools
import random

import pytest

from jaxfm.config.validation import validate
from jaxfm.errors import ConfigError
from jaxfm.sampling.strategies import ComputeOptimalConfig, StrategyConfig
from jaxfm.sampling.strategies.base import Call, Outcome, Sample, Wait
from jaxfm.sampling.strategies.compute_optimal import Trial, agreement, allocate
from tests.sampling.strategies.conftest import config_of, problems

HERE = __name__
VOTES = [
    dict(at_least=1.0, strategy=dict(name='vote', n=3)),
    dict(strategy=dict(name='vote', n=7)),
]


class Judge:
    """All answers to an even question are equal, those to an odd one nearly never."""

    def answer(self, prompt, text):
        return 'yes' if int(prompt[1:]) % 2 == 0 else text

    def reward(self, prompt, text):
        return 1.0 if int(prompt[1:]) % 2 == 0 else 0.0


class Catching:
    """Begins with samples of another kind, and handles what an action raises."""

    Config = StrategyConfig

    def __init__(self, config, context):
        pass

    def run(self, problem):
        try:
            yield Call(int, (('x',),))
        except ValueError as error:
            raised = str(error)
        branches = yield Sample(2, options={'max_tokens': 2})
        yield Wait(branches)
        return Outcome(branches, answer=raised)


def test_the_level_follows_the_agreement_of_the_first_samples(run):
    config = config_of('compute_optimal', first=3, levels=VOTES)
    outcomes = run(config, problems(6), Judge())
    for number, outcome in enumerate(outcomes.values()):
        is_easy = number % 2 == 0
        assert outcome.record == [
            {'confidence': 1.0 if is_easy else pytest.approx(1 / 3), 'level': 0 if is_easy else 1}
        ]
        assert len(outcome.samples) == (3 if is_easy else 7)


@pytest.mark.parametrize('early', [{}, {'adaptive': 'one', 'delta': 0.0}], ids=['off', 'one'])
def test_a_strategy_begins_with_the_samples_that_are_there(run, early):
    """So nothing is sampled twice, and the vote is that of the strategy alone."""
    vote = dict(name='vote', n=7, **early)
    config = config_of('compute_optimal', first=3, levels=[dict(strategy=vote)])
    found = run.one(config, problems(2)[1:], Judge())
    alone = run.one(config_of(**vote), problems(2)[1:], Judge())
    assert [s.tokens for s in found.samples] == [s.tokens for s in alone.samples]
    assert (found.chosen, found.answer) == (alone.chosen, alone.answer)
    assert found.entry.decoded_tokens == alone.entry.decoded_tokens
    assert found.entry.calls == alone.entry.calls + 3  # the estimate parses its answers


def test_fewer_samples_than_are_there_and_scores_ask_for_no_more(run):
    levels = [dict(strategy=dict(name='best_of_n', n=2))]
    found = run.one(config_of('compute_optimal', first=3, levels=levels), problems(), Judge())
    alone = run.one(config_of('best_of_n', n=2), problems(), Judge())
    assert [s.tokens for s in found.samples[:2]] == [s.tokens for s in alone.samples]
    assert (found.scores, found.answers) == ([*alone.scores, None], [*alone.answers, None])
    assert len(found.samples) == 3 and found.chosen == alone.chosen
    assert found.entry.decoded_tokens > alone.entry.decoded_tokens  # the third one is paid for


def test_other_samples_are_its_own_and_what_actions_raise_reaches_it(run):
    levels = [dict(strategy=dict(name=f'{HERE}:Catching'))]
    found = run.one(config_of('compute_optimal', first=3, levels=levels), problems(), Judge())
    assert [len(sample.tokens) for sample in found.samples] == [2, 2, 12, 12, 12]
    assert [sample.sample_index for sample in found.samples] == [3, 4, 0, 1, 2]
    assert 'invalid literal' in found.answer
    assert found.entry.decoded_tokens == 3 * 12 + 4


def test_a_scorer_takes_the_place_of_the_agreement(run):
    levels = [dict(at_least=0.5, strategy=dict(name='best_of_n', n=1)), *VOTES[1:]]
    config = config_of('compute_optimal', first=2, levels=levels, scorer=dict(name='reward'))
    outcomes = run(config, problems(2), Judge())
    assert [one.record[0]['confidence'] for one in outcomes.values()] == [1.0, 0.0]
    assert [len(one.samples) for one in outcomes.values()] == [2, 7]


def test_a_budget_that_ends_the_first_samples_gives_the_last_level(run):
    config = config_of(
        'compute_optimal', first=3, levels=VOTES, scorer=dict(name='reward'), budget={'tokens': 20}
    )
    outcome = run.one(config, problems(), Judge())
    assert outcome.entry.decoded_tokens <= 20
    assert 'budget' in [sample.finish_reason for sample in outcome.samples]


def test_turns_go_on_after_an_interruption(run):
    refinement = dict(name='refinement', max_turns=3, before='a', after='b', checker=CHECKER)
    config = config_of('compute_optimal', first=2, levels=[dict(strategy=refinement)])
    tasks = problems(max_tokens=4)
    whole = run.one(config, tasks, Judge())
    assert len(whole.record) == 4 and whole.record[0].keys() == {'confidence', 'level'}
    rest = [type(tasks[0])(**vars(tasks[0]) | {'record': whole.record[:2]})]
    again = run.one(config, rest, Judge())
    assert again.record == whole.record
    assert [s.tokens for s in again.samples] == [s.tokens for s in whole.samples]


CHECKER = dict(name='reward', at_least=2.0, feedback='abc')


def test_agreement_counts_what_has_no_answer():
    assert agreement(['a', None, 'a', 'b']) == 0.5
    assert agreement([None, None]) == 0


@pytest.mark.parametrize(
    'values, sentence',
    [
        ({}, 'levels'),
        (dict(levels=[]), 'levels'),
        (dict(levels=VOTES[:1]), 'the last level is for all others: leave at_least out'),
        (dict(levels=[*VOTES[1:], *VOTES[1:]]), 'only the last level is for all others'),
        (dict(levels=[*VOTES[:1], *VOTES]), '1 is not less than 1, of the level before'),
        (
            dict(levels=[dict(strategy=dict(name='vote', budget=dict(tokens=5)))]),
            'a level has no budget of its own',
        ),
        (dict(levels=[dict(strategy=dict(name='vot'))]), 'vote'),
    ],
)
def test_mistakes_in_levels_are_named(values, sentence):
    given = dict(name='compute_optimal', **values)
    problems = validate(ComputeOptimalConfig, given)[1]
    assert any(sentence in str(problem) for problem in problems), problems


def test_without_answers_a_scorer_is_needed(run):
    with pytest.raises(ConfigError, match='no answers that could agree: set scorer'):
        run(config_of('compute_optimal', levels=[dict(strategy=dict(name='best_of_n'))]), [])
    with pytest.raises(ConfigError, match='no answers to vote on'):
        config = config_of('compute_optimal', levels=VOTES, scorer=dict(name='logprob'))
        run(config, [])


def test_the_allocation_is_the_best_of_all():
    """Against every choice there is."""
    rng = random.Random(0)
    for bounds in ([], [0.5], [0.9, 0.4], [0.75, 0.5, 0.25]):
        for limit in (2.0, 3.0, 4.5, 9.0):
            confidences = [rng.choice([None, 0.0, 0.25, 0.5, 0.75, 1.0]) for _ in range(40)]
            trials = [
                [Trial(float(rng.random() < 0.3 + 0.1 * c), c + rng.random()) for c in range(1, 5)]
                for _ in confidences
            ]
            level = [
                next((i for i, b in enumerate(bounds) if c is not None and c >= b), len(bounds))
                for c in confidences
            ]

            def total(choice, level=level, trials=trials):
                rows = [row[choice[at]] for at, row in zip(level, trials)]
                return sum(t.score for t in rows), sum(t.tokens for t in rows) / len(rows)

            every = map(total, itertools.product(range(4), repeat=len(bounds) + 1))
            expected = max(score for score, tokens in every if tokens <= limit)
            score, tokens = total(allocate(confidences, trials, bounds, limit))
            assert score == expected and tokens <= limit


def test_a_level_that_nothing_reached_gets_what_follows_it():
    trials = [[Trial(0.0, 1.0), Trial(1.0, 2.0)]] * 3
    assert allocate([0.1, 0.2, 0.0], trials, [0.9, 0.5], 2.0) == [1, 1, 1]
    assert allocate([1.0, 1.0, 1.0], trials, [0.9, 0.5], 2.0) == [1, 0, 0]


@pytest.mark.parametrize(
    'arguments, sentence',
    [
        (([], [], [], 1.0), '0 problems with trials'),
        (([0.5], [[Trial(1, 5)]], [0.2, 0.4], 9.0), 'must fall'),
        (([0.5], [[Trial(1, 5)]], [], 4.0), 'the cheapest choice costs 5, not 4'),
    ],
)
def test_an_impossible_allocation_is_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        allocate(*arguments)

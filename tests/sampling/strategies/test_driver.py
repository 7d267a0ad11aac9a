"""The driver: problems share a batch, fail alone, and stay within budgets that count everything."""

import dataclasses
import re
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm.errors import ConfigError, StorageError
from jaxfm.plan.flops import model_flops_per_token
from jaxfm.sampling.complete import complete
from jaxfm.sampling.request import Request
from jaxfm.sampling.strategies import ScorerConfig, StrategyConfig, driver, scorers
from jaxfm.sampling.strategies.base import (
    Call,
    Cancel,
    Context,
    Extend,
    Fork,
    Note,
    Outcome,
    OverBudget,
    Problem,
    Sample,
    Score,
    Wait,
)
from tests.sampling.conftest import CONFIG
from tests.sampling.strategies.conftest import PROMPT, config_of, problems


class Mine:
    """Runs the generator function of a test."""

    Config = StrategyConfig
    solve = None

    def __init__(self, config, context):
        self.context = context

    def run(self, problem):
        return type(self).solve(problem)


@pytest.fixture
def mine(monkeypatch):
    """(generator function, keys) -> the config of a strategy that runs it."""

    def make(solve, **values):
        monkeypatch.setattr(Mine, 'solve', staticmethod(solve))
        return config_of(f'{__name__}:Mine', **values)

    return make


def tokens_of(outcome):
    return [sample.tokens for sample in outcome.samples]


def plain(problem):
    branches = yield Sample(3)
    yield Wait(branches)
    return Outcome(branches)


def test_samples_are_those_of_plain_requests(run, mine):
    outcomes = run(mine(plain), problems(5))
    for problem in problems(5):
        request = Request('r', problem.tokens, n=3, **problem.options)
        [expected] = complete(run.sampler, [request], run.sampler._params, 0).values()
        assert tokens_of(outcomes[problem.id]) == [sample.tokens for sample in expected]
        assert [s.text for s in outcomes[problem.id].samples] == [s.text for s in expected]


def test_no_problem_waits_for_another(run, mine):
    """The call of the first problem returns only when the second one has ended."""
    ended, waited = threading.Event(), []

    def solve(problem):
        branches = yield Sample()
        if problem.id == 'p0':
            waited.extend((yield Call(ended.wait, ((20,),))))
        yield Wait(branches)
        if problem.id == 'p1':
            ended.set()
        return Outcome(branches)

    outcomes = run(mine(solve), problems(2))
    assert all(outcome.error is None for outcome in outcomes.values())
    assert waited == [True]  # False: it waited 20 seconds for nothing


def test_a_fork_has_noise_of_its_own(run, mine):
    def solve(problem):
        [branch] = yield Sample()
        yield Wait([branch], 'news')
        forks = yield Fork(branch, 3)
        yield Wait([branch, *forks])
        later = yield Fork(branch, 2, options={'max_tokens': 8})
        yield Wait(later)
        return Outcome([branch, *forks, *later])

    outcome = run.one(mine(solve), problems())
    # Forks of what runs compute nothing, and of what has ended only what is behind its pages.
    assert outcome.entry.prefill_tokens == 7 + 3
    texts = [tuple(tokens) for tokens in tokens_of(outcome)]
    assert len({text[:3] for text in texts}) == 1  # what it had when it was copied
    assert len({text[3:12] for text in texts[:4]}) == 4
    assert texts[4][:12] == texts[5][:12] == texts[0] and texts[4] != texts[5]
    assert len({sample.sample_index for sample in outcome.samples}) == 6


@pytest.mark.parametrize('until', ['news', 'all'])
def test_a_branch_goes_on_from_given_ids_as_from_a_prompt(run, mine, until):
    """Running and ended branches, and penalties that count over all of the completion."""
    given, options = [50, 51, 52], {'frequency_penalty': 1.5, 'presence_penalty': 0.5}

    def solve(problem):
        [branch] = yield Sample(options={'max_tokens': 6})
        yield Wait([branch], until)
        start = len(branch.tokens)
        yield Extend(branch, given, {'max_tokens': 7})
        yield Wait([branch])
        yield Note({'start': start})
        return Outcome([branch])

    outcome = run.one(mine(solve), problems(**options))
    [sample], start = outcome.samples, outcome.record[0]['start']
    assert 0 < start <= 6 and sample.forced == [(start, start + 3)]
    assert sample.tokens[start : start + 3] == given and len(sample.tokens) == start + 10
    assert sample.logprobs[start : start + 3] == [0.0] * 3
    sampler, [problem] = run.sampler, problems(max_tokens=7, **options)
    ids = [*problem.tokens, *sample.tokens[: start + 3]]
    request = Request('r', ids, **problem.options)
    sampler.lend(sampler._params, sampler.version + 1)  # nothing to share
    sampler.add(request, num_prompt=len(problem.tokens))
    events = []
    while sampler.has_work:
        events += sampler.step()
    assert sample.tokens[start + 3 :] == [token for event in events for token in event.tokens]
    logprobs = [logprob for event in events for logprob in event.logprobs]
    np.testing.assert_allclose(sample.logprobs[start + 3 :], logprobs, rtol=0, atol=1e-4)


@pytest.mark.parametrize('until', ['news', 'all'])
def test_a_branch_that_gets_no_ids_goes_on_as_if_nothing_had_happened(run, mine, until):
    """Penalties, too, count over all that it has sampled."""
    options = {'frequency_penalty': 2.0, 'presence_penalty': 2.0, 'allowed_ids': range(12)}

    def solve(problem):
        branches = yield Sample(2, options={'max_tokens': 6})
        yield Wait(branches, until)
        for branch in branches:
            yield Extend(branch, (), {'max_tokens': 12 - len(branch.tokens)})
        yield Wait(branches)
        return Outcome(branches)

    tasks = problems(**options)
    expected = run.one(config_of('best_of_n', n=2), tasks)
    assert tokens_of(run.one(mine(solve), tasks)) == tokens_of(expected)


def test_ids_that_were_taken_back_leave_no_trace(run, mine):
    def solve(problem):
        [branch] = yield Sample()
        yield Wait([branch])
        yield Extend(branch, [7], {'max_tokens': 4}, keep=5)
        yield Wait([branch])
        return Outcome([branch])

    outcome = run.one(mine(solve), problems())
    [sample] = outcome.samples
    assert len(sample.tokens) == len(sample.logprobs) == 10 and sample.tokens[5] == 7
    assert outcome.entry.decoded_tokens == 12 + 4


def test_logprobs_of_given_ids_are_those_of_the_model(run, mine, score):
    ids = [8, 30, 2, 44]

    def solve(problem):
        everything = yield Score(ids)
        rest = yield Score(ids, start=2)
        yield Note({'all': everything, 'rest': rest})
        return Outcome([])

    [problem] = problems()
    outcome = run.one(mine(solve), [problem])
    expected = score(problem.tokens, ids)[0]
    np.testing.assert_allclose(outcome.record[0]['all'], expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(outcome.record[0]['rest'], expected[2:], rtol=0, atol=1e-4)
    assert outcome.entry.score_tokens == 6 and outcome.entry.decoded_tokens == 0
    # The second time it shares the whole pages before what it scores.
    assert (outcome.entry.prefill_tokens, outcome.entry.shared_tokens) == (11 + 3, 8)


def raises(*_):
    raise ZeroDivisionError('no luck')


def exits(*_):
    raise SystemExit(3)


def hangs(*_):
    time.sleep(30)


def failing(reason):
    def solve(problem):
        branches = yield Sample(4)
        yield Wait(branches, 'news')
        if problem.id != 'p1':
            yield Wait(branches)
        elif reason == 'itself':
            raise KeyError('lost')
        elif reason == 'no action':
            yield 'sample'
        elif reason == 'a loop':
            while True:
                yield Note({})
        elif reason == 'no outcome':
            return [1]
        elif reason == 'no such sample':
            return Outcome(branches, chosen=7)
        elif reason == 'too long':
            yield Sample(options={'max_tokens': 50})
        else:
            yield Call({'raises': raises, 'exits': exits, 'hangs': hangs}[reason], ((),))
        return Outcome(branches)

    return solve


@pytest.mark.parametrize(
    'reason, message',
    [
        ('itself', "KeyError: 'lost'"),
        ('no action', "the strategy yields 'sample', which is no action"),
        ('a loop', 'yields 10000 actions and waits for none'),
        ('no outcome', 'the strategy returns [1], but no Outcome'),
        ('no such sample', 'chosen is 7, but there are 4'),
        ('too long', '8 prompt + 50 new tokens = 58 exceed sampling.max_length 40'),
        ('raises', 'ZeroDivisionError: no luck'),
        ('exits', 'RuntimeError: SystemExit: 3'),
        ('hangs', 'TimeoutError: hangs took longer than 0.05 s'),
    ],
)
def test_a_problem_fails_alone_with_its_reason(run, mine, reason, message):
    told, start = [], time.monotonic()
    config = mine(failing(reason), call_seconds=0.05)
    outcomes = run(config, problems(3), on_outcome=lambda id, outcome: told.append(id))
    assert time.monotonic() - start < 10  # nobody waits for what hangs
    assert message in outcomes['p1'].error
    assert len(outcomes['p1'].samples) >= 4 and outcomes['p1'].entry.decoded_tokens > 0
    for id in ('p0', 'p2'):
        assert outcomes[id].error is None
        assert [len(tokens) for tokens in tokens_of(outcomes[id])] == [12] * 4
    assert sorted(told) == ['p0', 'p1', 'p2']


@pytest.mark.parametrize(
    'solve, message',
    [
        (lambda problem: Outcome([]), 'gives Outcome(.*), but must be a generator'),
        (lambda problem: raises(), 'ZeroDivisionError: no luck'),
    ],
)
def test_a_strategy_that_is_no_generator_fails_its_problem(run, mine, solve, message):
    assert re.search(message, run(mine(solve), problems(1))['p0'].error)


def test_an_interrupted_driver_leaves_the_sampler_empty(run, mine):
    def solve(problem):
        branches = yield Sample(4)
        yield Wait(branches, 'news')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(mine(solve), problems(3))
    assert not run.sampler.has_work


def test_a_budget_of_tokens_counts_cancelled_ones(run, mine):
    """Each sample is cancelled as soon as it tells something; 20 tokens are soon spent."""

    def solve(problem):
        branches = []
        for _ in range(20):
            [branch] = yield Sample()
            branches.append(branch)
            yield Wait([branch], 'news')
            if branch.finish_reason == 'budget':
                break
            yield Cancel(branch)
        return Outcome(branches)

    outcome = run.one(mine(solve, budget={'tokens': 20}), problems())
    reasons = [sample.finish_reason for sample in outcome.samples]
    assert reasons[-1] == 'budget' and set(reasons[:-1]) <= {'cancelled'}
    assert outcome.entry.decoded_tokens <= 20
    assert sum(map(len, tokens_of(outcome))) <= 20 and len(reasons) < 20


@pytest.mark.parametrize('tokens, lengths', [(36, [12, 12, 12]), (30, [12, 12, 6]), (5, [5, 0, 0])])
def test_a_budget_of_tokens_is_spent_in_order_and_never_exceeded(run, mine, tokens, lengths):
    outcome = run.one(mine(plain, budget={'tokens': tokens}), problems())
    assert list(map(len, tokens_of(outcome))) == lengths
    cut = [sample.finish_reason == 'budget' for sample in outcome.samples]
    assert cut == [length < 12 for length in lengths]
    assert outcome.entry.decoded_tokens == min(tokens, 36)


def test_what_a_short_sample_leaves_goes_to_the_next(run, mine):
    """The first sample stops early, so the third one has room after all."""

    def solve(problem):
        short = yield Sample(options={'max_tokens': 12, 'stop_ids': frozenset(range(60))})
        others = yield Sample(2)
        yield Wait([*short, *others])
        return Outcome([*short, *others])

    outcome = run.one(mine(solve, budget={'tokens': 25}), problems())
    assert list(map(len, tokens_of(outcome))) == [1, 12, 12]


def quadratic(length):
    return 100.0 * length + length * length


def test_flops_are_those_of_each_token_behind_the_others(run, mine):
    def solve(problem):
        branches = yield Sample()
        yield Wait(branches)
        return Outcome(branches)

    price = {'prompt': 1e6, 'generated': 3e6}
    outcome = run.one(mine(solve, price=price), problems(), flops=quadratic)
    assert outcome.entry.flops == quadratic(7 + 12)  # the last token is not read
    assert outcome.entry.dollars == 7 + 3 * 12


def test_flops_are_counted_as_in_training(run, mine):
    """A third of what the train step costs; half of the square of causal attention."""

    def flops(length):
        return length * model_flops_per_token(CONFIG, length) / 3

    outcome = run.one(mine(plain), problems(), flops=flops)
    expected = flops(7) + 3 * (flops(19) - flops(7))
    assert outcome.entry.prefill_tokens == 7
    assert outcome.entry.flops == pytest.approx(expected)


@pytest.mark.parametrize('limit', [2000, 3000, 5000, 9000])
def test_a_budget_of_flops_is_not_exceeded(run, mine, limit):
    outcome = run.one(mine(plain, budget={'flops': limit}), problems(), flops=quadratic)
    assert limit - 1.1 * (quadratic(20) - quadratic(19)) < outcome.entry.flops <= limit or (
        limit == 9000 and list(map(len, tokens_of(outcome))) == [12] * 3
    )


def test_a_budget_of_seconds_cancels_what_runs_and_begins_nothing(run, mine):
    outcome = run.one(mine(plain, budget={'seconds': 1e-9}), problems())
    assert [sample.finish_reason for sample in outcome.samples] == ['budget'] * 3
    assert 0 < outcome.entry.decoded_tokens <= 9
    assert outcome.entry.seconds > 0


def test_calls_and_scores_respect_the_budget(run, mine):
    def solve(problem):
        for action in (Score([1] * 7), Call(raises, ((),))):
            try:
                yield action
            except (OverBudget, ZeroDivisionError) as error:
                yield Note({'error': type(error).__name__})
        return Outcome([])

    outcome = run.one(mine(solve, budget={'tokens': 6}), problems())
    assert [note['error'] for note in outcome.record] == ['OverBudget', 'ZeroDivisionError']
    assert outcome.entry.calls == 1 and outcome.entry.prefill_tokens == 0


def test_a_judge_ends_samples_whose_answer_is_decided(run):
    class Judge:
        def answer(self, prompt, text):
            return text[:1]

        def stop(self, prompt, text):
            return len(text) >= 2

    outcome = run.one(config_of('vote', n=3), problems(), Judge())
    assert all(2 <= len(sample.text) <= 6 for sample in outcome.samples)
    assert [sample.finish_reason for sample in outcome.samples] == [None] * 3


def test_what_makes_no_sense_is_refused(run, mine, monkeypatch):
    [problem] = problems()
    with pytest.raises(ValueError, match='same id'):
        run(mine(plain), [problem, problem])
    with pytest.raises(ConfigError, match='budget.flops is set'):
        run(mine(plain, budget={'flops': 1.0}), [problem])
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    with pytest.raises(ConfigError, match='one process, but this run has 2'):
        run(mine(plain), [problem])


def test_a_sample_that_the_model_fails_has_no_answer_and_no_score(run, mine, params):
    """Token 7 has a NaN embedding, and one sample is made to read it."""

    class Judge:
        def answer(self, prompt, text):
            return 'x'

    def solve(problem):
        branches = [*(yield Sample(2)), *(yield Sample(tokens=[7]))]
        yield Wait(branches)
        config = ScorerConfig(name='half')
        found = yield from scorers.scores(lambda *_: 0.5, config, problem, branches)
        parsed = yield from scorers.answers(Context(Judge()), problem, branches)
        return Outcome(branches, found, parsed)

    table = jnp.asarray(params['embedding/table']).at[7].set(jnp.nan)
    broken = params | {'embedding/table': table}
    tasks = problems(logit_bias={7: -np.inf})
    outcome = driver.run(run.sampler, mine(solve), tasks, broken, 5)['p0']
    assert outcome.error is None
    assert [sample.finish_reason for sample in outcome.samples] == ['length', 'length', 'error']
    assert outcome.answers == ['x', 'x', None] and outcome.scores == [0.5, 0.5, None]


def test_what_a_callback_raises_is_not_blamed_on_a_strategy(run, mine):
    def full(id, value):
        raise StorageError('the disk is full')

    def solve(problem):
        branches = yield Sample()
        yield Note({'begun': 1})
        yield Wait(branches)
        return Outcome(branches)

    with pytest.raises(StorageError, match='the disk is full'):
        run(mine(solve), problems(3), on_record=full)
    assert not run.sampler.has_work


def test_likeliest_tokens_stay_beside_their_tokens(run, mine):
    def solve(problem):
        [branch] = yield Sample(tokens=[5, 6], options={'max_tokens': 3})
        yield Wait([branch])
        yield Extend(branch, [7], {'max_tokens': 2})
        yield Wait([branch])
        return Outcome([branch])

    [sample] = run.one(mine(solve), problems(top_logprobs=2)).samples
    assert [len(top) for top in sample.top_logprobs] == [0, 0, 2, 2, 2, 0, 2, 2]
    assert len(sample.tokens) == 8


def test_a_bad_problem_fails_and_the_others_go_on(run, mine):
    bad = [
        Problem('long', [1] * 39, {'max_tokens': 12}),
        Problem('ids', [99], {'max_tokens': 12}),
        Problem('option', PROMPT, {'max_tokens': 12, 'top_p': 2.0}),
    ]
    outcomes = run(mine(plain), [*bad, *problems(1)])
    assert 'exceed sampling.max_length' in outcomes['long'].error
    assert '99' in outcomes['ids'].error and 'top_p is 2.0' in outcomes['option'].error
    assert outcomes['p0'].error is None


def test_more_problems_than_the_batch_holds_begin_when_there_is_room(run, mine):
    running, most = set(), []

    def solve(problem):
        running.add(problem.id)
        most.append(len(running))
        yield Wait((yield Sample()))
        running.remove(problem.id)
        return Outcome([])

    outcomes = run(mine(solve), problems(30))
    assert list(outcomes) == [f'p{i}' for i in range(30)]
    assert max(most) <= 2 * run.sampler.config.slots


def test_an_outcome_has_the_entry_of_its_problem_alone(run, mine):
    def solve(problem):
        branches = yield Sample(int(problem.id[1:]) + 1)
        yield Wait(branches)
        return Outcome(branches)

    outcomes = run(mine(solve), problems(4))
    for i, outcome in enumerate(outcomes.values()):
        assert outcome.entry.decoded_tokens == 12 * (i + 1)
        assert dataclasses.astuple(outcome.entry)[5] > 0

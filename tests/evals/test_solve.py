"""An evaluator with a strategy: one record for each problem, with all that it cost."""

import json

import jax
import pytest

from jaxfm.config.validation import validate
from jaxfm.errors import ConfigError, DataError
from jaxfm.evals import GenerateConfig, ThinkingConfig, prompts
from jaxfm.evals.generate import Generate
from jaxfm.evals.samples import read_samples
from jaxfm.registry import Registry
from jaxfm.sampling.strategies import (
    BeamSearchConfig,
    BestOfNConfig,
    BudgetConfig,
    BudgetForcingConfig,
    ComputeOptimalConfig,
    LogprobConfig,
    RewardConfig,
    VoteConfig,
    replay,
)
from jaxfm.sampling.strategies.stopping import Rule, rounds_of
from jaxfm.tasks import PythonFunctionsConfig
from jaxfm.tasks.base import Prompt, Task
from tests.evals.scoring import Chat, context_of, entry
from tests.sampling.conftest import new_sampler, one_device, params  # noqa: F401
from tests.sampling.strategies.conftest import Letters

pytestmark = pytest.mark.usefixtures('quick_compilation')
STRATEGY = VoteConfig(n=6)
RULE = Rule(rounds_of(6, 'one'), 0.3)


class Text(Letters):
    """The strategies' tokenizer, with what evaluators ask of one."""

    eos_id = bos_id = None


class NoStops(Chat):
    stop_ids = frozenset()


class FirstLetter(Task):
    """The answer is whether the first letter is small; 'small' is right."""

    fails = ''

    def __init__(self, config, documents):
        pass

    def prompts(self):
        return [
            Prompt(f'q{i}', text) for i, text in enumerate(('abcdefgh', 'bcdefgha', 'cdefghab'))
        ]

    def answer(self, prompt, completion):
        if prompt.id == self.fails:
            raise OSError('no disk')
        return None if completion[:1].isdigit() else 'small' if completion[:1].islower() else 'big'

    def evaluate(self, prompt, completion):
        return float(self.answer(prompt, completion) == 'small')


class NoAnswers(FirstLetter):
    answer = Task.answer


@pytest.fixture(scope='module')
def sampler(params, one_device):  # noqa: F811
    return new_sampler(params, one_device, Text())


@pytest.fixture
def solve(sampler, params, one_device, monkeypatch):  # noqa: F811
    """(directory, changes of the config) -> metrics, records."""

    def solve(directory, task=FirstLetter, goes_on=False, **changes):
        monkeypatch.setattr(prompts, 'TASKS', Registry({'python_functions': entry(task)}))
        context = context_of(sampler, directory, goes_on, Text())
        context = type(context)(**vars(context) | {'chat': NoStops})
        words = dict(task=PythonFunctionsConfig(), strategy=STRATEGY, max_tokens=6)
        evaluator = Generate(GenerateConfig(**words | dict(temperature=1.0) | changes), context)
        sampler.lend(params, sampler.version + 1)
        values = evaluator.run(params, sampler.version)
        [path] = directory.iterdir()
        # A record is written when its problem is solved, so their order is that of threads.
        return values, sorted(read_samples(path)[1], key=lambda record: record['id'])

    with jax.set_mesh(one_device):
        yield solve


def test_each_problem_has_one_record_with_its_samples_and_its_cost(solve, sampler, tmp_path):
    before = sampler.counters
    values, records = solve(tmp_path)
    after = sampler.counters
    assert [record['id'] for record in records] == ['q0', 'q1', 'q2']
    for record in records:
        chosen = record['samples'][record['chosen']]
        votes = [sample['answer'] for sample in record['samples']]
        assert len(votes) == 6 and votes.count(record['answer']) == max(map(votes.count, votes))
        for name in ('completion', 'tokens', 'score', 'answer', 'logprob'):
            assert record[name] == chosen[name]
        assert record['score'] == (record['answer'] == 'small')
    assert values['pass@1'] == sum(record['score'] for record in records) / 3
    assert values['strategy/samples'] == 6
    right = [any(sample['score'] for sample in record['samples']) for record in records]
    assert values['strategy/oracle'] == sum(right) / 3
    for name, counter in {
        'cost/generated_tokens': 'decoded_tokens',
        'cost/prompt_tokens': 'prefill_tokens',
        'cost/shared_tokens': 'shared_tokens',
    }.items():
        assert values[name] == getattr(after, counter) - getattr(before, counter)
    assert values['cost/verifier_calls'] == 18  # a parser's call for each sample
    assert values['cost/flops'] > 0


def test_an_interrupted_evaluation_solves_only_what_is_left(solve, sampler, tmp_path):
    whole, records = solve(tmp_path / 'a')
    step = sampler.version
    [path] = (tmp_path / 'a').iterdir()
    lines = path.read_text(encoding='utf-8').splitlines(keepends=True)
    rest = tmp_path / 'b' / path.name.replace(f'{step:06d}', f'{step + 1:06d}')
    rest.parent.mkdir()
    kept = ''.join(lines[:2]).replace(f'"step": {step}', f'"step": {step + 1}')
    rest.write_text(kept + lines[2][:20], encoding='utf-8')
    before = sampler.counters.decoded_tokens
    again, found = solve(rest.parent, goes_on=True)
    assert [record['tokens'] for record in found] == [record['tokens'] for record in records]
    assert again['pass@1'] == whole['pass@1']
    assert again['cost/generated_tokens'] == whole['cost/generated_tokens']
    first = json.loads(lines[1])['id']
    new = sum(one['ledger']['decoded_tokens'] for one in found if one['id'] != first)
    assert sampler.counters.decoded_tokens - before == new


def test_a_problem_whose_judge_raises_scores_0_and_the_others_go_on(solve, tmp_path, monkeypatch):
    monkeypatch.setattr(FirstLetter, 'fails', 'q1')
    values, records = solve(tmp_path)
    records = {record['id']: record for record in records}
    failed = records['q1']
    assert (failed['score'], failed['finish_reason']) == (0.0, 'error')
    assert 'no disk' in failed['error']
    assert not records['q0']['error'] and not records['q2']['error']
    assert values['strategy/failed'] == pytest.approx(1 / 3)
    # The engine failed none of the samples, but six of them could not be judged.
    assert (values['samples/failed'], values['samples/unjudged']) == pytest.approx((0, 1 / 3))


@pytest.mark.parametrize(
    'fault, told',
    [(OSError('no disk'), 'no disk'), (1.5, 'the score is 1.5, but must be a number')],
)
def test_a_chosen_answer_that_cannot_be_judged_is_told(
    solve, tmp_path, monkeypatch, caplog, fault, told
):
    def evaluate(self, prompt, completion):
        if prompt.id != 'q1':
            return 1.0
        if isinstance(fault, Exception):
            raise fault
        return fault

    monkeypatch.setattr(FirstLetter, 'evaluate', evaluate)
    values, records = solve(tmp_path)
    assert [record['score'] for record in records] == [1.0, 0.0, 1.0]
    assert told in records[1]['error'] and records[1]['finish_reason'] != 'error'
    assert not records[0]['error'] and not records[2]['error']
    unjudged = [bool(sample['error']) for record in records for sample in record['samples']]
    assert unjudged == [False] * 6 + [True] * 6 + [False] * 6
    assert values['samples/unjudged'] == pytest.approx(1 / 3)
    [warning] = [each.getMessage() for each in caplog.records]
    assert 'could not be judged and score 0; the first (q1)' in warning and told in warning


def test_a_budget_is_kept_and_told(solve, tmp_path):
    values, records = solve(tmp_path, strategy=VoteConfig(n=6, budget=BudgetConfig(tokens=20)))
    assert all(record['ledger']['decoded_tokens'] <= 20 for record in records)
    assert any(one['is_truncated'] for record in records for one in record['samples'])
    assert values['cost/generated_tokens'] <= 60


def test_shares_of_samples_are_of_all_samples_not_of_those_chosen(solve, tmp_path):
    """No sample ends its thoughts, so the vote chooses none of them."""
    thinking = ThinkingConfig(begun=True, end='none')
    values, records = solve(tmp_path, strategy=VoteConfig(n=2), thinking=thinking)
    assert [record['chosen'] for record in records] == [None] * 3
    assert (values['samples/unclosed_thinking'], values['samples/truncated']) == (1.0, 1.0)
    assert values['samples/unparsed'] == 1.0
    values, records = solve(tmp_path / 'best', strategy=BestOfNConfig(n=3))
    samples = [sample for record in records for sample in record['samples']]
    unparsed = [sample['answer'] is None for sample in samples]
    assert values['samples/unparsed'] == pytest.approx(sum(unparsed) / 9) and any(unparsed)
    chosen = [record['answer'] is None for record in records]
    assert sum(unparsed) / 9 != sum(chosen) / 3


def test_samples_are_those_begun_not_only_those_kept(solve, tmp_path):
    beams = BeamSearchConfig(width=2, expansions=3, step_tokens=2, max_steps=3)
    values, records = solve(tmp_path, strategy=beams)
    assert [len(record['samples']) for record in records] == [2] * 3
    # Six beginnings of two tokens, then three copies of each of two beams, for each further step.
    steps = [record['ledger']['decoded_tokens'] / 12 for record in records]
    assert values['strategy/samples'] == pytest.approx(6 * sum(steps) / 3) and max(steps) == 3
    values, _ = solve(tmp_path / 'spent', strategy=VoteConfig(n=6, budget=BudgetConfig(tokens=12)))
    assert values['strategy/samples'] == 2  # there was no budget for the others


@pytest.mark.parametrize(
    'n, strategy, offline',
    [
        (3, BestOfNConfig(), lambda found: replay.best_of_n(found, 3, replay.mean_logprob)),
        (
            6,
            BestOfNConfig(scorer=LogprobConfig(mean=False)),
            lambda found: replay.best_of_n(found, 6, 'logprob'),
        ),
        (6, BestOfNConfig(scorer=RewardConfig()), lambda found: replay.best_of_n(found, 6)),
        (4, VoteConfig(), lambda found: replay.vote(found, 4)),
        (
            6,
            VoteConfig(weights=LogprobConfig()),
            lambda found: replay.vote(found, 6, replay.probability),
        ),
        (
            6,
            VoteConfig(adaptive='one', delta=0.3),
            lambda found: replay.adaptive_vote(found, RULE.rounds, RULE.is_settled)[1],
        ),
    ],
    ids=['mean', 'sum', 'reward', 'vote', 'weighted', 'adaptive'],
)
def test_a_file_of_samples_replays_what_a_strategy_chooses(solve, tmp_path, n, strategy, offline):
    _, stored = solve(tmp_path / 'plain', strategy=None, n=6)
    _, online = solve(tmp_path / 'online', strategy=strategy.model_copy(update={'n': n}))
    chosen = [offline(samples) for samples in replay.by_problem(stored).values()]
    assert chosen == [record['chosen'] for record in online] and any(chosen)
    # What the strategy wrote replays, too, with the values of its own scorer.
    again = [replay.by_problem([record])[record['id']] for record in online]
    if isinstance(strategy, BestOfNConfig):
        assert [replay.best_of_n(samples, n, 'value') for samples in again] == chosen
    else:
        key = None if strategy.weights is None else 'value'
        assert [replay.vote(samples, n, key) for samples in again] == chosen


def test_thoughts_that_a_special_token_ends_are_not_judged(solve, tmp_path):
    """The tokenizer's </think> has no text."""
    asked = []

    class Noting(FirstLetter):
        def answer(self, prompt, completion):
            asked.append(completion)
            return super().answer(prompt, completion)

    forced = BudgetForcingConfig(max_think=5, answer_tokens=3, wait='y')
    thinking = ThinkingConfig(begun=True)
    values, records = solve(tmp_path, Noting, strategy=forced, thinking=thinking, max_tokens=96)
    assert values['samples/unclosed_thinking'] == 0.0
    for record in records:
        [sample] = record['samples']
        rest = record['tokens'][sample['tokens'].index(59) + 1 :]
        assert len(rest) == 3 and Text().decode(rest) in asked
        assert record['completion'] not in asked and record['answer'] == sample['answer']


def test_best_of_n_needs_no_answers_but_a_vote_does(solve, tmp_path):
    _, records = solve(tmp_path, task=NoAnswers, strategy=BestOfNConfig(n=3))
    for record in records:
        assert record['scores'][record['chosen']] == max(record['scores'])
    with pytest.raises(ConfigError, match='the task has no answers to vote on'):
        solve(tmp_path / 'vote', task=NoAnswers)
    levels = dict(name='compute_optimal', levels=[dict(strategy=dict(name='best_of_n'))])
    [config, _] = validate(ComputeOptimalConfig, levels)
    with pytest.raises(ConfigError, match='no answers that could agree: set scorer'):
        solve(tmp_path / 'optimal', task=NoAnswers, strategy=config)


def test_a_strategy_whose_samples_do_not_fit_is_refused_with_its_keys(solve, sampler, tmp_path):
    assert sampler.longest == 40  # and prompts have 8 tokens
    told = '8 prompt .*max_length 40; config.evals.quiz.strategy .*needs max_think {} [+] closing'
    for config in (BudgetForcingConfig(), BudgetForcingConfig(max_think=28, answer_tokens=4)):
        with pytest.raises(DataError, match=told.format(config.max_think)):
            solve(tmp_path, strategy=config, max_tokens=96)
    level = dict(strategy=dict(name='budget_forcing'))
    config, _ = validate(ComputeOptimalConfig, dict(name='compute_optimal', levels=[level]))
    with pytest.raises(DataError, match=told.format(1024)):
        solve(tmp_path, strategy=config)
    with pytest.raises(DataError, match='8 prompt [+] 33 new tokens = 41 exceed .* 40$'):
        solve(tmp_path, max_tokens=33)
    # Every token of the room can be used, whatever max_tokens would need.
    config = BudgetForcingConfig(max_think=27, answer_tokens=4)
    values, records = solve(tmp_path, strategy=config, max_tokens=96)
    assert values['strategy/failed'] == 0 and all(len(r['tokens']) <= 32 for r in records)


def test_max_tokens_is_refused_where_the_strategy_does_not_read_it():
    given = dict(task=dict(name='python_functions'), strategy=dict(name='budget_forcing'))
    assert not validate(GenerateConfig, given)[1]
    [problem] = validate(GenerateConfig, given | dict(max_tokens=50))[1]
    assert 'max_tokens 50 would do nothing: strategy budget_forcing' in str(problem)
    assert not validate(GenerateConfig, given | dict(strategy=dict(name='vote'), max_tokens=50))[1]


def test_n_belongs_to_the_strategy():
    given = dict(task=dict(name='python_functions'), strategy=dict(name='vote'))
    assert not validate(GenerateConfig, given)[1]
    [problem] = validate(GenerateConfig, given | dict(n=4))[1]
    assert 'set strategy.n instead' in str(problem)

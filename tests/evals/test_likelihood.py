"""Choices by log-likelihood: which tokens count, the scores, and what is computed once."""

import dataclasses
import math

import numpy as np
import pytest

from jaxfm.errors import DataError
from jaxfm.evals import LikelihoodConfig, prompts
from jaxfm.evals.choice import score_choices
from jaxfm.evals.likelihood import Likelihood
from jaxfm.evals.prompts import pair_ids
from jaxfm.evals.samples import read_samples
from jaxfm.registry import Registry
from jaxfm.tasks import PythonFunctionsConfig
from jaxfm.tasks.base import Choice, Prompt, Task
from tests.evals.scoring import Engine, Tokenizer, context_of, entry, total

IDS = Tokenizer().encode


def question(id, context, texts, right=0, **more):
    pairs = tuple((context, text) for text in texts)
    return Choice(id, context, pairs=pairs, right=(right,), unconditional='A:', **more)


class Quiz(Task):
    """Three questions with common examples, of two groups."""

    questions = [
        question('a', 'xy: one?', [' yes', ' no', ' maybe'], group='first'),
        question('b', 'xy: two?', [' yes', ' no'], right=1, group='second'),
        question('c', 'xy: one?', [' up', ' down'], group='second'),
    ]

    def __init__(self, config, documents):
        pass

    def prompts(self):
        return list(self.questions)


@pytest.fixture(autouse=True)
def _quiz(monkeypatch):
    monkeypatch.setattr(prompts, 'TASKS', Registry({'python_functions': entry(Quiz)}))


def evaluator(engine, *args, **changes):
    changes, options = dict(changes), {}
    for name in ('goes_on', 'tokenizer'):
        if name in changes:
            options[name] = changes.pop(name)
    config = LikelihoodConfig(task=PythonFunctionsConfig(), **changes)
    return Likelihood(config, context_of(engine, *args, **options))


def by_hand(one):
    """-> sums of log-probs of the continuations, and the same after 'A:'."""
    context = one.pairs[0][0]
    after = [total(IDS(context + text), len(IDS(context))) for _, text in one.pairs]
    alone = [total(IDS('A:' + text), 2) for _, text in one.pairs]
    return after, alone


def test_a_continuation_has_the_tokens_that_the_text_has_behind_the_context():
    """White space at the end of the context goes over to the continuation."""
    context = context_of(Engine())
    assert pair_ids('ab ', 'cd', context) == (IDS('ab'), IDS(' cd'))
    assert pair_ids('ab', ' cd', context) == (IDS('ab'), IDS(' cd'))
    assert pair_ids('', 'cd', context) == ([0], IDS('cd'))
    tokenizer = Tokenizer()
    tokenizer.bos_id = 7
    context = context_of(Engine(), tokenizer=tokenizer)
    assert pair_ids('ab', ' cd', context) == ([7, *IDS('ab')], IDS(' cd'))
    assert pair_ids('', 'cd', context) == ([7], IDS('cd'))


def test_exactly_the_tokens_of_the_continuation_count(tmp_path):
    """A continuation that is shifted by one token has another sum."""
    evaluator(Engine(), tmp_path).run('weights', 3)
    records = {record['id']: record for record in read_samples(next(tmp_path.iterdir()))[1]}
    for one in Quiz.questions:
        after, alone = by_hand(one)
        assert records[one.id]['logprobs'] == pytest.approx(after)
        assert records[one.id]['unconditional'] == pytest.approx(alone)
        context, text = one.pairs[0]
        shifted = total(IDS(context + text), len(IDS(context)) - 1)
        assert after[0] != pytest.approx(shifted, abs=0.05)


def test_scores_of_all_questions_have_intervals_and_groups():
    values = evaluator(Engine()).run('weights', 3)
    scores = []
    for one in Quiz.questions:
        after, alone = by_hand(one)
        sizes = [len(text.strip()) for _, text in one.pairs]
        scores.append(score_choices(after, alone, sizes, one.right))
    for name, key in {
        'accuracy': 'score',
        'accuracy_per_byte': 'score_per_byte',
        'accuracy_unconditional': 'score_unconditional',
        'probability': 'probability',
    }.items():
        each = [one[key] for one in scores]
        assert values[name] == pytest.approx(np.mean(each))
        assert values[f'{name}_low'] <= values[name] <= values[f'{name}_high']
    assert values['accuracy/second'] == np.mean([one['score'] for one in scores[1:]])
    assert values['chance'] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    assert (values['prompts'], values['samples/failed']) == (3.0, 0.0)


def test_each_norm_can_choose_differently():
    """Raw -1.5 > -2 > -3; per byte -2/8; without the question -3 gains most."""
    scores = score_choices([-1.5, -2.0, -3.0], [-1.0, -2.0, -9.0], [1, 8, 3], right=[0])
    assert (scores['score'], scores['score_per_byte'], scores['score_unconditional']) == (1, 0, 0)
    assert score_choices([-1.5, -2.0], [-1.0, -2.0], [1, 8], [1])['score_per_byte'] == 1
    two = score_choices([-1.5, -2.0, -3.0], [-1.0, -2.0, -9.0], [1, 8, 3], right=[1, 2])
    odds = [math.exp(x) for x in (-1.5, -2.0, -3.0)]
    assert two['probability'] == pytest.approx(sum(odds[1:]) / sum(odds))
    assert two['score_unconditional'] == 1
    assert score_choices([-900.0, -950.0], [0.0, 0.0], [1, 1], [0])['probability'] == 1.0


def test_a_single_pair_is_greedy_accuracy_and_perplexity(monkeypatch):
    """The engine's greedy tokens are capitals."""
    questions = [question('a', 'xy', [' ABC']), question('b', 'xy', [' AbC'])]
    monkeypatch.setattr(Quiz, 'questions', questions)
    values = evaluator(Engine()).run('weights', 3)
    assert values['greedy_accuracy'] == 0.5
    nats = [-by_hand(one)[0][0] for one in questions]
    assert values['perplexity'] == pytest.approx(math.exp(np.mean(nats)))
    assert values['perplexity_low'] < values['perplexity'] < values['perplexity_high']
    assert 'accuracy' not in values


def test_requests_with_a_common_prefix_follow_one_another_and_equal_ones_are_scored_once():
    engine = Engine()
    evaluator(engine).run('weights', 3)
    asked = [tuple(request.tokens) for request in engine.added]
    assert len(asked) == len(set(asked)) == 7 + 5  # ' yes' and ' no' alone are shared
    alone = [ids for ids in asked if ids[:2] == tuple(IDS('A:'))]
    assert asked[: len(alone) - 3] == [tuple(IDS('A: no')), tuple(IDS('A: yes'))]
    rest = asked[2:]
    assert rest == sorted(rest)
    assert engine.longest == 8  # of one slot; a big task is not in memory at once


def test_an_interrupted_evaluation_scores_only_what_is_missing(tmp_path):
    whole = evaluator(Engine(), tmp_path / 'whole', goes_on=True).run('weights', 3)
    engine = Engine()
    first = evaluator(engine, tmp_path / 'killed', goes_on=True)
    engine.step = _dying(engine, after=9)
    with pytest.raises(KeyboardInterrupt):
        first.run('weights', 3)
    kept = read_samples(next((tmp_path / 'killed').iterdir()))[1]
    assert 0 < len(kept) < 3 and not engine.waiting
    again = Engine()
    assert evaluator(again, tmp_path / 'killed', goes_on=True).run('weights', 3) == whole
    assert len(again.added) < 12
    last = Engine()
    assert evaluator(last, tmp_path / 'killed', goes_on=True).run('weights', 3) == whole
    assert not last.added


def test_a_corrected_label_is_another_evaluation(tmp_path, monkeypatch):
    """Otherwise scores under both labels would be mixed."""
    evaluator(Engine(), tmp_path, goes_on=True).run('weights', 3)
    first, *others = Quiz.questions
    for change in ({'right': (1,)}, {'group': 'second'}, {'unconditional': 'B:'}):
        monkeypatch.setattr(Quiz, 'questions', [dataclasses.replace(first, **change), *others])
        with pytest.raises(DataError, match='samples of another evaluation: subject is'):
            evaluator(Engine(), tmp_path, goes_on=True).open(3)


def _dying(engine, after):
    steps = []

    def step():
        steps.append(1)
        if len(steps) > after:
            raise KeyboardInterrupt
        return Engine.step(engine)

    return step


def test_a_question_that_fails_is_counted_and_told(caplog):
    engine = Engine(fails=[ord('w')])  # of 'two' and 'down'
    values = evaluator(engine).run('weights', 3)
    assert values['samples/failed'] == pytest.approx(2 / 3)
    assert '2 of 3 questions failed and score 0; the first (b): the model gives' in caplog.text
    assert values['accuracy/second'] == 0.0


def test_a_chat_renders_its_messages_before_the_choices(monkeypatch):
    turns = ({'role': 'user', 'content': 'one?'},)
    asked = question('a', 'raw', ['yes', 'no'], messages=turns)
    monkeypatch.setattr(Quiz, 'questions', [asked])
    engine = Engine()
    evaluator(engine)
    assert [request.tokens for request in engine.checked[:2]] == [IDS('one?|yes'), IDS('one?|no')]
    assert engine.checked[0].prompt_logprobs_from == 5


def test_prompts_without_choices_and_empty_continuations_are_refused(monkeypatch):
    monkeypatch.setattr(Quiz, 'questions', [Prompt('a', 'b')])
    with pytest.raises(DataError, match='python_functions have no choices .*; use name=generate'):
        evaluator(Engine())
    monkeypatch.setattr(Quiz, 'questions', [question('a', 'b', [' x', ''])])
    with pytest.raises(DataError, match='choice 1 of a adds no token to its context'):
        evaluator(Engine())


def test_clusters_of_a_group_widen_the_interval(monkeypatch):
    """All questions of a group have one score."""

    def asked(group, number):
        return question(f'{group}{number}', f'{group}?', [' a', ' b'], group=group)

    monkeypatch.setattr(Quiz, 'questions', [asked(g, n) for g in 'abcdefgh' for n in range(5)])
    separate = evaluator(Engine()).run('weights', 3)
    clustered = evaluator(Engine(), cluster_by_group=True).run('weights', 3)
    assert separate['accuracy'] == clustered['accuracy']
    assert clustered['accuracy_low'] < separate['accuracy_low'] - 0.05


def test_costs_count_a_context_once():
    """The context of a question, and 'A:', before which no question stands."""
    values = evaluator(Engine()).run('weights', 3)
    groups = [(len(IDS(one.text)), [text for _, text in one.pairs]) for one in Quiz.questions]
    groups.append((len(IDS('A:')), [' yes', ' no', ' maybe', ' up', ' down']))
    tokens, flops = 0, 0
    for context, texts in groups:
        sizes = [len(IDS(text)) for text in texts]
        tokens += context + sum(sizes)
        flops += context**2 + sum((context + size) ** 2 - context**2 for size in sizes)
    assert (values['cost/prompt_tokens'], values['cost/flops']) == (tokens, flops)

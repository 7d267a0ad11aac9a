"""Sampling-based evaluation with a scripted task and a scripted engine."""

import json
import types

import pytest

from jaxfm.errors import DataError
from jaxfm.evals import GenerateConfig, generate
from jaxfm.evals.base import Context, wilson_interval
from jaxfm.evals.generate import Generate
from jaxfm.registry import Registry
from jaxfm.sampling import SamplingConfig
from jaxfm.sampling.request import Event
from jaxfm.tasks import PythonFunctionsConfig
from jaxfm.tasks.base import Prompt

EOS = 0


class Tokenizer:
    """Letters are their own ids."""

    eos_id = EOS

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode(self, ids):
        return ''.join(map(chr, ids))


class Chat:
    """A chat template that renders the messages in capitals."""

    stop_ids = frozenset([EOS, ord('|')])

    def prompt(self, messages, tools=()):
        return Tokenizer().encode(''.join(message['content'] for message in messages).upper())


class Task:
    """Scores 1 for a completion with an x; stops at the first dot."""

    texts = {'a': 'abc', 'b': 'bc', 'c': 'c'}

    def __init__(self, config, documents):
        self.documents = documents

    def prompts(self):
        return [Prompt(id, text) for id, text in self.texts.items()]

    def evaluate(self, prompt, completion):
        assert self.texts[prompt.id] == prompt.text
        return float('x' in completion)

    def stop(self, prompt, completion):
        return '.' in completion


class Engine:
    """Answers prompts from a script, two tokens per step; a request ends with its script."""

    script = {'abc': 'oxo\0', 'bc': 'oo.ooooox', 'c': 'oo'}

    def __init__(self):
        self.config = SamplingConfig()
        self.lent, self.checked, self.running, self.seen = None, [], {}, []

    def lend(self, params, version):
        self.lent = params, version

    def check(self, request):
        self.checked.append(request)
        if len(request.tokens) + request.max_tokens > 20:
            raise DataError('too long')

    def add(self, request):
        self.seen.append((request.id, *self.lent))
        self.running[request.id] = self.script[''.join(map(chr, request.tokens))]

    def cancel(self, id):
        del self.running[id]

    @property
    def has_work(self):
        return bool(self.running)

    def step(self):
        events = []
        for id, rest in list(self.running.items()):
            now, self.running[id] = rest[:2], rest[2:]
            reason = None if self.running[id] else 'stop' if '\0' in now else 'length'
            if reason:
                del self.running[id]
            events.append(Event(id, [ord(x) for x in now], [0.0] * 2, [0.0] * 2, reason))
        return events


@pytest.fixture
def engine(monkeypatch):
    entry = types.SimpleNamespace(load=lambda: Task)
    monkeypatch.setattr(generate, 'TASKS', Registry({'python_functions': entry}))
    return Engine()


def evaluator(engine, directory=None, **changes):
    dataset = types.SimpleNamespace(
        tokenizer=Tokenizer(), heldout_documents=['documents'], chat=Chat()
    )
    context = Context(
        name='functions',
        merge=None,
        dataset=dataset,
        sampler=engine,
        mesh=None,
        seed=11,
        samples_directory=directory,
    )
    config = GenerateConfig(**{'task': PythonFunctionsConfig(), 'max_tokens': 12, **changes})
    return Generate(config, context)


def test_the_share_that_passes_comes_with_its_interval(engine):
    values = evaluator(engine).run('weights', 5)
    low, high = wilson_interval(1, 3)
    assert values == {'pass@1': 1 / 3, 'pass@1_low': low, 'pass@1_high': high, 'prompts': 3.0}


def test_requests_follow_the_config_and_are_checked_before_anything_runs(engine):
    evaluator(engine, temperature=0.5, max_tokens=7)
    assert [request.id for request in engine.checked] == ['a', 'b', 'c']
    for request in engine.checked:
        assert (request.max_tokens, request.temperature, request.seed) == (7, 0.5, 11)
        assert request.stop_ids == Chat.stop_ids
        assert request.tokens == Tokenizer().encode(Task.texts[request.id])
    with pytest.raises(DataError, match='too long'):
        evaluator(engine, max_tokens=18)
    assert engine.seen == []


def test_chats_use_the_template_and_groups_are_scored_separately(engine, monkeypatch):
    def prompts(self):
        turns = {id: ({'role': 'user', 'content': text},) for id, text in self.texts.items()}
        return [Prompt(id, '', turns[id], group='odd' if id == 'b' else 'even') for id in turns]

    monkeypatch.setattr(Task, 'prompts', prompts)
    monkeypatch.setattr(Task, 'evaluate', lambda self, prompt, completion: float('x' in completion))
    monkeypatch.setattr(Engine, 'script', {'ABC': 'oxo|', 'BC': 'oo', 'C': 'x\0'})
    generate = evaluator(engine)
    assert generate._text([Event('a', [ord(x) for x in 'ox|'], [], [], 'stop')]) == 'ox'
    values = generate.run('weights', 0)
    assert values['pass@1'] == 2 / 3
    assert values['pass@1/even'] == 1.0
    assert values['pass@1/odd'] == 0.0


def test_prompt_texts_are_available_for_the_contamination_search(engine, monkeypatch):
    assert evaluator(engine).prompt_texts == ['abc', 'bc', 'c']
    turns = [{'role': 'user', 'content': 'one'}, {'role': 'user', 'content': 'two'}]
    monkeypatch.setattr(Task, 'prompts', lambda self: [Prompt('a', '', tuple(turns))])
    assert evaluator(engine).prompt_texts == ['one\ntwo']


def test_it_samples_with_the_weights_it_is_given(engine):
    generate = evaluator(engine)
    generate.run('first', 0)
    generate.run('second', 1)
    weights = [lent for _, *lent in engine.seen]
    assert weights == [['first', 0]] * 3 + [['second', 1]] * 3


def test_every_sample_is_kept_and_a_repeated_step_replaces_its_file(engine, tmp_path):
    generate = evaluator(engine, tmp_path / 'samples')
    generate.run('weights', 5)
    generate.run('weights', 5)
    generate.run('weights', 10)
    files = sorted(path.name for path in (tmp_path / 'samples').iterdir())
    assert files == ['functions-000005.jsonl', 'functions-000010.jsonl']
    lines = (tmp_path / 'samples' / files[0]).read_text().splitlines()
    first, second, third = map(json.loads, lines)
    assert first == {
        'step': 5,
        'id': 'a',
        'prompt': 'abc',
        'completion': 'oxo',  # without the end-of-text token
        'score': 1.0,
        'finish_reason': 'stop',
    }
    # Cancelled in the step that produced the dot, so the x after it was never sampled.
    assert (second['completion'], second['finish_reason']) == ('oo.o', 'judged')
    assert (third['completion'], third['finish_reason']) == ('oo', 'length')


def test_a_task_without_prompts_is_an_error(engine, monkeypatch):
    monkeypatch.setattr(Task, 'texts', {})
    with pytest.raises(DataError, match='config.evals.functions: .* no prompt'):
        evaluator(engine)

"""Sampling-based evaluation with a scripted task and a scripted engine."""

import json
import types

import pytest

from jaxfm.errors import DataError
from jaxfm.evals import GenerateConfig, generate
from jaxfm.evals.base import Context
from jaxfm.evals.generate import Generate
from jaxfm.evals.statistics import wilson_interval
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
    """Answers prompts from a script, two tokens per step; a sample ends with its script.

    A script may be one text for all samples of a prompt, or a list of texts. A sample whose script
    has an ! fails there.
    """

    script = {'abc': 'oxo\0', 'bc': 'oo.ooooox', 'c': 'oo'}

    def __init__(self):
        self.config = SamplingConfig(stop_ids=[ord('#')])
        self.lent, self.checked, self.running, self.seen = None, [], {}, []

    def lend(self, params, version):
        self.lent = params, version

    def check(self, request):
        self.checked.append(request)
        if len(request.tokens) + request.max_tokens > 20:
            raise DataError('too long')

    def add(self, request):
        self.seen.append((request.id, *self.lent))
        script = self.script[''.join(map(chr, request.tokens))]
        texts = [script] * request.n if isinstance(script, str) else script
        for index, text in enumerate(texts):
            self.running[request.id, request.sample_index + index] = text

    def cancel(self, id, sample_index):
        del self.running[id, sample_index]

    @property
    def has_work(self):
        return bool(self.running)

    def step(self):
        events = []
        for (id, index), rest in list(self.running.items()):
            now, rest = rest[:2], rest[2:]
            self.running[id, index] = rest
            reason, error = None if rest else 'length', None
            if '\0' in now:
                reason = 'stop'
            if '!' in now:
                reason, error, now = 'error', 'NaN', ''
            if reason:
                del self.running[id, index]
            ids = [ord(x) for x in now]
            text = now.removesuffix('\0')
            numbers = [0.0] * len(ids)
            event = Event(id, ids, numbers, numbers, reason, index, text=text, error=error)
            events.append(event)
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
        assert request.stop_ids == Chat.stop_ids | {ord('#')}
        assert request.tokens == Tokenizer().encode(Task.texts[request.id])
    with pytest.raises(DataError, match='too long'):
        evaluator(engine, max_tokens=18)
    assert engine.seen == []


def test_all_options_of_sampling_reach_the_requests(engine):
    given = dict(
        n=2,
        top_k=3,
        top_p=0.5,
        min_p=0.1,
        repetition_penalty=1.5,
        presence_penalty=0.25,
        frequency_penalty=-0.25,
        logit_bias={5: -2.0},
        allowed_ids=[5, 6],
        stop=['END'],
        min_tokens=3,
    )
    evaluator(engine, ignore_eos=True, **given)
    for request in engine.checked:
        assert {name: getattr(request, name) for name in given} == given
        assert request.stop_ids == {ord('#')}


def test_the_score_of_a_prompt_is_the_mean_of_its_samples(engine, monkeypatch, tmp_path):
    script = {'abc': ['oxo\0', 'oo', 'x.xxx'], 'bc': ['o', 'o', 'o'], 'c': ['x', 'x', 'x']}
    monkeypatch.setattr(Engine, 'script', script)
    values = evaluator(engine, tmp_path, n=3, temperature=1.0).run('weights', 5)
    assert values['pass@1'] == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert values['prompts'] == 3
    assert values['pass@1_low'] == wilson_interval(5 / 3, 3)[0]
    [path] = tmp_path.iterdir()
    records = [json.loads(line) for line in path.read_text('utf-8').splitlines()]
    assert [record['sample_index'] for record in records] == [0, 1, 2] * 3
    assert [record['score'] for record in records] == [1, 0, 1, 0, 0, 0, 1, 1, 1]
    assert (records[2]['completion'], records[2]['finish_reason']) == ('x.', 'judged')


def test_samples_that_fail_score_0_and_are_told_once(engine, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(Engine, 'script', {'abc': 'xx!', 'bc': '!', 'c': 'x'})
    values = evaluator(engine, tmp_path).run('weights', 5)
    assert values['pass@1'] == 1 / 3
    [record] = caplog.records
    assert record.levelname == 'WARNING'
    for words in ('step 5', 'functions', '2 of 3 samples failed', '(a)', 'NaN'):
        assert words in record.getMessage()
    [path] = tmp_path.iterdir()
    first = json.loads(path.read_text('utf-8').splitlines()[0])
    assert (first['completion'], first['score'], first['finish_reason']) == ('xx', 0, 'error')


def test_chats_use_the_template_and_groups_are_scored_separately(engine, monkeypatch):
    def prompts(self):
        turns = {id: ({'role': 'user', 'content': text},) for id, text in self.texts.items()}
        return [Prompt(id, '', turns[id], group='odd' if id == 'b' else 'even') for id in turns]

    monkeypatch.setattr(Task, 'prompts', prompts)
    monkeypatch.setattr(Task, 'evaluate', lambda self, prompt, completion: float('x' in completion))
    monkeypatch.setattr(Engine, 'script', {'ABC': 'oxo', 'BC': 'oo', 'C': 'x\0'})
    values = evaluator(engine).run('weights', 0)
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
        'sample_index': 0,
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

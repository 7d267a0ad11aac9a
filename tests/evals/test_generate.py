"""Sampling-based evaluation with a scripted task and a scripted engine."""

import re
import signal
import time
import types

import pytest

from jaxfm.errors import DataError
from jaxfm.evals import GenerateConfig, ThinkingConfig, prompts
from jaxfm.evals.base import Context
from jaxfm.evals.generate import Generate
from jaxfm.evals.samples import read_samples
from jaxfm.evals.statistics import share, wilson_interval
from jaxfm.evals.summary import by_prompt, summarize
from jaxfm.registry import Registry
from jaxfm.sampling import SamplingConfig
from jaxfm.sampling.request import Event
from jaxfm.tasks import BenchmarkConfig, PythonFunctionsConfig
from jaxfm.tasks.base import Prompt
from jaxfm.tasks.benchmark import Question

EOS = 0


class Tokenizer:
    """Letters are their own ids."""

    eos_id, bos_id = EOS, None
    special_tokens = {}

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
    monkeypatch.setattr(prompts, 'TASKS', Registry({'python_functions': entry}))
    return Engine()


def evaluator(engine, directory=None, goes_on=False, tokenizer=None, **changes):
    context = Context(
        name='functions',
        merge=None,
        dataset=types.SimpleNamespace(heldout_documents=['documents']),
        tokenizer=tokenizer or Tokenizer(),
        chat=Chat,
        sampler=engine,
        mesh=None,
        seed=11,
        flops=lambda length: length**2,
        weights=lambda step: {'name': 'run', 'step': step},
        samples_directory=directory,
        goes_on=goes_on,
    )
    config = GenerateConfig(**{'task': PythonFunctionsConfig(), 'max_tokens': 12, **changes})
    return Generate(config, context)


def records_in(path):
    """The samples of a file, by prompt and index."""
    header, records = read_samples(path)
    assert header['task']['name'] == 'python_functions'
    return sorted(records, key=lambda record: (record['id'], record['sample_index']))


def test_the_share_that_passes_comes_with_its_interval(engine):
    values = evaluator(engine).run('weights', 5)
    low, high = wilson_interval(1, 3)
    wanted = {'pass@1': 1 / 3, 'pass@1_low': low, 'pass@1_high': high, 'prompts': 3.0}
    assert {name: values[name] for name in wanted} == wanted


def test_requests_follow_the_config_and_are_checked_before_anything_runs(engine):
    evaluator(engine, temperature=0.5, max_tokens=7)
    assert [request.id for request in engine.checked] == ['a', 'b', 'c']
    assert len({request.seed for request in engine.checked}) == 3  # noise of their own
    for request in engine.checked:
        assert (request.max_tokens, request.temperature) == (7, 0.5)
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
    found = share([2 / 3, 0, 1])
    assert (values['pass@1_low'], values['pass@1_high']) == (found.low, found.high)
    assert values['avg@3'] == values['pass@1']
    [path] = tmp_path.iterdir()
    records = records_in(path)
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
    first = records_in(path)[0]
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
    first, second, third = records_in(tmp_path / 'samples' / files[0])
    assert first == {
        'task': 'python_functions',
        'group': '',
        'seed': generate._seed_of('a'),
        'answer': None,
        'is_truncated': False,
        'is_unclosed': False,
        'error': '',
        'prompt_tokens': 3,
        'num_tokens': 4,
        'logprob': 0.0,
        'tokens': [ord('o'), ord('x'), ord('o'), 0],
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


def test_more_samples_give_curves(engine, monkeypatch):
    """Two of four samples are right, and three are distinct."""
    monkeypatch.setattr(Task, 'texts', {'a': 'abc'})
    monkeypatch.setattr(Task, 'answer', lambda self, prompt, text: text or None, raising=False)
    monkeypatch.setattr(Engine, 'script', {'abc': ['x\0', 'x\0', 'oo\0', '\0']})
    values = evaluator(engine, n=4, temperature=1.0).run('weights', 5)
    assert values['pass@2'] == pytest.approx(5 / 6)
    assert values['pass^2'] == pytest.approx(1 / 6)
    assert (values['pass@4'], values['pass^4']) == (1.0, 0.0)
    # Two votes for the right answer, one for the wrong one, and one sample without an answer.
    assert values['maj@4'] == 1.0
    assert values['maj@2'] == pytest.approx((1 + 2 * 0.5 + 2 * 1 + 0) / 6)
    assert values['samples/unparsed'] == 0.25
    assert values['samples/distinct'] == 0.75
    assert 'pass@3' not in values


def test_samples_in_which_no_answer_is_found_are_told(engine, monkeypatch):
    monkeypatch.setattr(Engine, 'script', {'abc': ['oo'] * 2, 'bc': ['oo'] * 2, 'c': ['oo'] * 2})
    without = evaluator(engine, n=2, temperature=1.0).run('weights', 5)
    assert not {'samples/unparsed', 'maj@2'} & set(without)
    monkeypatch.setattr(Task, 'answer', lambda self, prompt, text: None, raising=False)
    values = evaluator(engine, n=2, temperature=1.0).run('weights', 5)
    assert (values['samples/unparsed'], values['maj@2']) == (1.0, 0.0)


def test_a_file_of_samples_replays_to_the_same_numbers(engine, monkeypatch, tmp_path):
    monkeypatch.setattr(Task, 'answer', lambda self, prompt, text: text or None, raising=False)
    script = {'abc': ['x\0', 'oo', '\0'], 'bc': ['oo!', 'o', 'x'], 'c': ['x', 'x.x', 'o']}
    monkeypatch.setattr(Engine, 'script', script)
    values = evaluator(engine, tmp_path, n=3, temperature=1.0).run('weights', 5)
    _, records = read_samples(next(tmp_path.iterdir()))
    own = dict(by_group=False, flops=lambda n: n**2, has_answers=True)
    again = summarize(by_prompt(records, 'abc', 3), 3, **own)
    assert again == values


def test_costs_are_counted(engine, monkeypatch):
    monkeypatch.setattr(Engine, 'script', {'abc': 'oxoxo', 'bc': 'oo.oo', 'c': '!'})
    values = evaluator(engine).run('weights', 5)
    assert values['cost/generated_tokens'] == 5 + 4  # the last one fails before it has any
    assert values['cost/prompt_tokens'] == 3 + 2 + 1
    assert values['cost/flops'] == 3**2 + 2**2 + 1 + (8**2 - 3**2) + (6**2 - 2**2)
    assert values['cost/verifier_calls'] == 2
    assert values['samples/truncated'] == pytest.approx(1 / 3)
    assert values['samples/failed'] == pytest.approx(1 / 3)


def test_thoughts_are_not_judged_and_an_unclosed_one_scores_empty(engine, monkeypatch):
    judged = {}

    def evaluate(self, prompt, completion):
        judged[prompt.id] = completion
        return float('x' in completion)

    monkeypatch.setattr(Task, 'evaluate', evaluate)
    script = {'abc': '<x.>oo<x>x', 'bc': '<x.>x', 'c': 'x<y>'}
    monkeypatch.setattr(Engine, 'script', script)
    marks = {'start': '<x.>', 'end': '<x>'}
    values = evaluator(engine, thinking=ThinkingConfig(**marks)).run('weights', 5)
    assert judged == {'a': 'x', 'b': '', 'c': 'x<y>'}
    assert values['samples/unclosed_thinking'] == pytest.approx(1 / 3)
    assert values['pass@1'] == pytest.approx(2 / 3)
    judged.clear()
    evaluator(engine, thinking=None).run('weights', 5)
    assert judged == {'a': '<x.>', 'b': '<x.>', 'c': 'x<y>'}  # stopped at the dot


@pytest.mark.parametrize(
    'score, told',
    [
        (float('nan'), 'the score is nan, but must be a number from 0 to 1'),
        (1.5, 'the score is 1.5'),
        ('1', "the score is '1'"),
        (ZeroDivisionError('by zero'), 'ZeroDivisionError: by zero'),
    ],
    ids=str,
)
def test_a_judge_that_fails_costs_one_sample(engine, monkeypatch, tmp_path, caplog, score, told):
    def evaluate(self, prompt, completion):
        if prompt.id == 'b' and isinstance(score, Exception):
            raise score
        return score if prompt.id == 'b' else 1.0

    monkeypatch.setattr(Task, 'evaluate', evaluate)
    values = evaluator(engine, tmp_path).run('weights', 5)
    assert values['pass@1'] == pytest.approx(2 / 3)
    assert values['samples/unjudged'] == pytest.approx(1 / 3)
    assert values['samples/failed'] == 0
    assert '1 of 3 samples could not be judged and score 0; the first (b)' in caplog.text
    assert told in caplog.text
    [path] = tmp_path.iterdir()
    assert told in records_in(path)[1]['error']


def loops(*_):
    while True:
        pass


def catches_everything(*_):
    while True:
        try:
            loops()
        except Exception:
            continue


def searches(*_):
    return float(bool(re.match('(x+x+)+y', 'x' * 100)))


def waits(*_):
    time.sleep(1000)


def swallows_alarms():
    while True:
        try:
            searches_a_little()
        except:  # noqa: E722 - the mistake of a judge that must not hang
            pass


def searches_a_little():
    for i in range(100):
        re.search('b', 'a' * i)


@pytest.mark.parametrize('hangs', [loops, catches_everything, swallows_alarms, searches, waits])
def test_a_judge_that_hangs_costs_one_sample(engine, monkeypatch, tmp_path, caplog, hangs):
    def evaluate(self, prompt, completion):
        return hangs() if prompt.id == 'b' else 1.0

    monkeypatch.setattr(Task, 'evaluate', evaluate)
    before = signal.getsignal(signal.SIGALRM)
    values = evaluator(engine, tmp_path, call_seconds=0.05).run('weights', 5)
    assert (values['pass@1'], values['samples/unjudged']) == pytest.approx((2 / 3, 1 / 3))
    told = 'TimeoutError: took longer than 0.05 s'
    assert f'could not be judged and score 0; the first (b): {told}' in caplog.text
    [path] = tmp_path.iterdir()
    assert [record['error'] for record in records_in(path)] == ['', told, '']
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_task_whose_stop_hangs_is_asked_once_for_a_prompt(engine, monkeypatch, caplog):
    asked = []

    def stop(self, prompt, completion):
        asked.append(prompt.id)
        return loops() if prompt.id == 'b' else False

    monkeypatch.setattr(Task, 'stop', stop)
    values = evaluator(engine, call_seconds=0.05).run('weights', 5)
    assert values['pass@1'] == 2 / 3  # b runs to its end, where it has an x
    assert asked.count('b') == 1
    assert 'a sample (b) that may stop early runs to its end: TimeoutError' in caplog.text


def test_a_task_whose_stop_or_answer_fails_is_told_too(engine, monkeypatch, caplog):
    def fail(self, prompt, completion):
        raise KeyError('no such thing')

    monkeypatch.setattr(Task, 'stop', fail)
    monkeypatch.setattr(Task, 'answer', fail, raising=False)
    values = evaluator(engine).run('weights', 5)
    assert (values['pass@1'], values['samples/unjudged']) == (0.0, 1.0)
    assert 'could not be judged and score 0; the first (a): KeyError' in caplog.text
    assert caplog.text.count('runs to its end: KeyError') == 1


def test_an_interrupted_evaluation_goes_on_without_sampling_again(engine, monkeypatch, tmp_path):
    script = {'abc': ['x\0', 'o\0', 'x\0'], 'bc': ['o\0'] * 3, 'c': ['ooooox\0', 'o\0', 'o\0']}
    monkeypatch.setattr(Engine, 'script', script)
    given = dict(n=3, temperature=1.0, goes_on=True)
    whole = evaluator(Engine(), tmp_path / 'whole', **given).run('weights', 5)
    first = evaluator(engine, tmp_path / 'killed', **given)

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Task, 'stop', lambda self, p, text: die() if len(text) > 3 else False)
        with pytest.raises(KeyboardInterrupt):
            first.run('weights', 5)
    [path] = (tmp_path / 'killed').iterdir()
    kept = records_in(path)
    assert 0 < len(kept) < 9
    assert not engine.running  # what was still running is cancelled
    again = Engine()
    asked = []
    monkeypatch.setattr(Engine, 'add', _noting(asked, Engine.add))
    assert evaluator(again, tmp_path / 'killed', **given).run('weights', 5) == whole
    assert len(asked) == 9 - len(kept)
    assert not set(asked) & {(one['id'], one['sample_index']) for one in kept}
    with pytest.raises(DataError, match='options.max_tokens is 12 there, but 9 now'):
        evaluator(Engine(), tmp_path / 'killed', **given, max_tokens=9).run('weights', 5)


def test_a_corrected_answer_is_another_evaluation(engine, monkeypatch, tmp_path):
    """Otherwise scores under both answers would be mixed. Equal ones go on, whatever their type."""

    class Answer:
        """Its repr has an address."""

    def answers(*gold):
        prompts = [Question(id, text, gold=gold) for id, text in Task.texts.items()]
        monkeypatch.setattr(Task, 'prompts', lambda self: prompts)
        return evaluator(engine, tmp_path, goes_on=True)

    answers('18', {'x', 'y'}, Answer()).run('weights', 5)
    with answers('18', {'y', 'x'}, Answer()).open(5) as samples:
        assert len(samples.records) == 3
    with pytest.raises(DataError, match='samples of another evaluation: subject is'):
        answers('19', {'x', 'y'}, Answer()).open(5)


def _noting(asked, add):
    """`Engine.add`, which notes the samples that it is asked for and gives each its script."""

    def noted(self, request):
        texts = self.script[''.join(map(chr, request.tokens))]
        for index in range(request.sample_index, request.sample_index + request.n):
            asked.append((request.id, index))
            self.running[request.id, index] = texts[index]

    return noted


def test_with_more_samples_those_that_are_there_stay(engine, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(Engine, 'script', {key: ['x\0'] * 4 for key in ('abc', 'bc', 'c')})
    monkeypatch.setattr(Engine, 'add', _noting(asked, Engine.add))
    evaluator(engine, tmp_path, n=2, temperature=1.0, goes_on=True).run('weights', 5)
    assert len(asked) == 6
    values = evaluator(engine, tmp_path, n=4, temperature=1.0, goes_on=True).run('weights', 5)
    assert len(asked) == 12 and values['pass^4'] == 1.0
    given = dict(temperature=1.0, goes_on=True, call_seconds=9.0)
    fewer = evaluator(engine, tmp_path, n=1, **given).run('weights', 5)
    assert len(asked) == 12 and fewer['cost/generated_tokens'] == 6.0


def test_a_text_begins_like_a_document_unless_it_is_from_the_middle_of_one(engine, monkeypatch):
    tokenizer = Tokenizer()
    tokenizer.bos_id = 99
    evaluator(engine, tokenizer=tokenizer)
    monkeypatch.setattr(Task, 'continues_documents', True, raising=False)
    evaluator(engine, tokenizer=tokenizer)
    first, *_, other = [engine.checked[0], engine.checked[-3]]
    assert first.tokens == [99, *map(ord, 'abc')] and other.tokens == [*map(ord, 'abc')]


def test_no_prompt_is_told_with_the_place_that_was_read(engine, monkeypatch):
    monkeypatch.setattr(Task, 'prompts', lambda self: [])
    with pytest.raises(DataError, match='found no prompt in the documents'):
        evaluator(engine)
    entry = types.SimpleNamespace(load=lambda: Task)
    monkeypatch.setattr(prompts, 'TASKS', Registry({'gsm8k': entry}))
    with pytest.raises(DataError, match='task gsm8k found no prompt in data/sums.jsonl'):
        evaluator(engine, task=BenchmarkConfig(name='gsm8k', path='data/sums.jsonl'))


def test_two_prompts_with_one_id_are_refused(engine, monkeypatch):
    monkeypatch.setattr(Task, 'prompts', lambda self: [Prompt('a', 'abc'), Prompt('a', 'c')])
    with pytest.raises(DataError, match='more than one prompt with the id a'):
        evaluator(engine)

"""--mode sample with a scripted engine: its requests, what it writes, and what failures do."""

import contextlib
import json
from types import SimpleNamespace

import pytest

from jaxfm.errors import DataError, NumericsError
from jaxfm.modes import sample
from jaxfm.modes.generation import requests_for, write_samples
from jaxfm.sampling import SamplingConfig
from jaxfm.sampling.request import Completion, Event
from jaxfm.tokenizer import BytesConfig
from jaxfm.tokenizer.build import build_tokenizer


@pytest.fixture(scope='module')
def tokenizer():
    return build_tokenizer(BytesConfig(chat_template='qa'), ())


def config_of(**sampling):
    return SimpleNamespace(seed=5, sampling=SamplingConfig(**sampling))


class Engine:
    """Gives every sample an x; `fails` names the prompts (by their position) for which it fails."""

    has_work = False

    def __init__(self, fails=(), refuses=()):
        self.fails, self.refuses, self.events = fails, refuses, []

    def check(self, request):
        if request.id in self.refuses:
            raise DataError(f'request {request.id}: refused')

    def lend(self, params, version):
        self.lent = params, version

    def add(self, request):
        self.has_work = True
        is_bad = request.id in self.fails
        told = dict(text='', finish_reason='error', error='NaN') if is_bad else dict(text='x')
        for index in range(request.sample_index, request.sample_index + request.n):
            event = Event(request.id, [120], [-0.5], [-0.25], 'length', index)
            self.events.append(Event(**(vars(event) | told)))

    def step(self):
        self.has_work = False
        return self.events


def run_with(config, engine=None):
    return SimpleNamespace(
        primary=True, workdir='run', config=config, sampler=lambda tokenizer, slots: engine
    )


@pytest.fixture
def run_mode(monkeypatch, tokenizer):
    """(engine, prompts, output, options of sampling) -> runs the mode."""

    def run(engine, prompts, output=None, logprobs=False, **options):
        config = config_of(**options)
        context = contextlib.nullcontext(run_with(config, engine))
        monkeypatch.setattr(sample, 'start_run', lambda *_: context)
        monkeypatch.setattr(sample, 'open_tokenizer', lambda *_: tokenizer)
        monkeypatch.setattr(sample, 'current_params', lambda run: ({}, 3))
        flags = SimpleNamespace(
            workdir='run', prompt=prompts, seed=7, output=output, logprobs=logprobs
        )
        return sample.sample(flags, config, [])

    return run


def records_in(path):
    return [json.loads(line) for line in path.read_text('utf-8').splitlines()]


def test_samples_of_several_prompts_have_noise_of_their_own(tokenizer):
    requests = requests_for(config_of(n=3), tokenizer, ['a', 'a'], 7)
    assert [(r.n, r.sample_index, r.seed) for r in requests] == [(3, 0, 7), (3, 3, 7)]
    assert requests_for(config_of(), tokenizer, ['a'])[0].seed == 5


def test_end_tokens_are_left_out_if_they_are_ignored(tokenizer):
    [request] = requests_for(config_of(stop_ids=[9]), tokenizer, ['a'])
    assert request.stop_ids == {9, tokenizer.eos_id}
    options = config_of(stop_ids=[9, tokenizer.eos_id], ignore_eos=True)
    assert requests_for(options, tokenizer, ['a'])[0].stop_ids == {9}


def test_every_sample_is_shown_and_recorded(run_mode, capsys, tmp_path):
    engine, output = Engine(), tmp_path / 'samples.jsonl'
    assert run_mode(engine, ['a', 'b'], output, n=2) == 0
    assert engine.lent == ({}, 3)
    out, error = capsys.readouterr()
    assert out == 'ax\nax\nbx\nbx\n'
    assert error.count('-' * 40 + '\n') == 4
    assert records_in(output) == [
        {'prompt': prompt, 'completion': 'x', 'sample_index': index, 'finish_reason': 'length'}
        for index, prompt in enumerate('aabb')
    ]


def test_log_probs_are_recorded_if_they_are_asked_for(run_mode, capsys, tmp_path):
    output = tmp_path / 'samples.jsonl'
    assert run_mode(Engine(), ['a'], output, logprobs=True) == 0
    [record] = records_in(output)
    assert (record['tokens'], record['logprobs']) == ([120], [-0.5])
    assert record['sampling_logprobs'] == [-0.25]
    assert '----' not in capsys.readouterr().err


def test_samples_that_fail_are_named_after_the_others_are_written(run_mode, capsys, tmp_path):
    output = tmp_path / 'samples.jsonl'
    with pytest.raises(NumericsError) as error:
        run_mode(Engine(fails={'1'}), ['good', 'bad'], output, n=2)
    assert str(error.value) == (
        "2 of 4 samples failed: 'bad' (sample 2): NaN, 'bad' (sample 3): NaN"
    )
    assert capsys.readouterr().out == 'goodx\ngoodx\nbad\nbad\n'
    records = records_in(output)
    assert [record['finish_reason'] for record in records] == ['length'] * 2 + ['error'] * 2
    assert [record.get('error') for record in records] == [None, None, 'NaN', 'NaN']


def test_a_request_is_refused_before_the_weights_are_read(run_mode, monkeypatch):
    monkeypatch.setattr(sample, 'complete', lambda *_: pytest.fail('it has been run'))
    with pytest.raises(DataError, match='request 1: refused'):
        run_mode(Engine(refuses={'1'}), ['a', 'b'])


def test_a_first_space_that_decoding_drops_is_kept_in_a_completion(capsys):
    """As with SentencePiece; a chat answer is a text of its own."""

    class Words:
        words = ['one', 'two', 'END']

        def decode(self, ids):
            return ' '.join(self.words[i] for i in ids)

        def decode_after(self, before, ids):
            return self.decode([*before, *ids]).removeprefix(self.decode(before))

    def show(**options):
        request = SimpleNamespace(id='0', tokens=[0])
        completion = Completion('0', 0, [1, 2], text='two ', finish_reason='stop', stop='END')
        run = run_with(config_of(**options))
        write_samples(run, Words(), ['one'], [request], {'0': [completion]}, None)
        return capsys.readouterr().out

    assert show() == 'one two \n'
    assert show(chat=True) == 'one\ntwo \n'

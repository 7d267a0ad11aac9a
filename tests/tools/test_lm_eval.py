"""The command that runs lm-eval's tasks, without lm-eval, and with it where it is installed."""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from jaxfm.errors import DataError, UsageError
from tests.conftest import ROOT
from tests.evals.test_lm_eval import GOLDEN, GOLDENS, NEAR, write_model
from tools import lm_eval

COMMAND = ['--config', str(ROOT / 'configs' / 'pretrained.py'), '--tasks', str(GOLDENS / 'lm_eval')]


class Base:
    """Stands in for lm-eval's LM."""

    def __init__(self):
        self.kept = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *given: self.kept.append(given))


class Answers:
    """Answers with what it was asked."""

    weights, tokenizer_name, chat_template = {'name': 'x'}, 'words', 'a template'

    def loglikelihood(self, pairs, answered):
        for index in reversed(range(len(pairs))):
            answered(index, (float(index), True))
        return [(float(index), pair) for index, pair in enumerate(pairs)]

    def loglikelihood_rolling(self, texts, answered):
        return texts

    def generate_until(self, asked, answered):
        return asked

    def apply_chat_template(self, messages, add_generation_prompt):
        return messages, add_generation_prompt


@pytest.fixture
def model():
    return lm_eval.as_model(Base, Answers())


def asked(*each):
    return [SimpleNamespace(args=args) for args in each]


def test_requests_are_handed_on_and_each_answer_goes_to_the_cache(model):
    found = model.loglikelihood(asked(('a', 'b'), ('c', 'd')))
    assert found == [(0.0, ('a', 'b')), (1.0, ('c', 'd'))]
    assert model.kept == [
        ('loglikelihood', ('c', 'd'), (1.0, True)),
        ('loglikelihood', ('a', 'b'), (0.0, True)),
    ]
    assert model.loglikelihood_rolling(asked(('a',), ('b',))) == ['a', 'b']
    assert model.generate_until(asked(('a', {'until': 'b'}))) == [('a', {'until': 'b'})]
    assert model.apply_chat_template(['m'], add_generation_prompt=False) == (['m'], False)
    assert model.get_model_info() == {'weights': {'name': 'x'}}
    assert (model.tokenizer_name, model.is_primary) == ('words', True)


def test_a_model_has_one_chat_template(model):
    assert (model.chat_template(True), model.chat_template(False)) == ('a template', '')
    with pytest.raises(DataError, match="chat template 'rag'"):
        model.chat_template('rag')


def test_without_lm_eval_the_extra_is_named(monkeypatch, tmp_path, capsys):
    """Before the weights are read."""
    monkeypatch.setitem(sys.modules, 'lm_eval', None)
    given = [f'--config.init_from={write_model(tmp_path / "model")}', f'--workdir={tmp_path / "w"}']
    assert lm_eval.main([*COMMAND, *given]) == 66
    assert "pip install 'jaxfm[lmeval]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    'line, words',
    [
        (['--tasks', 'x'], 'give --config=FILE'),
        (COMMAND[:2], 'required: --tasks'),
        ([*COMMAND, '--limit', '0'], 'at least 1'),
        ([*COMMAND, '--task', 'x'], '--task'),
    ],
    ids=['config', 'tasks', 'limit', 'flag'],
)
def test_a_wrong_command_line_is_told(line, words):
    with pytest.raises(UsageError, match=words):
        lm_eval.parse(line)


@pytest.mark.slow
def test_the_command_writes_results_and_samples(tmp_path):
    if importlib.util.find_spec('lm_eval') is None:
        pytest.skip('lm-eval is not installed: docs/evaluation.md says how')
    output = tmp_path / 'out' / 'results.json'
    given = {
        'init_from': write_model(tmp_path / 'model'),
        'sampling.max_length': GOLDEN['max_length'] + 1,
        'sampling.max_tokens': 8,
    }
    overrides = [f'--config.{name}={value}' for name, value in given.items()]

    def run(*more):
        return subprocess.run(
            [sys.executable, '-m', 'tools.lm_eval', *COMMAND, *overrides, *more],
            cwd=ROOT,
            env=os.environ | {'HF_HOME': str(tmp_path / 'hf'), 'HF_HUB_OFFLINE': '1'},
            capture_output=True,
            encoding='utf-8',
        )

    done = run('--output', str(output))
    assert done.returncode == 0, done.stderr
    assert 'os.fork' not in done.stderr and 'acc_mutual_info' in done.stderr
    found = json.loads(output.read_text('utf-8'))
    assert found['config']['weights']['name'] == str(tmp_path / 'model')
    assert found['results']['text']['byte_perplexity,none'] == pytest.approx(
        GOLDEN['results']['text']['byte_perplexity,none'], **NEAR
    )
    samples = tmp_path / 'out' / 'results.json.samples' / 'quiz.jsonl'
    lines = samples.read_text('utf-8').splitlines()
    assert [json.loads(line)['doc_id'] for line in lines] == [0, 1, 2, 3]
    for path, words in {'none': 'there is no none', 'configs': 'has no .yaml'}.items():
        done = run('--tasks', path)
        assert done.returncode in (65, 66) and words in done.stderr

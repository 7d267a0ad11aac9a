"""Real models answer as in transformers, also after we have exported them."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxfm.config.load import load_config
from jaxfm.modes.generation import requests_for
from jaxfm.ops.logprobs import logits
from jaxfm.pretrained.locate import open_pretrained
from jaxfm.sampling import SamplingConfig
from jaxfm.sampling.complete import complete
from jaxfm.sampling.engine import Sampler
from jaxfm.tokenizer.build import build_tokenizer
from tests.pretrained.loading import Loading
from tests.runs import PATIENCE

ROOT = Path(__file__).resolve().parent.parent.parent
PRETRAINED = str(ROOT / 'configs' / 'pretrained.py')


@pytest.fixture(scope='module')
def command_line(tiny, tmp_path_factory):
    """Runs `python -m jaxfm.main` on one device with the config `pretrained` -> stdout."""

    def run(path, *argv):
        where = tmp_path_factory.mktemp('work')
        flags = [f'--config={PRETRAINED}:smoke', f'--config.init_from={path}', '--workdir=run']
        done = tiny.run(*flags, *argv, cwd=where, timeout=3 * PATIENCE)
        assert done.returncode == 0, done.stderr[-2000:]
        assert not (where / 'run').exists()
        return done.stdout

    return run


class Real:
    """A model in this process, on one device."""

    def __init__(self, path):
        self.loading = Loading(path)
        self.params = self.loading.load()
        self.config = load_config(PRETRAINED, [f'init_from={path}'])
        self.tokenizer = build_tokenizer(self.config.tokenizer, ())

    def answers(self, cases):
        """-> (prompt ids, answer ids, their log-probs) of each case of a golden file."""
        requests = [self._request(str(index), case) for index, case in enumerate(cases)]
        with jax.set_mesh(self.loading.mesh):
            completions = complete(self._sampler, requests, self.params, 0)
        return [
            (list(request.tokens), answer.tokens, answer.logprobs)
            for request in requests
            for answer in completions[request.id]
        ]

    def _request(self, name, case):
        sampling = self.config.sampling.model_copy(update={'chat': case.get('chat', False)})
        config = self.config.model_copy(update={'sampling': sampling})
        [request] = requests_for(config, self.tokenizer, [case['prompt']])
        limit = len(case['output_ids'])
        return dataclasses.replace(request, id=name, max_tokens=limit, temperature=0.0)

    @functools.cached_property
    def _sampler(self):
        loading = self.loading
        sampling = SamplingConfig(slots=5, max_length=272, decode_steps=16)
        return Sampler(loading.parts.merge, loading.config, sampling, loading.mesh)

    def first_logits(self, prompts):
        """The logits of the token after each prompt."""
        lengths = np.array([len(ids) for ids in prompts])
        tokens = np.zeros((len(prompts), lengths.max()), np.int32)
        for row, ids in zip(tokens, prompts):
            row[: len(ids)] = ids
        positions = np.broadcast_to(np.arange(lengths.max(), dtype=np.int32), tokens.shape)
        segment_ids = (positions < lengths[:, None]).astype(np.int32)

        def forward(params):
            model = self.loading.parts.merge(params)
            return logits(model(tokens, positions, segment_ids)[0], model.unembed())

        with jax.set_mesh(self.loading.mesh):
            return np.asarray(jax.jit(forward)(self.params))[np.arange(len(prompts)), lengths - 1]


def assert_golden(case, answer, tolerance):
    prompt, ids, logprobs = answer
    assert prompt == case['prompt_ids']
    assert ids == case['output_ids']
    np.testing.assert_allclose(logprobs, case['logprobs'], rtol=0, atol=tolerance)


# stories260K, a directory


@pytest.fixture(scope='module')
def stories(shared_data):
    return shared_data / 'stories260k_hf'


@pytest.fixture(scope='module')
def stories_cases(stories):
    return json.loads((stories / 'golden_greedy.json').read_text())['cases']


def test_stories_equal_those_of_transformers_token_for_token(stories, stories_cases):
    real = Real(stories)
    answers = real.answers(stories_cases)
    for case, answer in zip(stories_cases, answers, strict=True):
        assert_golden(case, answer, 1e-4)
    heads = np.array([case['first_step_logits_head'] for case in stories_cases])
    found = real.first_logits([case['prompt_ids'] for case in stories_cases])
    np.testing.assert_allclose(found[:, : heads.shape[1]], heads, rtol=0, atol=1e-4)
    assert len(answers) == 5


def test_the_command_line_tells_the_stories(stories, stories_cases, command_line, tmp_path):
    prompts = [argument for case in stories_cases for argument in ('--prompt', case['prompt'])]
    output = tmp_path / 'samples.jsonl'
    text = command_line(
        stories,
        *('--mode=sample', '--temperature=0', '--max_tokens=256', f'--output={output}'),
        *('--config.sampling.max_length=272', *prompts),
    )
    records = [json.loads(line) for line in output.read_text().splitlines()]
    for case, record in zip(stories_cases, records, strict=True):
        left = case['text'].removeprefix(case['prompt'])
        assert record['completion'].startswith(left)
        assert case['prompt'] + record['completion'] in text
    assert records[0]['completion'] == stories_cases[0]['text']
    assert len(records[0]['completion']) == 565


# SmolLM2-135M-Instruct, a 4-bit .gguf file


@pytest.fixture(scope='module')
def smollm2_cases(shared_data):
    name = 'smollm2_135m_instruct_q4_1.golden.json'
    return json.loads((shared_data / 'models_installable' / name).read_text())['cases']


@pytest.fixture(scope='module')
def exported(smollm2_gguf, command_line, tmp_path_factory):
    """The real model, exported by our command line."""
    path = tmp_path_factory.mktemp('exported') / 'model'
    assert command_line(smollm2_gguf, '--mode=export', f'--output={path}') == ''
    return path


def test_the_real_chat_model_answers_by_its_own_template(
    smollm2_gguf, smollm2_cases, command_line, tmp_path
):
    chats = [case for case in smollm2_cases if case['chat']]
    output = tmp_path / 'samples.jsonl'
    command_line(
        smollm2_gguf,
        *('--mode=sample', '--config.sampling.chat=true', '--temperature=0', '--max_tokens=40'),
        *(argument for case in chats for argument in ('--prompt', case['prompt'])),
        f'--output={output}',
    )
    records = [json.loads(line) for line in output.read_text().splitlines()]
    for case, record in zip(chats, records, strict=True):
        assert record['completion'] + '<|im_end|>' == case['text']
        assert record['finish_reason'] == 'stop'


def test_the_export_of_the_real_model_is_bit_exact(smollm2_gguf, exported):
    before, after = open_pretrained(str(smollm2_gguf)), open_pretrained(str(exported))
    assert after.tensors.shapes == before.tensors.shapes
    for name in before.tensors.shapes:
        one, other = before.tensors.read(name), after.tensors.read(name)
        np.testing.assert_array_equal(one.astype(np.float32), other, name)


def test_the_exported_model_gives_the_answers_of_the_goldens(exported, smollm2_cases):
    answers = Real(exported).answers(smollm2_cases)
    for case, answer in zip(smollm2_cases, answers, strict=True):
        assert_golden(case, answer, 1e-3)

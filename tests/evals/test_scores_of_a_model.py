"""Likelihoods through the engine equal the sums of the trainer's token log-probs."""

import dataclasses
import math

import pytest

from jaxfm.evals import LikelihoodConfig, PerplexityConfig, prompts
from jaxfm.evals.likelihood import Likelihood
from jaxfm.evals.perplexity import Perplexity
from jaxfm.evals.samples import read_samples
from jaxfm.registry import Registry
from jaxfm.tasks import PythonFunctionsConfig
from jaxfm.tasks.base import Choice, Task
from tests.evals.scoring import context_of, entry
from tests.sampling.conftest import (  # noqa: F401
    VOCAB,
    _shared,
    one_device,
    params,
    sampler,
    score,
)

pytestmark = pytest.mark.usefixtures('quick_compilation')
SHOTS = 'abcd efgh ijkl '  # three pages of four tokens, and three tokens


class Tokenizer:
    eos_id, bos_id = 0, None

    def encode(self, text):
        return [ord(letter) % VOCAB for letter in text]


def question(number, *texts):
    context = f'{SHOTS}q{number}?'
    pairs = tuple((context, text) for text in texts)
    return Choice(f'q{number}', context, pairs=pairs, right=(0,), unconditional='A:')


class Quiz(Task):
    questions = [question(1, ' yes', ' no', ' perhaps'), question(2, ' yes', ' maybe')]

    def __init__(self, config, documents):
        pass

    def prompts(self):
        return self.questions


def test_sums_are_those_of_the_trainer(sampler, params, score, tmp_path, monkeypatch):  # noqa: F811
    """Within 1e-4, also where the few-shot prefix and the context come from another request."""
    monkeypatch.setattr(prompts, 'TASKS', Registry({'python_functions': entry(Quiz)}))
    context = context_of(sampler, tmp_path, tokenizer=Tokenizer())
    shared = sampler.counters.shared_tokens
    Likelihood(LikelihoodConfig(task=PythonFunctionsConfig()), context).run(params, 0)
    records = {one['id']: one for one in read_samples(next(tmp_path.iterdir()))[1]}
    encode = Tokenizer().encode
    for one in Quiz.questions:
        for number, (before, text) in enumerate(one.pairs):
            logprobs, _, greedy = score(encode(before), encode(text))
            found = records[one.id]['logprobs'][number]
            assert found == pytest.approx(logprobs.sum(), abs=1e-4)
            alone = score(encode('A:'), encode(text))[0].sum()
            assert records[one.id]['unconditional'][number] == pytest.approx(alone, abs=1e-4)
            is_greedy = (greedy == encode(text)).all()
            assert records[one.id]['is_greedy'][number] == is_greedy
    # Pages of the examples are shared by all but the first choice, at least.
    assert sampler.counters.shared_tokens - shared >= 4 * 12


def test_greedy_decoding_gives_what_is_called_greedy(sampler, params, score, monkeypatch):  # noqa: F811
    """A continuation of greedy tokens is one; another last token is none."""
    encode = Tokenizer().encode
    ids = encode('xy?')
    for _ in range(3):
        ids.append(int(score(ids, [0])[2][0]))
    # Letters with these ids.
    text = ''.join(chr(VOCAB + i) for i in ids[3:])
    other = text[:-1] + chr(VOCAB + (ids[-1] + 1) % VOCAB)
    asked = [
        dataclasses.replace(question(i, ' '), pairs=(('xy?', one),))
        for i, one in enumerate((text, other))
    ]
    monkeypatch.setattr(Quiz, 'questions', asked)
    monkeypatch.setattr(prompts, 'TASKS', Registry({'python_functions': entry(Quiz)}))
    context = context_of(sampler, tokenizer=Tokenizer())
    values = Likelihood(LikelihoodConfig(task=PythonFunctionsConfig()), context).run(params, 0)
    assert values['greedy_accuracy'] == 0.5


def test_the_loss_of_a_text_is_that_of_the_trainer(sampler, params, score, tmp_path):  # noqa: F811
    text = 'The quick brown fox jumps over it.'
    (tmp_path / 'text.txt').write_text(text, encoding='utf-8')
    encode, context = Tokenizer().encode, context_of(sampler, tokenizer=Tokenizer())

    def loss(**cut):
        config = PerplexityConfig(path=str(tmp_path / 'text.txt'), **cut)
        return Perplexity(config, context).run(params, 0)

    whole = -score(encode(text[0]), encode(text[1:]))[0]
    assert loss()['loss'] == pytest.approx(whole.mean(), abs=1e-4)
    assert loss()['bits_per_byte'] == pytest.approx(whole.sum() / math.log(2) / len(text), abs=1e-4)
    # A window of 12 tokens that moves by 4 sees at least the 8 tokens before.
    ids = encode(text)
    parts = [-score(ids[:1], ids[1:12])[0]]
    for start in range(12, len(ids), 4):
        new = ids[start : start + 4]
        before = ids[max(0, start + len(new) - 12) : start]
        parts.append(-score(before, new)[0])
    nats = sum(part.sum() for part in parts)
    found = loss(window=12, stride=4)
    assert found['tokens'] == len(ids) - 1
    assert found['loss'] == pytest.approx(nats / (len(ids) - 1), abs=1e-4)

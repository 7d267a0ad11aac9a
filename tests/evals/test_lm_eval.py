"""What lm-eval asks in its tasks, against its own Hugging Face model and against our evaluators."""

import copy
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm import sharding
from jaxfm.config.load import load_config
from jaxfm.errors import DataError, NumericsError
from jaxfm.evals import LikelihoodConfig, PerplexityConfig, prompts
from jaxfm.evals.likelihood import Likelihood
from jaxfm.evals.lm_eval import LmEval
from jaxfm.evals.perplexity import Perplexity
from jaxfm.evals.samples import read_samples
from jaxfm.registry import Registry
from jaxfm.run.data import open_tokenizer
from jaxfm.run.run import Run
from jaxfm.run.weights import current_params
from jaxfm.sampling.request import Event
from jaxfm.tasks import PythonFunctionsConfig
from jaxfm.tasks.base import Choice, Task
from tests.conftest import ROOT
from tests.evals.scoring import Engine, Tokenizer, context_of, entry, total
from tools.lm_eval import as_model, read_tasks

pytestmark = pytest.mark.usefixtures('quick_compilation')

GOLDENS = ROOT / 'tests' / 'goldens'
GOLDEN = json.loads((GOLDENS / 'lm_eval' / 'golden.json').read_text('utf-8'))
PAIRS = [(before, text) for before, text, _ in GOLDEN['loglikelihood']]
TEXTS = [text for text, _ in GOLDEN['loglikelihood_rolling']]
# Two implementations in float32; as in tests/models/test_goldens.py, per token.
NEAR = dict(rel=1e-5, abs=1e-4)


def write_model(path):
    """The model that lm-eval was given, with its tokenizer."""
    path.mkdir()
    for name in ('config.json', 'generation_config.json', 'model.safetensors'):
        shutil.copy(GOLDENS / 'llama' / name, path)
    for name in ('tokenizer.json', 'tokenizer_config.json'):
        shutil.copy(GOLDENS / 'lm_eval' / name, path)
    return path


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp('run')
    given = {
        'init_from': write_model(root / 'model'),
        # lm-eval counts the tokens that the model reads; the last one is only predicted.
        'sampling.max_length': GOLDEN['max_length'] + 1,
        'sampling.max_tokens': 8,
        'sampling.prefill_tokens': 64,
        'sampling.decode_steps': 4,
        'mesh.replica': 8,
        'mesh.fsdp': 1,
    }
    overrides = [f'{name}={value}' for name, value in given.items()]
    config = load_config(str(ROOT / 'configs' / 'pretrained.py'), overrides)
    run = Run(config, root / 'none')
    with jax.set_mesh(run.mesh):
        yield run


@pytest.fixture(scope='module')
def context(run):
    tokenizer = open_tokenizer(run.config, run.workdir)
    return run.context(tokenizer, run.sampler(tokenizer))


@pytest.fixture(scope='module')
def params(run):
    return current_params(run)[0]


@pytest.fixture(scope='module')
def answers(context, params):
    return LmEval(context, params, 0)


@pytest.fixture(scope='module')
def scores(answers):
    return answers.loglikelihood(PAIRS)


def test_log_likelihoods_are_those_of_lm_evals_own_model(scores):
    """Also of contexts that are cut, and of continuations that change the context's last token."""
    for pair, (logprob, is_greedy), (_, _, golden) in zip(PAIRS, scores, GOLDEN['loglikelihood']):
        assert logprob == pytest.approx(golden[0], **NEAR), pair
        assert is_greedy == golden[1], pair
    assert {is_greedy for _, is_greedy in scores} == {True, False}


def test_log_likelihoods_of_whole_texts_are_those_of_lm_evals_own_model(answers):
    """One text is cut into several windows; each token counts once."""
    found = answers.loglikelihood_rolling(TEXTS)
    golden = [logprob for _, logprob in GOLDEN['loglikelihood_rolling']]
    assert found == pytest.approx(golden, **NEAR)


def test_completions_are_those_of_lm_evals_own_model(answers):
    asked = [(before, given) for before, given, _ in GOLDEN['generate_until']]
    assert answers.generate_until(asked) == [text for _, _, text in GOLDEN['generate_until']]


class Quiz(Task):
    """Every pair is a question."""

    pairs = ()

    def __init__(self, config, documents):
        pass

    def prompts(self):
        return [
            Choice(str(i), before, pairs=((before, text),), right=(0,), unconditional='')
            for i, (before, text) in enumerate(self.pairs)
        ]


@pytest.fixture
def own_scores(context, params, tmp_path, monkeypatch):
    """pairs -> {index: (log-prob, is_greedy)} by our evaluator, but for those that are too long."""

    def score(pairs):
        lengths = [sum(map(len, prompts.pair_ids(*pair, context))) for pair in pairs]
        short = [i for i, length in enumerate(lengths) if length <= GOLDEN['max_length'] + 1]
        assert len(pairs) > len(short) > 0.8 * len(pairs)
        monkeypatch.setattr(Quiz, 'pairs', [pairs[i] for i in short])
        monkeypatch.setattr(prompts, 'TASKS', Registry({'python_functions': entry(Quiz)}))
        kept = dataclasses.replace(context, name='quiz', samples_directory=tmp_path)
        Likelihood(LikelihoodConfig(task=PythonFunctionsConfig()), kept).run(params, 0)
        records = read_samples(tmp_path / 'quiz-000000.jsonl')[1]
        return {short[int(one['id'])]: (one['logprobs'][0], one['is_greedy'][0]) for one in records}

    return score


@pytest.fixture
def with_bos(context):
    """The same, with texts that begin with BOS, which is EOS."""
    tokenizer = copy.copy(context.tokenizer)
    tokenizer.bos_id = tokenizer.eos_id
    return dataclasses.replace(context, tokenizer=tokenizer)


@pytest.fixture
def own_sums(with_bos, params, tmp_path):
    """texts -> the log-prob of each by our evaluator."""

    def score(texts):
        kept = dataclasses.replace(with_bos, name='text', samples_directory=tmp_path)
        path = tmp_path / 'texts.jsonl'
        lines = [json.dumps({'text': text}) + '\n' for text in texts]
        path.write_text(''.join(lines), encoding='utf-8')
        Perplexity(PerplexityConfig(path=str(path)), kept).run(params, 0)
        sums = [0.0] * len(texts)
        for record in read_samples(tmp_path / 'text-000000.jsonl')[1]:
            sums[int(record['group'].rpartition(':')[2]) - 1] -= record['nats']
        return sums

    return score


SAME = dict(abs=1e-6, rel=0)


def test_log_likelihoods_are_our_own_scores(scores, own_scores):
    for index, (logprob, is_greedy) in own_scores(PAIRS).items():
        assert scores[index] == (pytest.approx(logprob, **SAME), is_greedy)


def test_log_likelihoods_of_whole_texts_are_our_own_scores(with_bos, params, own_sums):
    found = LmEval(with_bos, params, 0).loglikelihood_rolling(TEXTS)
    assert found == pytest.approx(own_sums(TEXTS), **SAME)


@pytest.fixture
def environment_as_before():
    """Takes away the variables that lm-eval and what it imports set."""
    before = set(os.environ)
    yield
    for name in set(os.environ) - before:
        del os.environ[name]


@pytest.mark.slow
@pytest.mark.usefixtures('environment_as_before')
def test_lm_eval_itself_gets_our_own_scores(
    with_bos, answers, params, own_scores, own_sums, tmp_path, monkeypatch
):
    """In a session with the extra `lmeval`: the tasks that the golden is made of, asked again."""
    if importlib.util.find_spec('lm_eval') is None:
        pytest.skip('lm-eval is not installed: docs/evaluation.md says how')
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'hf'))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # those of lm-eval and what it imports
        import lm_eval
        from lm_eval.tasks import TaskManager

        def evaluate(answers, *names):
            return lm_eval.simple_evaluate(
                model=as_model(lm_eval.api.model.LM, answers),
                tasks=read_tasks([GOLDENS / 'lm_eval' / f'{name}.yaml' for name in names]),
                task_manager=TaskManager(include_defaults=False),
                bootstrap_iters=0,
            )

        found = evaluate(answers, 'last_word', 'quiz', 'sums')
        of_text = evaluate(LmEval(with_bos, params, 0), 'text')
    asked = [
        (tuple(pair), tuple(answer))
        for name in ('last_word', 'quiz')
        for sample in found['samples'][name]
        for pair, answer in zip(sample['arguments'], sample['filtered_resps'])
    ]
    assert sorted(pair for pair, _ in asked) == sorted(PAIRS)
    for index, (logprob, is_greedy) in own_scores([pair for pair, _ in asked]).items():
        assert asked[index][1] == (pytest.approx(logprob, **SAME), is_greedy)
    texts = of_text['samples']['text']
    sums = [sample['filtered_resps'][0] for sample in texts]
    assert [sample['arguments'][0][0] for sample in texts] == TEXTS
    assert sums == pytest.approx(own_sums(TEXTS), **SAME)
    results = found['results'] | of_text['results']
    for name, golden in GOLDEN['results'].items():
        for metric, value in golden.items():
            if not metric.endswith('stderr,none'):
                near = value if isinstance(value, str) else pytest.approx(value, **NEAR)
                assert results[name][metric] == near, (name, metric)


def test_the_full_forward_pass_agrees(run, scores, context, params):
    """Which tokens count, and whether each is the likeliest one of the whole vocabulary."""
    longest = GOLDEN['max_length'] + 1
    ids = [prompts.pair_ids(*pair, context) for pair in PAIRS]
    tokens_BT = np.zeros((len(ids), longest), np.int32)
    for row, (before, new) in zip(tokens_BT, ids):
        kept = [*before, *new][-longest:]
        row[: len(kept)] = kept
    logprobs_BTV = jax.device_get(
        _forward(run.parts, params, tokens_BT, run.config.model.vocab_size)
    )
    for (before, new), logprobs_TV, found in zip(ids, logprobs_BTV, scores):
        start = min(len(before) + len(new), longest) - len(new)
        predicted = logprobs_TV[start - 1 : start - 1 + len(new)]
        total = predicted[np.arange(len(new)), new].sum()
        assert found[0] == pytest.approx(total, **NEAR)
        assert found[1] == (predicted.argmax(axis=-1) == new).all()


def _forward(parts, params, tokens_BT, num_ids):
    @jax.jit
    def compute(params, tokens_BT):
        model = parts.merge(params)
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        hidden_BTD, _ = model(tokens_BT, positions_BT, jnp.ones_like(tokens_BT))
        weight_VD = model.unembed().weight_VD[:num_ids]  # without padding
        return jax.nn.log_softmax(jnp.einsum('btd,vd->btv', hidden_BTD, weight_VD))

    one = sharding.make_mesh({axis: 1 for axis in sharding.MESH_AXES}, jax.devices()[:1])
    with jax.set_mesh(one):
        return compute(jax.device_get(params), tokens_BT)


# Below: on an engine whose log-probs are a formula.

IDS = Tokenizer().encode


class Words(Tokenizer):
    special_tokens, template_variables, chat_template = {'<end>': 7}, {}, ''
    special_pattern = re.compile('(<end>)')
    fingerprint = 'f' * 64


class Writer(Engine):
    """Also writes completions: the temperature, the seed, the sample and the stops."""

    def __init__(self, max_length=64, fails=()):
        super().__init__(max_length, fails)
        self.longest = max_length

    def check(self, request):
        assert len(request.tokens) + request.max_tokens <= self.config.max_length
        if request.max_tokens == 0:
            super().check(request)

    def add(self, request):
        self.added.append(request)
        self.waiting.append(request)

    def step(self):
        if self.waiting[0].max_tokens == 0:
            return super().step()
        one = self.waiting.pop(0)
        text = f'{one.temperature} {one.sample_index}'
        return [
            Event(one.id, [1], [-1.0], [-1.0], 'stop', sample_index=one.sample_index, text=text)
        ]


@pytest.fixture
def engine():
    return Writer()


@pytest.fixture
def stand_in(engine):
    return LmEval(context_of(engine, tokenizer=Words()), 'weights', 3)


def test_the_first_token_of_a_text_is_predicted_from_the_end_of_another(stand_in):
    assert stand_in.loglikelihood_rolling(['abc', '']) == pytest.approx(
        [total([0, *IDS('abc')], 1), 0]
    )
    found = stand_in.loglikelihood([('', 'ab'), (' ', 'ab')])
    assert found[0] == (pytest.approx(total([0, *IDS('ab')], 1)), False)
    assert found[1] == (pytest.approx(total([0, *IDS(' ab')], 1)), False)


@pytest.mark.parametrize('size', [9, 10, 11, 18, 19, 25, 100])
def test_every_token_of_a_text_counts_once(size):
    """Windows of 10 tokens predict 9; tokens before the last window are predicted from 9 before."""
    text = ''.join(chr(97 + i % 26) for i in range(size))
    engine = Writer(max_length=10)
    found = LmEval(context_of(engine, tokenizer=Words()), 'weights', 3).loglikelihood_rolling(
        [text]
    )
    assert found == pytest.approx([total([0, *IDS(text)], 1)])
    assert sum(len(one.tokens) - one.prompt_logprobs_from for one in engine.added) == size


def test_equal_requests_are_scored_once_and_each_is_answered(stand_in, engine):
    told = {}
    pairs = [('ab', 'cd'), ('ab', 'ce'), ('ab', 'cd')]
    found = stand_in.loglikelihood(pairs, told.__setitem__)
    assert len(engine.added) == 2 and found[0] == found[2] != found[1]
    assert [told[i] for i in range(3)] == found
    told.clear()
    long = 'x' * 100
    texts = stand_in.loglikelihood_rolling(['ab', long], told.__setitem__)
    assert told == dict(enumerate(texts))


def test_greedy_needs_every_token_to_be_the_likeliest(stand_in):
    """The engine's greedy tokens are capitals."""
    found = stand_in.loglikelihood([('ab', 'CD'), ('ab', 'Cd'), ('ab', 'cD'), ('aB', 'CD')])
    assert [is_greedy for _, is_greedy in found] == [True, False, False, True]


def test_a_long_context_loses_its_beginning_and_this_is_told(stand_in, engine, caplog):
    long = ''.join(chr(97 + i % 26) for i in range(70))
    found = stand_in.loglikelihood([('ab', 'cd'), (long, 'cd'), (long[:62], 'cd')])
    ids = IDS(long + 'cd')[-64:]
    assert found[1][0] == pytest.approx(total(ids, 62))
    assert 'loglikelihood: 1 of 3 contexts are too long and lose 8 tokens' in caplog.text
    assert 'request 1 as the first' in caplog.text and 'sampling.max_length' in caplog.text
    stand_in.generate_until([(long, {'max_gen_toks': 10})])
    assert engine.added[-1].tokens == IDS(long)[-54:]
    assert 'generate_until: 1 of 1 contexts are too long and lose 16 tokens' in caplog.text


def test_contexts_that_fit_are_told_nothing(stand_in, caplog):
    stand_in.loglikelihood([('x' * 62, 'cd')])
    stand_in.generate_until([('x' * 54, {'max_gen_toks': 10})])
    assert not caplog.text


@pytest.mark.parametrize(
    'given, temperature',
    [
        ({}, 0.0),
        ({'do_sample': True}, 1.0),
        ({'do_sample': True, 'temperature': 0.3}, 0.3),
        ({'temperature': 0.3}, 0.3),
        ({'temperature': 0.0}, 0.0),
        ({'do_sample': False, 'temperature': 0.3}, 0.0),
    ],
)
def test_completions_are_greedy_unless_the_task_asks_for_samples(
    stand_in, engine, given, temperature
):
    assert stand_in.generate_until([('ab', given | {'max_gen_toks': 9})]) == [f'{temperature} 0']


def test_options_of_a_task_reach_the_engine(stand_in, engine):
    given = {
        'until': ['x', '<end>', ''],
        'max_new_tokens': 5,
        'do_sample': True,
        'top_p': 0.5,
        'top_k': 3,
        'repetition_penalty': 1.2,
    }
    stand_in.generate_until([('ab', given), ('ab', {'until': 'y', 'max_gen_toks': 4})])
    first, second = engine.added
    assert (first.max_tokens, first.top_p, first.top_k, first.repetition_penalty) == (
        5,
        0.5,
        3,
        1.2,
    )
    assert first.stop == ('x',) and first.stop_ids == {0, 7}
    assert second.stop == ('y',) and second.stop_ids == {0}
    assert list(first.tokens) == IDS('ab')


def test_repeated_requests_are_samples_with_noise_of_their_own(stand_in, engine):
    given = {'do_sample': True, 'max_gen_toks': 4}
    found = stand_in.generate_until([('ab', given), ('cd', given), ('ab', dict(given))])
    assert found == ['1.0 0', '1.0 0', '1.0 1']
    seeds = [one.seed for one in engine.added]
    assert seeds[0] == seeds[2] != seeds[1]


@pytest.mark.parametrize(
    'given, words',
    [
        ({'num_beams': 4}, ["'num_beams', which is unknown; known are until, do_sample"]),
        ({'max_gen_tokens': 4}, ["'max_gen_tokens'", 'do you mean max_gen_toks?']),
        ({'max_gen_toks': 4, 'max_tokens': 5}, ['several lengths', "'max_tokens': 5"]),
        ({'max_gen_toks': 64}, ['max_gen_toks 64 leave no room', 'the engine holds 64 tokens']),
    ],
    ids=['unknown', 'misspelled', 'lengths', 'long'],
)
def test_what_is_not_understood_is_refused_by_name(stand_in, engine, given, words):
    with pytest.raises(DataError) as error:
        stand_in.generate_until([('ab', {'max_gen_toks': 4}), ('ab', given)])
    for word in ['generate_until request 1', *words]:
        assert word in str(error.value)
    assert not engine.added


@pytest.mark.parametrize(
    'pair, words',
    [
        (('ab', ''), "continuation '' adds no token"),
        (('ab', 'x' * 64), 'of 64 tokens does not fit'),
    ],
    ids=['empty', 'long'],
)
def test_a_continuation_that_cannot_be_scored_is_refused(stand_in, engine, pair, words):
    with pytest.raises(DataError, match=f'request 1: .*{words}'):
        stand_in.loglikelihood([('ab', 'c'), pair])
    assert not engine.added


def test_a_log_prob_that_is_not_finite_ends_the_evaluation():
    engine = Writer(fails=[ord('w')])
    with pytest.raises(NumericsError, match='request 1: the model gives a log-prob of nan'):
        LmEval(context_of(engine), 'weights', 3).loglikelihood([('ab', 'c'), ('ab', 'w')])
    assert not engine.waiting


class Talk:
    """A template whose end of turn is a special token, which messages may spell."""

    stop_ids, template = frozenset([0, 7]), 'the template'

    def prompt_text(self, messages):
        return ''.join(one['content'] + '<end>' for one in messages)

    def prompt(self, messages):
        return [i for one in messages for i in (*IDS(one['content']), 7)]


def test_a_chat_has_the_ids_of_its_template(engine):
    context = dataclasses.replace(context_of(engine, tokenizer=Words()), chat=Talk)
    answers = LmEval(context, 'weights', 3)
    text = answers.apply_chat_template([{'role': 'user', 'content': 'ab'}])
    assert text == 'ab<end>'
    found = answers.loglikelihood([(text, 'cd'), ('ab', 'cd')])
    assert found[0][0] == pytest.approx(total([*IDS('ab'), 7, *IDS('cd')], 3))
    answers.generate_until([(text, {'max_gen_toks': 4})])
    assert list(engine.added[-1].tokens) == [*IDS('ab'), 7]
    assert engine.added[-1].stop_ids == {0, 7}
    answers.apply_chat_template([{'role': 'user', 'content': text} for text in ('ab', 'cd')])
    with pytest.raises(DataError, match='two chats are the same text.*ab<end>cd<end>'):
        answers.apply_chat_template([{'role': 'user', 'content': 'ab<end>cd'}])
    with pytest.raises(DataError, match='gen_prefix'):
        answers.apply_chat_template([{'role': 'user', 'content': 'ab'}], False)
    assert (answers.chat_template, answers.tokenizer_name) == ('the template', 'f' * 16)

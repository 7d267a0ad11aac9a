"""With model.batch_invariant, the engine tells exactly what the train step computes."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from jaxfm import sharding, state
from jaxfm.models import BlockConfig, LoraConfig, SegmentConfig, TransformerConfig
from jaxfm.models.transformer import Transformer
from jaxfm.objectives import NextTokenConfig
from jaxfm.objectives.next_token import NextToken
from jaxfm.ops.logprobs import token_logprobs
from jaxfm.sampling import SamplingConfig
from jaxfm.sampling.complete import complete
from jaxfm.sampling.engine import Sampler
from jaxfm.sampling.request import Completion, Request

V, ROWS, LENGTH = 60, 8, 150
BLOCK = dict(num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24)
SOFT = dict(attention_softcap=3.0, qk_norm=True, qkv_bias=True)
CONFIG = TransformerConfig(
    vocab_size=V,
    vocab_multiple=16,
    embed_dim=16,
    num_layers=2,
    block=BlockConfig(**BLOCK),
    segments=[
        SegmentConfig(
            pattern=[BlockConfig(**BLOCK, **SOFT, window=21), BlockConfig(**BLOCK)], repeats=1
        )
    ],
    tie_embeddings=True,
    embedding_scale=1.7,
    logits_softcap=5.0,
    lora=LoraConfig(rank=2, alpha=2.0, targets=['all']),
    batch_invariant=True,
)
PARTS = state.split(lambda key: Transformer(CONFIG, nnx.Rngs(key)))


@pytest.fixture(scope='module', autouse=True)
def _compile_quickly():
    """Not here: with little optimization, other programs would have equal bits, too."""


@pytest.fixture(scope='module')
def params():
    random, params = np.random.default_rng(0), {}
    for path, leaf in PARTS.shapes.items():
        centre = 0.4 if path.endswith('scale') else 0.0
        params[path] = jax.numpy.asarray(centre + 0.2 * random.normal(size=leaf.shape), leaf.dtype)
    return params


class Reporting(NextToken):
    """Next-token cross-entropy whose metrics contain the log-probs of the whole batch."""

    def __call__(self, model, batch, rng):
        hidden, _ = model(batch['tokens'], batch['positions'], batch['segment_ids'])
        logprobs, _ = token_logprobs(hidden, model.unembed(), batch['targets'])
        total = -jax.numpy.sum(logprobs * batch['loss_mask'])
        return {'next_token': total}, {'logprobs': (logprobs, np.float32(1))}, {}


class PlainDescent:
    """The update is the gradient."""

    transform = optax.identity()

    @staticmethod
    def schedule(updates):
        return jax.numpy.float32(1.0)


@pytest.fixture(scope='module')
def trained(params, one_device):
    """texts -> the log-probs of all their tokens but the first, in a step that makes gradients."""
    step = state.make_train_step(PARTS, Reporting(NextTokenConfig()), PlainDescent, accumulate=1)

    def pack(texts):
        names = ('tokens', 'targets', 'positions', 'segment_ids')
        batch = {name: np.zeros((ROWS, LENGTH), np.int32) for name in names}
        places, row, at = [], 0, 5  # a row begins with padding
        for segment, text in enumerate(texts, 1):
            length = len(text) - 1
            if at + length > LENGTH:
                row, at = row + 1, segment % 7
            here = row, slice(at, at + length)
            batch['tokens'][here], batch['targets'][here] = text[:-1], text[1:]
            batch['positions'][here], batch['segment_ids'][here] = np.arange(length), segment
            places.append(here)
            at += length
        return batch | {'loss_mask': (batch['segment_ids'] > 0).astype(np.float32)}, places

    def run(texts):
        batch, places = pack(texts)
        with jax.set_mesh(one_device):
            begun = state.begin_phase(
                jax.tree.map(lambda x: x.copy(), params), PARTS, PlainDescent, 0
            )
            _, metrics = step(begun, sharding.put(batch, one_device, ROWS))
        logprobs = np.asarray(metrics['logprobs'])
        return [logprobs[place] for place in places]

    return run


def engine(params, mesh, **words) -> Sampler:
    defaults = dict(slots=4, max_length=61, decode_steps=3, page_size=5, prefill_tokens=32)
    sampler = Sampler(PARTS.merge, CONFIG, SamplingConfig(**(defaults | words)), mesh)
    sampler.lend(params, 0)
    return sampler


def some_requests():
    """Prompts with common beginnings, and some with several samples."""
    random = np.random.default_rng(1)
    start = random.integers(0, V, 23).tolist()
    prompts = [start[: 9 + 2 * i] + random.integers(0, V, 1 + 3 * i).tolist() for i in range(6)]
    return [
        Request(f'{i}', prompt, 6 + 2 * i, seed=i, n=1 + 2 * (i == 2), top_p=1 - i / 20,
                prompt_logprobs=i == 1, top_logprobs=20 * (i == 3))
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip


def check(sampler, trained):
    """Every log-prob that the engine tells is that of the train step for the same text."""
    requests = some_requests()
    texts, told = [], []
    for request in requests:
        sampler.add(request)
    prompts = {request.id: list(request.tokens) for request in requests}
    completions, forked = {}, False
    while sampler.has_work:
        for event in sampler.step():
            key = event.id, event.sample_index
            completions.setdefault(key, Completion(*key)).add(event)
        if not forked and ('4', 0) in completions and sampler._find('4'):
            prompts['fork'] = [*sampler._find('4')[0].tokens, 7, 7]
            sampler.fork('4', 'fork', sample_index=9, tokens=[7, 7])
            sampler.cancel('0')
            forked = True
    assert forked and len(completions) >= 8
    for (name, _), completion in completions.items():
        texts.append(prompts[name] + completion.tokens)
        told.append(completion)
    for completion, logprobs in zip(told, trained(texts), strict=True):
        found = np.asarray(completion.logprobs, np.float32)
        np.testing.assert_array_equal(found, logprobs[len(logprobs) - len(found) :])
        tops = map(dict, completion.top_logprobs)
        for token, logprob, top in zip(completion.tokens, completion.logprobs, tops):
            assert top.get(token, logprob) == logprob
        if completion.prompt_logprobs:
            before = np.asarray(completion.prompt_logprobs[1:], np.float32)
            np.testing.assert_array_equal(before, logprobs[: len(before)])
    return {key: completion.tokens for key, completion in completions.items() if key[0] != '0'}


def test_every_logprob_has_the_bits_of_the_train_step(params, one_device, trained):
    """With shared and copied pages, preemption, a fork, a cancellation, and neighbours."""
    with jax.set_mesh(one_device):
        tight = engine(params, one_device, pages=15)
        texts = check(tight, trained)
        assert tight.counters.preemptions and tight.counters.shared_tokens
        # An answer alone has the same bits.
        [request] = [r for r in some_requests() if r.id == '3']
        alone = complete(tight, [request], params, 1)['3'][0]
        assert alone.tokens == texts['3', 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    'words',
    [
        dict(slots=1, decode_steps=1, max_length=64, page_size=1),
        dict(slots=3, decode_steps=16, page_size=16, prefill_tokens=16),
        dict(slots=8, decode_steps=4, page_size=3, prefill_tokens=512, max_length=97),
    ],
    ids=str,
)
def test_every_engine_gives_the_bits_of_the_train_step(words, params, one_device, trained):
    with jax.set_mesh(one_device):
        sampler = engine(params, one_device, **words)
        if words['slots'] == 8:
            sampler.warm_up()
        first = check(sampler, trained)
        plain = engine(params, one_device)
        assert (
            check(plain, trained).items()
            >= {key: tokens for key, tokens in first.items() if key[0] != 'fork'}.items()
        )


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [dict(fsdp=2), dict(tensor=2), dict(replica=2, context=2)])
def test_a_mesh_gives_the_same_bits(sizes, params, trained):
    sizes = {axis: 1 for axis in sharding.MESH_AXES} | sizes
    mesh = sharding.make_mesh(sizes, jax.devices()[: np.prod(list(sizes.values()))])
    with jax.set_mesh(mesh):
        placed = {
            path: jax.device_put(x, jax.NamedSharding(mesh, sharding.stored_spec(PARTS.axes[path])))
            for path, x in params.items()
        }
        check(engine(placed, mesh), trained)

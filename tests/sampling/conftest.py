"""A small model with adapters, and samplers that share compiled functions by shape."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxfm import sharding, state
from jaxfm.models import BlockConfig, LoraConfig, SegmentConfig, TransformerConfig
from jaxfm.models.transformer import Transformer
from jaxfm.ops.logprobs import token_logprobs
from jaxfm.sampling import SamplingConfig
from jaxfm.sampling.engine import Sampler

VOCAB = 60
BLOCK = dict(num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24)
CONFIG = TransformerConfig(
    vocab_size=VOCAB,
    vocab_multiple=16,
    embed_dim=16,
    num_layers=2,
    block=BlockConfig(**BLOCK),
    segments=[
        SegmentConfig(pattern=[BlockConfig(**BLOCK, window=5), BlockConfig(**BLOCK)], repeats=1)
    ],
    lora=LoraConfig(rank=2, alpha=2.0, targets=['all']),
)
PARTS = state.split(lambda key: Transformer(CONFIG, nnx.Rngs(key)))
LENGTH = 40


def random_params(seed: int = 0):
    random = np.random.default_rng(seed)
    params = {}
    for path, leaf in PARTS.shapes.items():
        centre = 1.0 if path.endswith('scale') else 0.0
        params[path] = jnp.asarray(centre + 0.3 * random.normal(size=leaf.shape), leaf.dtype)
    return params


def new_sampler(params, mesh, tokenizer=None, **changes) -> Sampler:
    words = {'slots': 4, 'max_length': LENGTH, 'decode_steps': 3, 'page_size': 4}
    config = SamplingConfig(**{**words, 'prefill_tokens': 32, **changes})
    sampler = Sampler(PARTS.merge, CONFIG, config, mesh, tokenizer)
    if params is not None:
        sampler.lend(params, 0)
    return sampler


@pytest.fixture(scope='session')
def params():
    return random_params()


@pytest.fixture(scope='session')
def other_params():
    return random_params(1)


@pytest.fixture(scope='session')
def one_device():
    sizes = {axis: 1 for axis in sharding.MESH_AXES}
    return sharding.make_mesh(sizes, jax.devices()[:1])


@pytest.fixture
def build():
    """(params or None, mesh, config changes) -> a Sampler with these params lent to it."""
    return new_sampler


def stored(params):
    """The same params, placed as the current mesh stores them, whichever processes it spans."""
    mesh = jax.sharding.get_mesh()

    def move(path, array):
        place = jax.NamedSharding(mesh, sharding.stored_spec(PARTS.axes[path]))
        return jax.make_array_from_callback(array.shape, place, np.asarray(array).__getitem__)

    return {path: move(path, array) for path, array in params.items()}


@pytest.fixture
def store():
    """params -> the same params, placed as the current mesh stores them."""
    return stored


@pytest.fixture(scope='session')
def _shared(params, one_device):
    return new_sampler(params, one_device)


@pytest.fixture
def sampler(_shared, params, one_device):
    """Four slots, pages of four tokens, three tokens per call, chunks of 16, on one device.

    Without any work or known prefix, even if another test left some.
    """
    with jax.set_mesh(one_device):
        _shared.lend(params, -1)  # another version: no prefix is known
        _shared.lend(params, 0)
        yield _shared
        for sequence in _shared._scheduler.sequences:
            _shared.cancel(sequence.request.id)
        assert not pages_in_use(_shared)


def pages_in_use(sampler) -> int:
    """Pages that neither are free nor hold a known prefix alone, nor are page 0."""
    shards = sampler._scheduler._shards
    return sum(s.num_pages - 1 - s.pool.num_free - s.pool.num_spare for s in shards)


@functools.partial(jax.jit, static_argnames='temperature')
def _score(params, tokens, temperature):
    """-> log-prob of every next token at two temperatures, likeliest next token; [B, T - 1]."""
    model = PARTS.merge(params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = model(tokens, positions, jnp.ones_like(tokens))
    unembedding = model.unembed()
    plain, _ = token_logprobs(hidden[:, :-1], unembedding, tokens[:, 1:])
    tempered, _ = token_logprobs(hidden[:, :-1] / temperature, unembedding, tokens[:, 1:])
    scores = hidden[:, :-1] @ unembedding.weight_VD[:VOCAB].T
    return plain, tempered, jnp.argmax(scores, axis=-1)


@pytest.fixture
def score(params):
    """(prompt, completion, temperature) -> the completion's scores by the trainer's forward."""

    def run(prompt, completion, temperature=1.0, params=params):
        text = np.zeros((1, LENGTH), np.int32)
        used = len(prompt) + len(completion)
        text[0, :used] = [*prompt, *completion]
        results = jax.device_get(_score(params, text, temperature))
        return [x[0, len(prompt) - 1 : used - 1] for x in results]

    return run


@pytest.fixture(scope='module', autouse=True)
def _compile_quickly(quick_compilation):
    """Compiles with little optimization: compiling takes nearly all of the time here."""

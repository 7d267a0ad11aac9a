"""Small models that together use every block option; each is compiled once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxfm import state
from jaxfm.models import BlockConfig, LoraConfig, RopeConfig, SegmentConfig, TransformerConfig
from jaxfm.models.kv_cache import init_cache, with_table
from jaxfm.models.transformer import Transformer
from jaxfm.ops.logprobs import logits

B, T = 4, 16  # all tests of a model use these shapes, so that it compiles once
PAGE_SIZE = 3  # no divisor of anything here
BLOCK = BlockConfig(num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24)


def changed(group, **changes):
    return type(group)(**{**dict(group), **changes})


def _configs() -> dict[str, TransformerConfig]:
    llama = TransformerConfig(
        vocab_size=60, vocab_multiple=16, embed_dim=16, num_layers=2, block=BLOCK
    )
    # One layer of its own kind, then (three local, one global) twice.
    norms = dict(post_norm=True, qk_norm=True, norm_unit_offset=True)
    soft = dict(attention_softcap=3.0, activation='gelu_tanh', query_scale=0.3)
    local = changed(BLOCK, **norms, **soft, num_kv_heads=1, window=4)
    everywhere = changed(local, window=0, rope=RopeConfig(theta=1e3, scaling='linear', factor=2.0))
    gemma = changed(
        llama,
        num_layers=9,
        segments=[
            SegmentConfig(pattern=[changed(BLOCK, mlp_dim=40, activation='gelu')], repeats=1),
            SegmentConfig(pattern=[local, local, local, everywhere], repeats=2),
        ],
        tie_embeddings=True,
        embedding_scale=4.0,
        logits_softcap=5.0,
    )
    # Biases and adapters everywhere, post-norms only, no gate, no positions in every second block.
    biases = dict(qkv_bias=True, output_bias=True, mlp_bias=True, gated=False)
    llama3 = RopeConfig(scaling='llama3', factor=4.0, original_max_position=16)
    rotary = changed(
        BLOCK, **biases, rope=llama3, pre_norm=False, post_norm=True, activation='relu_squared'
    )
    nope = changed(BLOCK, **biases, rope=None, num_kv_heads=4, window=6)
    # q and k norms over all heads, and YaRN, as in OLMo 3.
    yarn = RopeConfig(scaling='yarn', factor=4.0, original_max_position=8, theta=100.0)
    olmo = changed(BLOCK, qk_norm=True, joint_qk_norm=True, rope=yarn)
    mixed = changed(
        llama,
        num_layers=5,
        segments=[
            SegmentConfig(pattern=[rotary, nope], repeats=2),
            SegmentConfig(pattern=[olmo], repeats=1),
        ],
        embedding_norm=True,
        lora=LoraConfig(rank=3, alpha=2.0, targets=['all']),
    )
    return {'llama': llama, 'gemma': gemma, 'mixed': mixed}


CONFIGS = _configs()


@dataclasses.dataclass
class Model:
    """A config with random weights, including norms and biases, and its compiled functions."""

    config: TransformerConfig
    parts: state.Parts
    params: dict[str, jax.Array]

    @functools.cached_property
    def _forward(self):
        def forward(params, tokens, positions, segment_ids, cache):
            model = self.parts.merge(params)
            hidden, extras = model(tokens, positions, segment_ids, cache)
            values = jax.nn.log_softmax(logits(hidden, model.unembed()))
            cache = extras.get('cache')
            return hidden, values[..., : self.config.vocab_size], cache

        return jax.jit(forward)

    def __call__(self, tokens, positions, segment_ids, cache=None):
        """-> hidden [B, T, D], log-probs [B, T, V], cache."""
        hidden, logprobs, cache = self._forward(self.params, tokens, positions, segment_ids, cache)
        return np.asarray(hidden), np.asarray(logprobs), cache

    def new_cache(self, length):
        """An empty cache for B rows of up to `length` tokens, whose pages lie in any order."""
        count = -(-length // PAGE_SIZE)
        pages = np.random.default_rng(0).permutation(B * count) + 1
        cache = init_cache(self.config, B * count + 1, PAGE_SIZE, jnp.float32)
        return with_table(cache, jnp.asarray(pages.reshape(B, count), jnp.int32))


def make_model(config: TransformerConfig, seed: int = 0) -> Model:
    parts = state.split(lambda key: Transformer(config, nnx.Rngs(key)))
    random = np.random.default_rng(seed)
    params = {}
    for path, leaf in parts.shapes.items():
        centre = 0.4 if path.endswith('scale') else 0.0
        params[path] = jnp.asarray(centre + 0.2 * random.normal(size=leaf.shape), leaf.dtype)
    return Model(config, parts, params)


@pytest.fixture(scope='session', params=CONFIGS)
def model(request) -> Model:
    """Each of the small models in turn."""
    return make_model(CONFIGS[request.param])


@pytest.fixture(scope='session')
def configs() -> dict[str, TransformerConfig]:
    return CONFIGS


@pytest.fixture(scope='session')
def build():
    """config -> Model."""
    return make_model


@pytest.fixture
def batch():
    """tokens, positions, segment_ids [B, T]; each row is one document."""
    tokens = np.random.default_rng(0).integers(0, 60, (B, T)).astype(np.int32)
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    return tokens, positions, np.ones((B, T), np.int32)


@pytest.fixture(scope='module', autouse=True)
def _compile_quickly(quick_compilation):
    """Compiles without optimisation: these tests spend nearly all their time compiling."""

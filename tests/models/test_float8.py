"""Training with float8 matmuls: it learns as in bfloat16; adapters and old GPUs refuse it."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxfm.errors import ConfigError
from jaxfm.models import TransformerConfig
from jaxfm.models.implementations import check_matmuls
from jaxfm.models.kv_cache import init_cache, with_table
from jaxfm.models.transformer import Transformer
from jaxfm.objectives import NextTokenConfig
from jaxfm.objectives.next_token import NextToken
from jaxfm.optim import AdamWConfig
from jaxfm.optim.adamw import AdamW
from jaxfm.state import init_state, make_train_step, split

pytestmark = pytest.mark.usefixtures('quick_compilation')

V, B, T, STEPS = 32, 8, 32, 40
MODEL = dict(
    vocab_size=V,
    vocab_multiple=1,
    embed_dim=32,
    num_layers=2,
    block=dict(num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=64),
    compute_dtype='bfloat16',
)


def batches():
    """Chains of tokens in which every token has four successors: about 1.1 nats per token."""
    draw = np.random.default_rng(0)
    successors = draw.integers(0, V, (V, 4))
    for _ in range(STEPS):
        rows = np.empty((B, T + 1), np.int32)
        rows[:, 0] = draw.integers(0, V, B)
        for i in range(T):
            which = draw.choice(4, B, p=[0.6, 0.2, 0.1, 0.1])
            rows[:, i + 1] = successors[rows[:, i], which]
        yield {
            'tokens': rows[:, :-1],
            'targets': rows[:, 1:],
            'positions': np.tile(np.arange(T, dtype=np.int32), (B, 1)),
            'segment_ids': np.ones((B, T), np.int32),
            'loss_mask': np.ones((B, T), np.float32),
        }


def train(matmul_dtype: str) -> list[float]:
    """The loss of every step."""
    config = TransformerConfig.model_validate({**MODEL, 'matmul_dtype': matmul_dtype})

    def make(key):
        return Transformer(config, nnx.Rngs(key))

    parts = split(make)
    rule = AdamWConfig(learning_rate=1e-2, warmup_steps=10)
    adamw = AdamW(rule, STEPS, {path: parts.axes[path] for path in parts.trainable})
    state = init_state(make, parts, adamw, 0)
    step = make_train_step(parts, NextToken(NextTokenConfig()), adamw, clip_norm=1.0)
    losses = []
    for batch in batches():
        state, metrics = step(state, batch)
        losses.append(float(metrics['loss']))
    assert int(state.counters['skipped']) == 0
    return losses


def test_the_loss_of_a_small_run_is_within_one_per_cent_of_that_in_bfloat16():
    ours, theirs = train('float8'), train('compute')
    assert theirs[0] > 3.3 and np.mean(theirs[-10:]) < 2
    assert ours != theirs
    assert np.mean(ours[-10:]) == pytest.approx(np.mean(theirs[-10:]), rel=0.01)


def test_only_blocks_multiply_in_float8_and_never_with_a_cache():
    config = TransformerConfig.model_validate({**MODEL, 'matmul_dtype': 'float8'})
    model = Transformer(config, nnx.Rngs(0))
    tokens, ones = jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), jnp.int32)
    positions = jnp.arange(4)[None]

    def forward(cache):
        hidden, _ = model(tokens, positions, ones, cache)
        return model.unembed().weight_VD.T, hidden

    trained = str(jax.make_jaxpr(lambda: forward(None))())
    assert trained.count('f8_e4m3fn[') > 0
    cache = with_table(init_cache(config, 3, 4, jnp.bfloat16), jnp.ones((1, 2), jnp.int32))
    assert 'f8_e4m3fn[' not in str(jax.make_jaxpr(lambda: forward(cache))())


def test_float8_is_refused_with_adapters_and_on_old_gpus():
    with pytest.raises(ValueError, match='with lora use compute'):
        TransformerConfig.model_validate({**MODEL, 'matmul_dtype': 'float8', 'lora': {}})
    config = TransformerConfig.model_validate({**MODEL, 'matmul_dtype': 'float8'})

    @dataclasses.dataclass
    class Device:
        compute_capability: str
        device_kind: str = 'NVIDIA A100-SXM4-40GB'
        platform: str = 'gpu'

    def mesh_of(capability):
        return types.SimpleNamespace(devices=np.array([Device(capability)]))

    for capability in ('8.9', '9.0', '10.0', '12.0'):
        check_matmuls(config, mesh_of(capability))
    with pytest.raises(ConfigError, match=r'A100.*compute capability 8.0.*needs 8.9'):
        check_matmuls(config, mesh_of('8.0'))

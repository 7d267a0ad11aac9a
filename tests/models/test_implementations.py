"""The implementations of a model's ops: chosen with a reason, or refused.

A model with simulated kernels has the loss and gradients of a model without them.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxfm import sharding
from jaxfm.errors import ConfigError
from jaxfm.models import BlockConfig, ImplementationsConfig, TransformerConfig
from jaxfm.models.implementations import choices
from jaxfm.models.transformer import Transformer

T = 24
# Two documents and padding; one document.
POSITIONS = np.array([[*range(9), *range(11), 0, 0, 0, 0], range(T)], np.int32)
SEGMENTS = np.array([[1] * 9 + [2] * 11 + [0] * 4, [1] * T], np.int32)


def hidden_and_gradients(**words):
    config = TransformerConfig(
        vocab_size=64,
        embed_dim=64,
        num_layers=2,
        block=BlockConfig(num_heads=2, num_kv_heads=1, head_dim=64, mlp_dim=64, qk_norm=True),
        # Without casts nothing is recomputed; a simulated kernel cannot be.
        param_dtype='bfloat16',
        compute_dtype='bfloat16',
        implementations=ImplementationsConfig(**words),
    )
    model = Transformer(config, nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 64, (2, T))
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, T, 64)), jnp.float32)

    def total(model):
        hidden, _ = model(tokens, POSITIONS, SEGMENTS)
        return jnp.sum(hidden.astype(jnp.float32) * weights * (SEGMENTS > 0)[:, :, None]), hidden

    (_, hidden), gradients = nnx.value_and_grad(total, has_aux=True)(model)
    leaves = [hidden * (SEGMENTS > 0)[:, :, None], *jax.tree.leaves(gradients)]
    return [np.asarray(leaf, np.float64) for leaf in leaves]


@pytest.mark.slow
def test_kernels_change_nothing_but_rounding(interpreter):
    kernels = hidden_and_gradients(attention='interpret', rms_norm='interpret')
    for ours, xla in zip(kernels, hidden_and_gradients(), strict=True):
        assert np.linalg.norm(ours - xla) <= 0.02 * np.linalg.norm(xla)


def changed(group, **changes):
    return type(group)(**{**dict(group), **changes})


BLOCK_1B = BlockConfig(num_heads=32, num_kv_heads=8, head_dim=64, mlp_dim=8192)
LLAMA_1B = TransformerConfig(
    vocab_size=128256, embed_dim=2048, num_layers=16, block=BLOCK_1B, tie_embeddings=True
)


def on_gpus(kind='NVIDIA H200', **sizes):
    """A mesh of devices that need not be present."""
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=132, platform='gpu')
    mesh = jax.sharding.AbstractMesh(
        tuple((dict.fromkeys(sharding.MESH_AXES, 1) | sizes).values()),
        sharding.MESH_AXES,
        axis_types=(jax.sharding.AxisType.Explicit,) * len(sharding.MESH_AXES),
        abstract_device=device,
    )
    return types.SimpleNamespace(abstract_mesh=mesh)


def with_ops(block=BLOCK_1B, **implementations):
    words = ImplementationsConfig(**implementations)
    return changed(LLAMA_1B, block=block, implementations=words)


def test_every_op_has_a_choice_and_a_reason():
    chosen = choices(with_ops(rms_norm='mosaic'), on_gpus())
    assert chosen.keys() == {'attention', 'decode_attention', 'rms_norm', 'token_logprobs'}
    assert (chosen['rms_norm'].name, chosen['attention'].name) == ('mosaic', 'xla')
    assert 'requested by name' in chosen['rms_norm'].reason
    assert 'not proven on NVIDIA H200' in chosen['attention'].reason


@pytest.mark.parametrize(
    'mesh, block, words, sentence',
    [
        (on_gpus('NVIDIA A100-SXM4-40GB'), {}, dict(attention='mosaic'), 'needs a Hopper GPU'),
        (on_gpus(), dict(head_dim=80), dict(attention='mosaic'), '64, 128, 256, not 80'),
        (on_gpus(), {}, dict(attention='cudnn'), 'across documents'),
        (on_gpus(), dict(attention_softcap=50.0), dict(attention='cudnn', one_document=True),
         'no soft-cap'),
        (on_gpus(context=4), {}, dict(attention='cudnn', one_document=True), 'split over context'),
        (on_gpus(), {}, dict(attention='fa3'), 'flash-attn3-jax'),
        (on_gpus(), dict(qk_norm=True, head_dim=48), dict(rms_norm='mosaic'), 'not 48'),
        (on_gpus(tensor=2), dict(qk_norm=True, joint_qk_norm=True), dict(rms_norm='mosaic'),
         'sharded over tensor'),
    ],
)  # fmt: skip
def test_a_name_that_cannot_run_is_a_config_error(mesh, block, words, sentence):
    model = with_ops(changed(BLOCK_1B, **block), **words)
    with pytest.raises(ConfigError, match='^config.model.implementations.') as told:
        choices(model, mesh)
    assert sentence in str(told.value)


def test_an_implementation_that_suits_the_model_can_be_named():
    words = dict(attention='cudnn', rms_norm='mosaic', one_document=True)
    chosen = choices(with_ops(**words), on_gpus(fsdp=2, tensor=2))
    assert (chosen['attention'].name, chosen['rms_norm'].name) == ('cudnn', 'mosaic')


def test_an_implementation_that_the_dtype_forbids_is_a_config_error():
    model = changed(with_ops(token_logprobs='mosaic'), compute_dtype='float32')
    with pytest.raises(ConfigError, match='implementations.token_logprobs.*not float32'):
        choices(model, on_gpus())

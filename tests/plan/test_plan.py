"""Parameters, FLOPs and bytes that a config will need, against arithmetic done by hand."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxfm import sharding, state
from jaxfm.errors import ConfigError
from jaxfm.models import BlockConfig, ImplementationsConfig, SegmentConfig, TransformerConfig
from jaxfm.models.transformer import Transformer
from jaxfm.plan import plan


def changed(group, **changes):
    return type(group)(**{**dict(group), **changes})


BLOCK_1B = BlockConfig(num_heads=32, num_kv_heads=8, head_dim=64, mlp_dim=8192)
LLAMA_1B = TransformerConfig(
    vocab_size=128256, embed_dim=2048, num_layers=16, block=BLOCK_1B, tie_embeddings=True
)


def test_one_token_of_the_1b_shape_is_8_22_gflop():
    flops = plan.model_flops_per_token(LLAMA_1B, 4096)
    per_layer = 2048 * (2 * 32 * 64 + 2 * 8 * 64) + 3 * 2048 * 8192
    matmuls = 6 * (16 * per_layer + 128256 * 2048)
    attention = 16 * 3 * 4 * 2048 * (4096 / 2)
    assert flops == matmuls + attention
    assert round(flops / 1e9, 2) == 8.22


def test_without_the_causal_half_attention_counts_twice():
    full = plan.model_flops_per_token(LLAMA_1B, 4096, causal=False)
    difference = full - plan.model_flops_per_token(LLAMA_1B, 4096)
    assert difference == 16 * 3 * 4 * 2048 * (4096 / 2)


@pytest.mark.parametrize('length, window', [(16, 0), (16, 4), (16, 16), (16, 100), (7, 3)])
def test_visible_keys_are_the_area_under_the_mask(length, window):
    """The count is that of the continuous triangle: the diagonal is half visible."""
    query, key = np.arange(length)[:, None], np.arange(length)
    reach = window or length
    seen = ((key <= query) & (query - key < reach)).sum()
    half_diagonals = length / 2 - (length - min(reach, length)) / 2
    expected = (seen - half_diagonals) / length
    assert plan.visible_keys(length, window, causal=True) == pytest.approx(expected)
    assert plan.visible_keys(length, window, causal=False) == min(reach, length)


def test_windows_and_segments_count_layer_by_layer():
    local = changed(BLOCK_1B, window=512)
    mixed = changed(
        LLAMA_1B, segments=[SegmentConfig(pattern=[local, local, local, BLOCK_1B], repeats=4)]
    )
    saved = 3 * 4 * 2048 * (4096 / 2 - (512 - 512**2 / (2 * 4096))) * 12
    flops = plan.model_flops_per_token(LLAMA_1B, 4096) - plan.model_flops_per_token(mixed, 4096)
    assert flops == pytest.approx(saved)


def test_a_block_without_a_gate_has_one_matrix_less():
    plain = changed(LLAMA_1B, block=changed(BLOCK_1B, gated=False))
    flops = plan.model_flops_per_token(LLAMA_1B, 8) - plan.model_flops_per_token(plain, 8)
    assert flops == 6 * 16 * 2048 * 8192


def test_tying_saves_parameters_and_no_flops():
    untied = changed(LLAMA_1B, tie_embeddings=False)
    assert plan.model_flops_per_token(untied, 64) == plan.model_flops_per_token(LLAMA_1B, 64)
    counts = [
        plan.num_parameters(state.split(lambda key, c=c: Transformer(c, nnx.Rngs(key))).shapes)
        for c in (LLAMA_1B, untied)
    ]
    assert counts[0] == 1_235_814_400  # as published
    assert counts[1] - counts[0] == 128256 * 2048


def test_bytes_are_those_of_the_fullest_device():
    with jax.set_mesh(sharding.make_mesh({a: 1 for a in sharding.MESH_AXES} | {'fsdp': 8})):
        mesh = jax.sharding.get_mesh()
        split = jax.NamedSharding(mesh, sharding.stored_spec(('embed', 'norm')))
        whole = jax.NamedSharding(mesh, sharding.stored_spec(('norm',)))
        tree = {
            'matrix': jax.ShapeDtypeStruct((16, 3), jnp.bfloat16, sharding=split),
            'vector': jnp.zeros(5, jnp.float32, device=whole),
        }
    assert plan.bytes_per_device(tree) == 2 * 3 * 2 + 5 * 4
    assert plan.bytes_total(tree) == 16 * 3 * 2 + 5 * 4


def on_gpus(kind='NVIDIA H200', **sizes):
    """A mesh of devices that are not here."""
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


def test_every_op_of_the_model_is_told_with_the_reason():
    chosen = plan.choices(with_ops(rms_norm='mosaic'), on_gpus())
    assert chosen.keys() == {'attention', 'rms_norm', 'token_logprobs'}
    assert (chosen['rms_norm'].name, chosen['attention'].name) == ('mosaic', 'xla')
    assert 'asked for by name' in chosen['rms_norm'].reason
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
        (on_gpus(), dict(qk_norm=True, head_dim=48), dict(rms_norm='mosaic'), 'these have 48'),
        (on_gpus(tensor=2), dict(qk_norm=True, joint_qk_norm=True), dict(rms_norm='mosaic'),
         'split over tensor'),
    ],
)  # fmt: skip
def test_a_name_that_cannot_run_is_an_error_of_the_config(mesh, block, words, sentence):
    model = with_ops(changed(BLOCK_1B, **block), **words)
    with pytest.raises(ConfigError, match='^config.model.implementations.') as told:
        plan.choices(model, mesh)
    assert sentence in str(told.value)


def test_what_suits_the_model_can_be_named():
    words = dict(attention='cudnn', rms_norm='mosaic', one_document=True)
    chosen = plan.choices(with_ops(**words), on_gpus(fsdp=2, tensor=2))
    assert (chosen['attention'].name, chosen['rms_norm'].name) == ('cudnn', 'mosaic')


def test_what_the_dtype_forbids_is_an_error_of_the_config():
    model = changed(with_ops(token_logprobs='mosaic'), compute_dtype='float32')
    with pytest.raises(ConfigError, match='implementations.token_logprobs.*not float32'):
        plan.choices(model, on_gpus())

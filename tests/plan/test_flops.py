"""Parameter and FLOP counts of a config against arithmetic done by hand."""

import numpy as np
import pytest
from flax import nnx

from jaxfm import state
from jaxfm.models import BlockConfig, SegmentConfig, TransformerConfig
from jaxfm.models.transformer import Transformer
from jaxfm.plan.flops import forward_flops, model_flops_per_token, visible_keys
from jaxfm.plan.memory import num_parameters


def changed(group, **changes):
    return type(group)(**{**dict(group), **changes})


BLOCK_1B = BlockConfig(num_heads=32, num_kv_heads=8, head_dim=64, mlp_dim=8192)
LLAMA_1B = TransformerConfig(
    vocab_size=128256, embed_dim=2048, num_layers=16, block=BLOCK_1B, tie_embeddings=True
)


def test_one_token_of_the_1b_shape_is_8_22_gflop():
    flops = model_flops_per_token(LLAMA_1B, 4096)
    per_layer = 2048 * (2 * 32 * 64 + 2 * 8 * 64) + 3 * 2048 * 8192
    matmuls = 6 * (16 * per_layer + 128256 * 2048)
    attention = 16 * 3 * 4 * 2048 * (4096 / 2)
    assert flops == matmuls + attention
    assert round(flops / 1e9, 2) == 8.22


def test_without_the_causal_half_attention_counts_twice():
    full = model_flops_per_token(LLAMA_1B, 4096, causal=False)
    difference = full - model_flops_per_token(LLAMA_1B, 4096)
    assert difference == 16 * 3 * 4 * 2048 * (4096 / 2)


def test_a_forward_pass_is_a_third_and_adds_up_over_tokens_behind_others():
    assert forward_flops(LLAMA_1B, 4096) == pytest.approx(
        4096 * model_flops_per_token(LLAMA_1B, 4096) / 3
    )
    assert forward_flops(LLAMA_1B, 0) == 0
    # The attention of a token behind 999 others, and its matmuls.
    last = forward_flops(LLAMA_1B, 1000) - forward_flops(LLAMA_1B, 999)
    matmuls = model_flops_per_token(LLAMA_1B, 1) / 3 - 16 * 4 * 2048 / 2
    assert last == pytest.approx(matmuls + 16 * 4 * 2048 * 999.5)


@pytest.mark.parametrize('length, window', [(16, 0), (16, 4), (16, 16), (16, 100), (7, 3)])
def test_visible_keys_are_the_area_under_the_mask(length, window):
    """The count is the area of the continuous triangle: the diagonal is half visible."""
    query, key = np.arange(length)[:, None], np.arange(length)
    reach = window or length
    seen = ((key <= query) & (query - key < reach)).sum()
    half_diagonals = length / 2 - (length - min(reach, length)) / 2
    expected = (seen - half_diagonals) / length
    assert visible_keys(length, window, causal=True) == pytest.approx(expected)
    assert visible_keys(length, window, causal=False) == min(reach, length)


def test_windows_and_segments_are_counted_layer_by_layer():
    local = changed(BLOCK_1B, window=512)
    mixed = changed(
        LLAMA_1B, segments=[SegmentConfig(pattern=[local, local, local, BLOCK_1B], repeats=4)]
    )
    saved = 3 * 4 * 2048 * (4096 / 2 - (512 - 512**2 / (2 * 4096))) * 12
    flops = model_flops_per_token(LLAMA_1B, 4096) - model_flops_per_token(mixed, 4096)
    assert flops == pytest.approx(saved)


def test_a_block_without_a_gate_has_one_matrix_fewer():
    plain = changed(LLAMA_1B, block=changed(BLOCK_1B, gated=False))
    flops = model_flops_per_token(LLAMA_1B, 8) - model_flops_per_token(plain, 8)
    assert flops == 6 * 16 * 2048 * 8192


def test_tying_saves_parameters_but_no_flops():
    untied = changed(LLAMA_1B, tie_embeddings=False)
    assert model_flops_per_token(untied, 64) == model_flops_per_token(LLAMA_1B, 64)
    counts = [
        num_parameters(state.split(lambda key, c=c: Transformer(c, nnx.Rngs(key))).shapes)
        for c in (LLAMA_1B, untied)
    ]
    assert counts[0] == 1_235_814_400  # as published
    assert counts[1] - counts[0] == 128256 * 2048

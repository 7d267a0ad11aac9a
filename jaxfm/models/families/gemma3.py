"""Gemma 3 (Gemma Team, 2025), text: five local layers per global one, each kind with its RoPE."""

from jaxfm.models.families.base import QK_NORM_WEIGHTS, Family, blocks_of, rope
from jaxfm.models.families.gemma2 import (
    GEMMA_DEFAULTS,
    GEMMA_WEIGHTS,
    gemma_block,
    gemma_keys,
    gemma_model,
)


def _block(hf, layer):
    values = gemma_block(hf, layer, period=hf.get('sliding_window_pattern') or 6)
    return values | dict(qk_norm=True, rope=_local_rope(hf) if values['window'] else rope(hf))


def _local_rope(hf) -> dict:
    if hf.get('rope_parameters'):
        return rope(hf, 'sliding_attention')
    return {'theta': float(hf['rope_local_base_freq']), 'scaling': 'none'}


def _keys(model):
    local = [block.rope for block in blocks_of(model) if block.window and block.rope]
    theta = local[0].theta if local else 10_000.0
    return gemma_keys(model) | {'rope_local_base_freq': theta}


FAMILY = Family(
    model_type='gemma3_text',
    architecture='Gemma3ForCausalLM',
    weights=GEMMA_WEIGHTS | QK_NORM_WEIGHTS,
    block=_block,
    model=gemma_model,
    keys=_keys,
    defaults=GEMMA_DEFAULTS | {'rope_theta': 1_000_000.0, 'rope_local_base_freq': 10_000.0},
)

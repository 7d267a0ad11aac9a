"""Gemma 2 (Gemma Team, 2024): soft-caps, windows in every other layer, pre- and post-norms."""

from jaxfm.models.families.base import (
    LLAMA_WEIGHTS,
    Family,
    blocks_of,
    layer_type_keys,
    layer_types,
)

# Llama's post_attention_layernorm is the norm before the MLP; Gemma's is the norm after attention,
# and the MLP has a norm before and one after.
GEMMA_WEIGHTS = LLAMA_WEIGHTS | {
    'model.layers.{}.post_attention_layernorm.weight': 'post_attention/scale',
    'model.layers.{}.pre_feedforward_layernorm.weight': 'pre_mlp/scale',
    'model.layers.{}.post_feedforward_layernorm.weight': 'post_mlp/scale',
}


def gemma_block(hf, layer: int, period: int) -> dict:
    """The block values that Gemma 2 and 3 share; every `period`-th layer has no window."""
    is_sliding = layer_types(hf, period)[layer] == 'sliding_attention'
    return dict(
        window=hf['sliding_window'] if is_sliding else 0,
        query_scale=float(hf['query_pre_attn_scalar']) ** -0.5,
        attention_softcap=float(hf.get('attn_logit_softcapping') or 0.0),
        qkv_bias=bool(hf.get('attention_bias')),
        output_bias=bool(hf.get('attention_bias')),
        post_norm=True,
        norm_unit_offset=True,
    )


def gemma_model(hf) -> dict:
    """Embeddings are multiplied by sqrt(embed_dim); logits may have a soft-cap."""
    return dict(
        embedding_scale=float(hf['hidden_size']) ** 0.5,
        logits_softcap=float(hf.get('final_logit_softcapping') or 0.0),
    )


def gemma_keys(model) -> dict:
    block = blocks_of(model)[0]
    scale = block.query_scale or block.head_dim**-0.5
    return {
        'hidden_activation': 'gelu_pytorch_tanh',
        'query_pre_attn_scalar': _whole(scale**-2),
        'attn_logit_softcapping': block.attention_softcap or None,
        'final_logit_softcapping': model.logits_softcap or None,
        'attention_bias': block.output_bias,
        **layer_type_keys(model),
    }


def _whole(value: float) -> int | float:
    """Undoes rounding: query_scale is scalar ** -0.5, and transformers wants the scalar whole."""
    return round(value) if abs(value - round(value)) < 1e-6 * value else value


GEMMA_DEFAULTS = {
    'rms_norm_eps': 1e-6,
    'head_dim': 256,
    'hidden_activation': 'gelu_pytorch_tanh',
    'query_pre_attn_scalar': 256,
    'sliding_window': 4096,
    'tie_word_embeddings': True,
}

FAMILY = Family(
    model_type='gemma2',
    architecture='Gemma2ForCausalLM',
    weights=GEMMA_WEIGHTS,
    block=lambda hf, layer: gemma_block(hf, layer, period=2),
    model=gemma_model,
    keys=gemma_keys,
    defaults=GEMMA_DEFAULTS | {'attn_logit_softcapping': 50.0, 'final_logit_softcapping': 30.0},
)

"""SmolLM3 (Hugging Face, 2025): Llama in which every fourth layer has no position embedding."""

from jaxfm.models.families.base import Family, blocks_of, rope
from jaxfm.models.families.qwen2 import window, window_keys


def _window(hf, layer, has_rope):
    """As in Qwen 2, except that without layer_types the layers without RoPE have the window."""
    if hf.get('layer_types'):
        return window(hf, layer)
    is_sliding = hf.get('use_sliding_window') and not has_rope
    return (hf.get('sliding_window') or 0) if is_sliding else 0


def _block(hf, layer):
    bias = bool(hf.get('attention_bias'))
    period = hf.get('no_rope_layer_interval') or 4
    # Despite its name, no_rope_layers has 1 for a layer with RoPE.
    said = hf.get('no_rope_layers')
    has_rope = bool(said[layer]) if said else (layer + 1) % period != 0
    return dict(
        rope=rope(hf) if has_rope else None,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bool(hf.get('mlp_bias')),
        window=_window(hf, layer, has_rope),
    )


def _keys(model):
    blocks = blocks_of(model)
    return {
        'attention_bias': blocks[0].output_bias,
        'mlp_bias': blocks[0].mlp_bias,
        'no_rope_layers': [int(block.rope is not None) for block in blocks],
        **window_keys(model),
    }


FAMILY = Family(
    model_type='smollm3',
    architecture='SmolLM3ForCausalLM',
    block=_block,
    keys=_keys,
    defaults={'rms_norm_eps': 1e-6, 'rope_theta': 2_000_000.0, 'tie_word_embeddings': True},
)

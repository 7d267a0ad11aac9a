"""Qwen 2 and 2.5 (Yang et al., 2024): biases on queries, keys and values."""

from jaxfm.models.families.base import Family, layer_type_keys, layer_types


def window(hf, layer: int) -> int:
    """The window of a layer; only with use_sliding_window, and from max_window_layers on."""
    if not hf.get('use_sliding_window'):
        return 0
    if hf.get('layer_types'):
        is_full = layer_types(hf, period=1)[layer] == 'full_attention'
    else:
        is_full = layer < hf.get('max_window_layers', 28)
    return 0 if is_full else hf['sliding_window']


def window_keys(model) -> dict:
    keys = layer_type_keys(model)
    return keys | {'use_sliding_window': keys['sliding_window'] is not None}


FAMILY = Family(
    model_type='qwen2',
    architecture='Qwen2ForCausalLM',
    block=lambda hf, layer: dict(qkv_bias=True, window=window(hf, layer)),
    keys=window_keys,
    defaults={'rms_norm_eps': 1e-6},
)

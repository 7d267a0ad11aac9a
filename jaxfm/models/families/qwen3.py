"""Qwen 3 (Yang et al., 2025), dense: q and k norms per head, no biases."""

from jaxfm.models.families.base import LLAMA_WEIGHTS, QK_NORM_WEIGHTS, Family, blocks_of
from jaxfm.models.families.qwen2 import window, window_keys


def _block(hf, layer):
    bias = bool(hf.get('attention_bias'))
    return dict(qk_norm=True, qkv_bias=bias, output_bias=bias, window=window(hf, layer))


FAMILY = Family(
    model_type='qwen3',
    architecture='Qwen3ForCausalLM',
    weights=LLAMA_WEIGHTS | QK_NORM_WEIGHTS,
    block=_block,
    keys=lambda model: {'attention_bias': blocks_of(model)[0].output_bias} | window_keys(model),
    defaults={'rms_norm_eps': 1e-6, 'head_dim': 128},
)

"""Phi-3 (Abdin et al., 2024): Llama with fused projections and a window."""

from jaxfm.models.families.base import LLAMA_WEIGHTS, Family, blocks_of

_FUSED = {
    'model.layers.{}.self_attn.qkv_proj.weight': ('attention/q', 'attention/k', 'attention/v'),
    'model.layers.{}.mlp.gate_up_proj.weight': ('mlp/gate_up/0', 'mlp/gate_up/1'),
}
_PARTS = {part for parts in _FUSED.values() for part in parts}

FAMILY = Family(
    model_type='phi3',
    architecture='Phi3ForCausalLM',
    weights={k: v for k, v in LLAMA_WEIGHTS.items() if v not in _PARTS} | _FUSED,
    block=lambda hf, layer: dict(window=hf.get('sliding_window') or 0),
    keys=lambda model: {'sliding_window': blocks_of(model)[0].window or None},
    defaults={'rms_norm_eps': 1e-5},
)

"""Mistral (Jiang et al., 2023): Llama with a sliding window in every layer."""

from jaxfm.models.families.base import Family, blocks_of

FAMILY = Family(
    model_type='mistral',
    architecture='MistralForCausalLM',
    block=lambda hf, layer: dict(window=hf.get('sliding_window') or 0),
    keys=lambda model: {'sliding_window': blocks_of(model)[0].window or None},
    defaults={'rms_norm_eps': 1e-6, 'sliding_window': 4096},
)

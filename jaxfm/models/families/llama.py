"""Llama 2, 3 and 3.1 to 3.3 (Touvron et al., 2023; Grattafiori et al., 2024), and SmolLM2."""

from jaxfm.models.families.base import Family, blocks_of


def _block(hf, layer):
    bias = bool(hf.get('attention_bias'))
    return dict(qkv_bias=bias, output_bias=bias, mlp_bias=bool(hf.get('mlp_bias')))


def _keys(model):
    block = blocks_of(model)[0]
    return {'attention_bias': block.output_bias, 'mlp_bias': block.mlp_bias}


FAMILY = Family(
    model_type='llama',
    architecture='LlamaForCausalLM',
    block=_block,
    keys=_keys,
    defaults={'rms_norm_eps': 1e-6},
)

"""OLMo 2 (OLMo Team, 2024): norms only after attention and MLP; q and k norms over all heads."""

from jaxfm.models.families.base import LLAMA_WEIGHTS, QK_NORM_WEIGHTS, Family, blocks_of

OLMO_WEIGHTS = {
    name: target
    for name, target in (LLAMA_WEIGHTS | QK_NORM_WEIGHTS).items()
    if 'input_layernorm' not in name
} | {
    'model.layers.{}.post_attention_layernorm.weight': 'post_attention/scale',
    'model.layers.{}.post_feedforward_layernorm.weight': 'post_mlp/scale',
}


def olmo_block(hf, layer: int) -> dict:
    bias = bool(hf.get('attention_bias'))
    return dict(
        pre_norm=False,
        post_norm=True,
        qk_norm=True,
        joint_qk_norm=True,
        qkv_bias=bias,
        output_bias=bias,
    )


def olmo_keys(model) -> dict:
    return {'attention_bias': blocks_of(model)[0].output_bias}


FAMILY = Family(
    model_type='olmo2',
    architecture='Olmo2ForCausalLM',
    weights=OLMO_WEIGHTS,
    block=olmo_block,
    keys=olmo_keys,
    defaults={'rms_norm_eps': 1e-5},
)

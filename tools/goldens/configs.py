"""The tiny model of every family: its config, and how transformers 4 would have written it.

Every size is small and unusual, and every feature is set so that leaving it out changes the logits:
windows are shorter than the rows, and scaled rotary frequencies turn visibly within a row.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """A config as transformers takes it, and how released checkpoints in the old layout differ.

    `old` adds to or replaces keys of the generic translation; `unsaid` are keys that they omit.
    """

    model_type: str
    config: dict[str, Any]
    old: dict[str, Any] = field(default_factory=dict)
    unsaid: tuple[str, ...] = ()
    generation: dict[str, Any] = field(default_factory=dict)  # of generation_config.json


# pad_token_id is null because torch zeroes the gradient of that embedding row and we do not.
COMMON = dict(
    vocab_size=67,
    max_position_embeddings=96,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,
)


def shape(embed, mlp, layers, heads, kv_heads, **more) -> dict[str, Any]:
    """The sizes of a model under the names of transformers."""
    return COMMON | dict(
        hidden_size=embed,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        **more,
    )


def rope(theta: float, **scaling) -> dict[str, Any]:
    return dict(rope_type='default', rope_theta=theta) | scaling


# Of the four frequencies, one is kept, one is on the ramp, and two are divided by the factor.
LLAMA3 = rope(
    150.0,
    rope_type='llama3',
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
# Attention factor and theta are the released ones (from an old config, transformers 5 applies any
# other theta only to the full layers); the betas place the ramp where short rows turn.
YARN = rope(
    500_000.0,
    rope_type='yarn',
    factor=8.0,
    original_max_position_embeddings=24,
    attention_factor=1.2079441541679836,
    beta_fast=0.3,
    beta_slow=0.01,
)

FAMILIES = {
    'llama': Family(
        'llama',
        shape(18, 37, 4, 3, 3, rope_parameters=rope(100.0), tie_word_embeddings=False),
        old=dict(pretraining_tp=1),
        unsaid=('head_dim', 'attention_bias', 'mlp_bias'),
    ),
    'llama3': Family(
        'llama',
        shape(32, 47, 2, 4, 2, rope_parameters=LLAMA3, tie_word_embeddings=True)
        | dict(eos_token_id=[2, 5, 7]),
        old=dict(pretraining_tp=1),
        generation=dict(do_sample=True, temperature=0.6, top_p=0.9),
    ),
    'smollm3': Family(
        'smollm3',
        shape(20, 27, 5, 5, 1, rope_parameters=rope(90.0), tie_word_embeddings=True),
        old=dict(max_window_layers=28, pretraining_tp=2),
    ),
    'mistral': Family(
        'mistral',
        shape(18, 41, 4, 4, 2, head_dim=6, rope_parameters=rope(110.0), sliding_window=7)
        | dict(tie_word_embeddings=False),
    ),
    'qwen2': Family(
        'qwen2',
        shape(24, 43, 3, 3, 1, rope_parameters=rope(120.0), tie_word_embeddings=False)
        | dict(use_sliding_window=False, max_window_layers=2, rms_norm_eps=1e-6),
        # Released configs contain the window, but do not use it.
        old=dict(sliding_window=5),
        unsaid=('layer_types', 'rope_scaling'),
    ),
    'qwen3': Family(
        'qwen3',
        shape(20, 33, 4, 4, 2, head_dim=6, rope_parameters=rope(130.0), tie_word_embeddings=True)
        | dict(rms_norm_eps=1e-6),
        unsaid=('layer_types',),
    ),
    'gemma2': Family(
        'gemma2',
        shape(20, 27, 5, 4, 2, head_dim=6, rope_parameters=rope(140.0), tie_word_embeddings=True)
        | dict(
            sliding_window=5,
            query_pre_attn_scalar=11,
            attn_logit_softcapping=2.5,
            final_logit_softcapping=4.0,
            rms_norm_eps=1e-6,
        ),
        old=dict(hidden_act='gelu_pytorch_tanh', cache_implementation='hybrid', pad_token_id=0),
        unsaid=('layer_types', 'use_bidirectional_attention', 'rope_scaling'),
    ),
    'gemma3': Family(
        'gemma3_text',
        shape(16, 27, 7, 2, 1, head_dim=8, tie_word_embeddings=True)
        | dict(
            sliding_window=5,
            query_pre_attn_scalar=11,
            rms_norm_eps=1e-6,
            rope_parameters=dict(
                sliding_attention=rope(30.0),
                full_attention=rope(400.0, rope_type='linear', factor=4.0),
            ),
        ),
        old=dict(sliding_window_pattern=6, cache_implementation='hybrid', pad_token_id=0),
        unsaid=('layer_types', 'use_bidirectional_attention', '_sliding_window_pattern'),
    ),
    'olmo2': Family(
        'olmo2',
        shape(24, 35, 3, 4, 2, rope_parameters=rope(150.0), tie_word_embeddings=False)
        | dict(rms_norm_eps=1e-6),
    ),
    'olmo3': Family(
        'olmo3',
        shape(24, 13, 5, 2, 1, tie_word_embeddings=False)
        | dict(
            sliding_window=6,
            max_position_embeddings=192,
            rms_norm_eps=1e-6,
            rope_parameters=dict(sliding_attention=rope(500_000.0), full_attention=YARN),
        ),
    ),
    'phi3': Family(
        'phi3',
        shape(18, 35, 4, 3, 1, rope_parameters=rope(160.0), sliding_window=9)
        | dict(tie_word_embeddings=False, original_max_position_embeddings=96),
        old=dict(pad_token_id=2, attention_bias=False),
    ),
}


def old_layout(written: dict[str, Any], family: Family) -> dict[str, Any]:
    """Translates a config.json of transformers 5 to what transformers 4 wrote for that model."""
    config = dict(written)
    config['torch_dtype'] = config.pop('dtype')
    config['transformers_version'] = '4.44.0'
    parameters = config.pop('rope_parameters')
    local = parameters.get('sliding_attention')
    scaling = dict(parameters.get('full_attention', parameters))
    config['rope_theta'] = scaling.pop('rope_theta')
    if family.model_type == 'gemma3_text':
        config['rope_local_base_freq'] = local['rope_theta']
    scaling.pop('partial_rotary_factor', None)
    config['rope_scaling'] = None if scaling == {'rope_type': 'default'} else scaling
    config |= family.old
    return {name: config[name] for name in sorted(config) if name not in family.unsaid}

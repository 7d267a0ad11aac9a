"""The supported llama.cpp architectures, as tables.

Each maps a layer's tensor names in `gguf.TensorNameMap` to Hugging Face's.
"""

import dataclasses

_ATTENTION = {
    'attn_q': 'self_attn.q_proj',
    'attn_k': 'self_attn.k_proj',
    'attn_v': 'self_attn.v_proj',
    'attn_output': 'self_attn.o_proj',
}
_MLP = {'ffn_gate': 'mlp.gate_proj', 'ffn_up': 'mlp.up_proj', 'ffn_down': 'mlp.down_proj'}
_FUSED = {
    'attn_qkv': 'self_attn.qkv_proj',
    'attn_output': 'self_attn.o_proj',
    'ffn_up': 'mlp.gate_up_proj',
    'ffn_down': 'mlp.down_proj',
}
_QK_NORM = {'attn_q_norm': 'self_attn.q_norm', 'attn_k_norm': 'self_attn.k_norm'}
_PRE_NORM = {'attn_norm': 'input_layernorm', 'ffn_norm': 'post_attention_layernorm'}
_POST_NORM = {
    'post_attention_norm': 'post_attention_layernorm',
    'post_ffw_norm': 'post_feedforward_layernorm',
}
_BOTH_NORMS = _POST_NORM | {
    'attn_norm': 'input_layernorm',
    'ffn_norm': 'pre_feedforward_layernorm',
}
MATRICES = _ATTENTION | _MLP | _FUSED  # may have a bias; norms have none


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An architecture in llama.cpp's sense.

    Attributes:
        layer: {llama.cpp's tensor name in a layer: Hugging Face's}.
        config: config.json values that the file omits, common to all models of the architecture.
        is_interleaved: in q and k, the two dimensions that RoPE rotates together are adjacent.
        norm_offset: the value that the converter adds to the weights of norms.
        window_pattern: every n-th layer has full attention, the others a window; 0 if not fixed.
    """

    model_type: str
    class_name: str
    layer: dict[str, str]
    config: dict = dataclasses.field(default_factory=lambda: {'hidden_act': 'silu'})
    is_interleaved: bool = False
    norm_offset: float = 0.0
    window_pattern: int = 0


_LLAMA = _ATTENTION | _MLP | _PRE_NORM
_GELU = {'hidden_activation': 'gelu_pytorch_tanh'}
# llama.cpp's defaults for older files, which lack these keys.
_GEMMA2 = _GELU | {
    'attn_logit_softcapping': 50.0,
    'final_logit_softcapping': 30.0,
    'sliding_window': 4096,
}
_GEMMA3 = _GELU | {'rope_theta': 1e6, 'rope_local_base_freq': 1e4}

ARCHITECTURES = {
    'llama': Architecture('llama', 'LlamaForCausalLM', _LLAMA, is_interleaved=True),
    'smollm3': Architecture('smollm3', 'SmolLM3ForCausalLM', _LLAMA, is_interleaved=True),
    'qwen2': Architecture('qwen2', 'Qwen2ForCausalLM', _LLAMA),
    'qwen3': Architecture('qwen3', 'Qwen3ForCausalLM', _LLAMA | _QK_NORM),
    'gemma2': Architecture(
        'gemma2',
        'Gemma2ForCausalLM',
        _ATTENTION | _MLP | _BOTH_NORMS,
        config=_GEMMA2,
        norm_offset=1.0,
        window_pattern=2,
    ),
    'gemma3': Architecture(
        'gemma3_text',
        'Gemma3ForCausalLM',
        _ATTENTION | _MLP | _BOTH_NORMS | _QK_NORM,
        config=_GEMMA3,
        norm_offset=1.0,
        window_pattern=6,
    ),
    'olmo2': Architecture('olmo2', 'Olmo2ForCausalLM', _ATTENTION | _MLP | _POST_NORM | _QK_NORM),
    'phi3': Architecture('phi3', 'Phi3ForCausalLM', _FUSED | _PRE_NORM),
}

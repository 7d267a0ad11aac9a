"""The metadata of a `.gguf` file as a Hugging Face config.json.

What the file omits is filled in as llama.cpp does when it runs the file: Gemma's windows, SmolLM3's
layers without RoPE. The sliding window of Mistral 7B v0.1 is not in any such file; llama.cpp
ignores it, and so do we. RoPE scaling that the converter stored as tensors of factors becomes
`rope_scaling` again.
"""

import math

import numpy as np

from jaxfm.errors import DataError
from jaxfm.pretrained.gguf import container
from jaxfm.pretrained.gguf.architectures import Architecture

# {llama.cpp's key, after the architecture prefix: config.json's key}. Required in every file:
_COUNTS = {
    'block_count': 'num_hidden_layers',
    'embedding_length': 'hidden_size',
    'feed_forward_length': 'intermediate_size',
    'attention.head_count': 'num_attention_heads',
    'context_length': 'max_position_embeddings',
}
_NUMBERS = {'attention.layer_norm_rms_epsilon': 'rms_norm_eps'}
# Optional:
_SOME_COUNTS = {
    'attention.head_count_kv': 'num_key_value_heads',
    'attention.key_length': 'head_dim',
    'attention.sliding_window': 'sliding_window',
}
_SOME_NUMBERS = {
    'rope.freq_base': 'rope_theta',
    'rope.freq_base_swa': 'rope_local_base_freq',
    'attn_logit_softcapping': 'attn_logit_softcapping',
    'final_logit_softcapping': 'final_logit_softcapping',
}
_SCALING = {
    'factor': 'factor',
    'original_context_length': 'original_max_position_embeddings',
    'attn_factor': 'attention_factor',
    'yarn_ext_factor': 'extrapolation_factor',
    'yarn_attn_factor': 'attention_factor',
    'yarn_beta_fast': 'beta_fast',
    'yarn_beta_slow': 'beta_slow',
}
_LLAMA3_CONTEXT = 8192
_TOKENS = {'bos_token_id': 'bos', 'eos_token_id': 'eos', 'pad_token_id': 'padding'}


class Keys:
    """The metadata keys of an architecture; raises DataError for impossible numbers."""

    def __init__(self, metadata: dict, architecture: str):
        self.metadata, self._architecture = metadata, architecture

    def get(self, key: str):
        return self.metadata.get(f'{self._architecture}.{key}')

    def number(self, key: str):
        """The number at a key, or None; DataError if it differs between layers."""
        value = self.get(key)
        values = set(value) if isinstance(value, list) else {value}
        if len(values) > 1:
            raise DataError(
                f'has layers with different {self._architecture}.{key}, which is not supported: '
                f'{value}'
            )
        value = values.pop() if values else None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 <= value < math.inf):
            raise DataError(
                f'has {self._architecture}.{key} {value!r}, which must be a number of at least 0'
            )
        return value

    def count(self, key: str) -> int | None:
        value = self.number(key)
        if isinstance(value, float):
            raise DataError(f'has {self._architecture}.{key} {value}, which is not a whole number')
        return value

    def read_required(self) -> dict:
        """The required values by config.json key; DataError if any is missing."""
        found = {name: self.count(key) for key, name in _COUNTS.items()}
        found |= {name: self.number(key) for key, name in _NUMBERS.items()}
        keys = {name: f'{self._architecture}.{key}' for key, name in (_COUNTS | _NUMBERS).items()}
        if missing := [keys[name] for name, value in found.items() if not value]:
            raise DataError(f'lacks the metadata {", ".join(missing)}')
        return found

    def read_optional(self, keys: dict[str, str], read) -> dict:
        """The present values among `keys` by config.json key, each read by `read`."""
        found = {name: read(key) for key, name in keys.items()}
        return {name: value for name, value in found.items() if value is not None}


def hf_config(
    architecture: Architecture, name: str, metadata: dict, stored: dict[str, container.Tensor]
) -> dict:
    """The equivalent of config.json, without token ids; DataError if it is unsupported."""
    keys = Keys(metadata, name)
    if keys.number('expert_count'):
        raise DataError('is a mixture of experts, which is not supported')
    config = {'model_type': architecture.model_type, 'architectures': [architecture.class_name]}
    config |= keys.read_required()
    heads, layers = config['num_attention_heads'], config['num_hidden_layers']
    if layers > len(stored):
        raise DataError(f'has only {len(stored)} tensors for {layers} layers')
    config |= {
        'head_dim': config['hidden_size'] // heads,
        'num_key_value_heads': heads,
        'rope_theta': 10000.0,
        'tie_word_embeddings': 'output.weight' not in stored,
        'attention_bias': 'blk.0.attn_q.bias' in stored,
        'mlp_bias': 'blk.0.ffn_up.bias' in stored,
        **architecture.config,
        **keys.read_optional(_SOME_COUNTS, keys.count),
        **keys.read_optional(_SOME_NUMBERS, keys.number),
    }
    if not (config['head_dim'] and config['num_key_value_heads'] and config['rope_theta']):
        raise DataError('has a head size, number of key-value heads or RoPE base of zero')
    if keys.number('attention.value_length') not in (None, config['head_dim']):
        raise DataError('has values and keys of different head sizes, which is not supported')
    config['vocab_size'] = _vocabulary_size(keys, stored)
    config |= _window(architecture, config, keys)
    config |= _rope(config, keys, stored)
    config |= _known_of_family(config)
    return config


def _vocabulary_size(keys: Keys, stored: dict[str, container.Tensor]) -> int:
    if 'token_embd.weight' not in stored:
        raise DataError('lacks the tensor token_embd.weight')
    rows = stored['token_embd.weight'].shape[0]
    tokens = keys.metadata.get('tokenizer.ggml.tokens')
    if isinstance(tokens, list) and len(tokens) > rows:
        raise DataError(f'has a tokenizer of {len(tokens)} tokens, but embeddings for only {rows}')
    return rows


def _window(architecture: Architecture, config: dict, keys: Keys) -> dict:
    """The sliding window and the layers that have it, as config.json keys."""
    pattern = keys.get('attention.sliding_window_pattern') or architecture.window_pattern
    if not config.get('sliding_window'):  # 0 in files of Phi-3 without a window
        return {'sliding_window': None}
    said = {}
    if architecture.model_type == 'llama':
        said = {'model_type': 'mistral', 'architectures': ['MistralForCausalLM']}
    if architecture.model_type == 'olmo2':  # llama.cpp's name for OLMo 2 and 3
        said = {'model_type': 'olmo3', 'architectures': ['Olmo3ForCausalLM']}
    layers = range(config['num_hidden_layers'])
    if isinstance(pattern, int):
        pattern = pattern and [(i + 1) % pattern for i in layers]
    if pattern:
        if not isinstance(pattern, list) or len(pattern) != len(layers):
            raise DataError(f'has the window pattern {pattern!r} for {len(layers)} layers')
        kinds = ('full_attention', 'sliding_attention')
        said['layer_types'] = [kinds[bool(has_window)] for has_window in pattern]
    return said


def _rope(config: dict, keys: Keys, stored: dict[str, container.Tensor]) -> dict:
    """RoPE scaling and the rotated part of a head, as config.json keys."""
    said = {}
    turned = keys.count('rope.dimension_count') or config['head_dim']
    if turned > config['head_dim']:
        raise DataError(f'rotates {turned} dimensions of heads of only {config["head_dim"]}')
    if turned < config['head_dim']:
        said['partial_rotary_factor'] = turned / config['head_dim']
    scaling_keys = {f'rope.scaling.{key}': name for key, name in _SCALING.items()}
    scaling = keys.read_optional(scaling_keys, keys.number)
    if context := scaling.get('original_max_position_embeddings'):
        said['original_max_position_embeddings'] = context
    kind = keys.get('rope.scaling.type') or ('linear' if scaling.get('factor', 1) != 1 else 'none')
    if not isinstance(kind, str):
        raise DataError(f'has rope.scaling.type {kind!r}, which must be a string')
    long, short = (stored.get(f'rope_factors_{which}.weight') for which in ('long', 'short'))
    if 'rope_freqs.weight' in stored:
        factors = stored['rope_freqs.weight'].read().ravel()
        said['rope_scaling'] = _llama3_scaling(factors, config['rope_theta'], turned)
    elif long and short:
        said['rope_scaling'] = {
            'rope_type': 'longrope',
            'long_factor': [container.shortest_decimal(value) for value in long.read().ravel()],
            'short_factor': [container.shortest_decimal(value) for value in short.read().ravel()],
        }
    elif kind != 'none':
        said['rope_scaling'] = {'rope_type': kind, **scaling}
    return said


def _llama3_scaling(factors: np.ndarray, theta: float, turned: int) -> dict | None:
    """The `rope_scaling` of Llama 3.1 from its factors per wavelength; None if all factors are 1.

    A wave that turns more than `high` times within the original context is unchanged, one that
    turns less than `low` times is stretched by `factor`; in between, 1 / stretch is linear in the
    number of turns. The factors determine `low` and `high` only relative to the context length,
    which is therefore assumed to be Llama 3's.

    Raises:
        DataError: the factors are not of this form.
    """
    if np.all(factors == 1):
        return None
    factor = container.shortest_decimal(factors.max()) if len(factors) else 0
    if factor > 1 and 2 * len(factors) == turned:
        turns = _LLAMA3_CONTEXT * theta ** (-np.arange(0, turned, 2) / turned) / (2 * np.pi)
        for low, high in ((1.0, 4.0), *_fit_line(factors, turns)):  # Llama 3's values first
            part = np.clip((turns - low) / (high - low), 0, 1)
            if np.allclose(1 / ((1 - part) / factor + part), factors, rtol=1e-4):
                return {
                    'rope_type': 'llama3',
                    'factor': factor,
                    'low_freq_factor': low,
                    'high_freq_factor': high,
                    'original_max_position_embeddings': _LLAMA3_CONTEXT,
                }
    raise DataError("has a rope_freqs.weight unlike Llama 3's, which is not supported")


def _fit_line(factors: np.ndarray, turns: np.ndarray) -> list[tuple[float, float]]:
    """[(low, high)] of the line through two intermediate factors, [] without two of them."""
    between = np.flatnonzero((factors > 1) & (factors < factors.max()))
    if len(set(factors[between])) < 2 or len(set(turns)) < len(turns):
        return []
    (part, last_part), (turn, last_turn) = 1 / factors[between[[0, -1]]], turns[between[[0, -1]]]
    scale = 1 / factors.max()
    slope = (last_part - part) / (last_turn - turn) / (1 - scale)
    low = turn - (part - scale) / (1 - scale) / slope
    return [(round(float(low), 3), round(float(low + 1 / slope), 3))]


def _known_of_family(config: dict) -> dict:
    """config.json keys that the files omit because llama.cpp hard-codes them per family."""
    layers, heads = config['num_hidden_layers'], config['num_attention_heads']
    match config['model_type']:
        case 'smollm3':
            has_rope = [int((i + 1) % 4 != 0) for i in range(layers)]
            return {'no_rope_layer_interval': 4, 'no_rope_layers': has_rope}
        case 'gemma2' | 'gemma3_text':
            # The 27B models, recognised by their depth, scale differently.
            is_largest = layers == {'gemma2': 46, 'gemma3_text': 62}[config['model_type']]
            scale = config['hidden_size'] // heads if is_largest else config['head_dim']
            return {'query_pre_attn_scalar': scale}
        case 'qwen2' | 'qwen3':
            return {'use_sliding_window': False}
    return {}


def token_ids(metadata: dict) -> dict:
    """The special token ids as in config.json; an end-of-turn token is a second eos."""
    found = {name: metadata.get(f'tokenizer.ggml.{key}_token_id') for name, key in _TOKENS.items()}
    turn = metadata.get('tokenizer.ggml.eot_token_id')
    for name, i in (*found.items(), ('eot_token_id', turn)):
        if i is not None and not isinstance(i, int):
            raise DataError(f'has {name} {i!r}, which is not a token id')
    if turn is not None and found['eos_token_id'] not in (None, turn):
        found['eos_token_id'] = [found['eos_token_id'], turn]
    return {name: i for name, i in found.items() if i is not None}

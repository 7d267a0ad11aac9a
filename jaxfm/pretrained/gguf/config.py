"""The metadata of a `.gguf` file as the config.json of Hugging Face.

What the file leaves out is filled in as llama.cpp does when it runs the file: the windows of Gemma,
the layers of SmolLM3 without RoPE. The sliding window of Mistral 7B v0.1 is in no such file:
llama.cpp does without, and so do we. What the converter keeps as tensors of factors becomes words
again.
"""

import math

import numpy as np

from jaxfm.errors import DataError
from jaxfm.pretrained.gguf import container
from jaxfm.pretrained.gguf.architectures import Architecture

# Words of config.json by llama.cpp's keys behind the architecture's name: what every file has,
_COUNTS = {
    'block_count': 'num_hidden_layers',
    'embedding_length': 'hidden_size',
    'feed_forward_length': 'intermediate_size',
    'attention.head_count': 'num_attention_heads',
    'context_length': 'max_position_embeddings',
}
_NUMBERS = {'attention.layer_norm_rms_epsilon': 'rms_norm_eps'}
# and what some have.
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
    """The metadata of an architecture; DataError for what is no number, or none that can be."""

    def __init__(self, metadata: dict, architecture: str):
        self.metadata, self._architecture = metadata, architecture

    def get(self, key: str):
        return self.metadata.get(f'{self._architecture}.{key}')

    def number(self, key: str):
        """A number, None where there is none; of one a layer, the one of all layers."""
        value = self.get(key)
        values = set(value) if isinstance(value, list) else {value}
        if len(values) > 1:
            raise DataError(f'has layers that differ in {self._architecture}.{key}: {value}')
        value = values.pop() if values else None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 <= value < math.inf):
            raise DataError(f'has {self._architecture}.{key} {value!r}, which cannot be')
        return value

    def count(self, key: str) -> int | None:
        value = self.number(key)
        if isinstance(value, float):
            raise DataError(f'has {self._architecture}.{key} {value}, which is no whole number')
        return value

    def read_required(self) -> dict:
        """What every model has, by the words of config.json."""
        found = {name: self.count(key) for key, name in _COUNTS.items()}
        found |= {name: self.number(key) for key, name in _NUMBERS.items()}
        keys = {name: f'{self._architecture}.{key}' for key, name in (_COUNTS | _NUMBERS).items()}
        if missing := [keys[name] for name, value in found.items() if not value]:
            raise DataError(f'does not say {", ".join(missing)}')
        return found

    def read_optional(self, keys: dict[str, str], read) -> dict:
        """What is there of `keys`, each read by `read`, by the words of config.json."""
        found = {name: read(key) for key, name in keys.items()}
        return {name: value for name, value in found.items() if value is not None}


def hf_config(
    architecture: Architecture, name: str, metadata: dict, stored: dict[str, container.Tensor]
) -> dict:
    """What config.json would say, the ids of tokens apart."""
    keys = Keys(metadata, name)
    if keys.number('expert_count'):
        raise DataError('is a mixture of experts, which is not read')
    config = {'model_type': architecture.model_type, 'architectures': [architecture.class_name]}
    config |= keys.read_required()
    heads, layers = config['num_attention_heads'], config['num_hidden_layers']
    if layers > len(stored):
        raise DataError(f'has {len(stored)} tensors for {layers} layers')
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
        raise DataError('has heads of no size, no heads of keys, or RoPE of no wavelength')
    if keys.number('attention.value_length') not in (None, config['head_dim']):
        raise DataError('has heads whose values have another size than their keys, not read')
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
        raise DataError(f'has a tokenizer of {len(tokens)} tokens and embeddings of {rows}')
    return rows


def _window(architecture: Architecture, config: dict, keys: Keys) -> dict:
    """The sliding window, and which layers have it."""
    pattern = keys.get('attention.sliding_window_pattern') or architecture.window_pattern
    if not config.get('sliding_window'):  # Phi-3 without one says 0
        return {'sliding_window': None}
    said = {}
    if architecture.model_type == 'llama':
        said = {'model_type': 'mistral', 'architectures': ['MistralForCausalLM']}
    if architecture.model_type == 'olmo2':  # llama.cpp has one name for both
        said = {'model_type': 'olmo3', 'architectures': ['Olmo3ForCausalLM']}
    layers = range(config['num_hidden_layers'])
    if isinstance(pattern, int):
        pattern = pattern and [(i + 1) % pattern for i in layers]
    if pattern:
        if not isinstance(pattern, list) or len(pattern) != len(layers):
            raise DataError(f'has windows {pattern!r} for {len(layers)} layers')
        kinds = ('full_attention', 'sliding_attention')
        said['layer_types'] = [kinds[bool(has_window)] for has_window in pattern]
    return said


def _rope(config: dict, keys: Keys, stored: dict[str, container.Tensor]) -> dict:
    """How the wavelengths are scaled, and what part of a head turns."""
    said = {}
    turned = keys.count('rope.dimension_count') or config['head_dim']
    if turned > config['head_dim']:
        raise DataError(f'turns {turned} numbers of heads of {config["head_dim"]}')
    if turned < config['head_dim']:
        said['partial_rotary_factor'] = turned / config['head_dim']
    scaling_keys = {f'rope.scaling.{key}': name for key, name in _SCALING.items()}
    scaling = keys.read_optional(scaling_keys, keys.number)
    if context := scaling.get('original_max_position_embeddings'):
        said['original_max_position_embeddings'] = context
    kind = keys.get('rope.scaling.type') or ('linear' if scaling.get('factor', 1) != 1 else 'none')
    if not isinstance(kind, str):
        raise DataError(f'has rope.scaling.type {kind!r}, which is no name')
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
    """The words of Llama 3.1 for factors of its wavelengths; None where nothing is stretched.

    A wave that turns more than `high` times within the context goes unchanged, one that turns less
    than `low` times is stretched by `factor`, and 1 / stretch is linear in the turns in between.
    Only the ratios of the three are in the factors: the context is taken to be that of Llama 3.
    """
    if np.all(factors == 1):
        return None
    factor = container.shortest_decimal(factors.max()) if len(factors) else 0
    if factor > 1 and 2 * len(factors) == turned:
        turns = _LLAMA3_CONTEXT * theta ** (-np.arange(0, turned, 2) / turned) / (2 * np.pi)
        for low, high in ((1.0, 4.0), *_fit_line(factors, turns)):  # the first are those of Llama 3
            part = np.clip((turns - low) / (high - low), 0, 1)
            if np.allclose(1 / ((1 - part) / factor + part), factors, rtol=1e-4):
                return {
                    'rope_type': 'llama3',
                    'factor': factor,
                    'low_freq_factor': low,
                    'high_freq_factor': high,
                    'original_max_position_embeddings': _LLAMA3_CONTEXT,
                }
    raise DataError('has rope_freqs.weight that are not those of Llama 3, not read')


def _fit_line(factors: np.ndarray, turns: np.ndarray) -> list[tuple[float, float]]:
    """`low` and `high` of the line through two factors that are in between, if there are two."""
    between = np.flatnonzero((factors > 1) & (factors < factors.max()))
    if len(set(factors[between])) < 2 or len(set(turns)) < len(turns):
        return []
    (part, last_part), (turn, last_turn) = 1 / factors[between[[0, -1]]], turns[between[[0, -1]]]
    scale = 1 / factors.max()
    slope = (last_part - part) / (last_turn - turn) / (1 - scale)
    low = turn - (part - scale) / (1 - scale) / slope
    return [(round(float(low), 3), round(float(low + 1 / slope), 3))]


def _known_of_family(config: dict) -> dict:
    """What llama.cpp knows of a family and its files do not say."""
    layers, heads = config['num_hidden_layers'], config['num_attention_heads']
    match config['model_type']:
        case 'smollm3':
            has_rope = [int((i + 1) % 4 != 0) for i in range(layers)]
            return {'no_rope_layer_interval': 4, 'no_rope_layers': has_rope}
        case 'gemma2' | 'gemma3_text':
            # The largest of each (27B) is told by its depth.
            is_largest = layers == {'gemma2': 46, 'gemma3_text': 62}[config['model_type']]
            scale = config['hidden_size'] // heads if is_largest else config['head_dim']
            return {'query_pre_attn_scalar': scale}
        case 'qwen2' | 'qwen3':
            return {'use_sliding_window': False}
    return {}


def token_ids(metadata: dict) -> dict:
    """The ids of tokens; where another token ends a turn, both end a text."""
    found = {name: metadata.get(f'tokenizer.ggml.{key}_token_id') for name, key in _TOKENS.items()}
    turn = metadata.get('tokenizer.ggml.eot_token_id')
    for name, i in (*found.items(), ('eot_token_id', turn)):
        if i is not None and not isinstance(i, int):
            raise DataError(f'has {name} {i!r}, which is no token')
    if turn is not None and found['eos_token_id'] not in (None, turn):
        found['eos_token_id'] = [found['eos_token_id'], turn]
    return {name: i for name, i in found.items() if i is not None}

"""A `.gguf` file of llama.cpp as a Hugging Face model.

What llama.cpp's converter does to a model is undone here: names, the rows of q and k that it lays
out for another form of RoPE, the one that it adds to the norms of Gemma, and what it keeps as
tensors of factors instead of words in the config. What it leaves out is filled in as llama.cpp does
when it runs the file (the windows of Gemma, the layers of SmolLM3 without RoPE). The sliding window
of Mistral 7B v0.1 is in no such file: llama.cpp does without, and so do we.
"""

import dataclasses
import re
from pathlib import Path

import numpy as np

from jaxfm.errors import DataError
from jaxfm.pretrained import gguf_file
from jaxfm.pretrained.source import Pretrained

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
_OUTSIDE = {
    'token_embd': 'model.embed_tokens',
    'output_norm': 'model.norm',
    'output': 'lm_head',
}
_MATRICES = _ATTENTION | _MLP | _FUSED  # they may have a bias, norms have none

# Factors by which the wavelengths of RoPE are stretched: part of the config, not of the weights.
_ROPE_FACTORS = ('rope_freqs', 'rope_factors_long', 'rope_factors_short')


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What llama.cpp calls an architecture.

    Attributes:
        layer: names in a layer, ours by theirs.
        config: what the file leaves out, as it is for all models of the architecture.
        is_interleaved: q and k are stored so that the two numbers that RoPE turns are neighbours.
        norm_offset: was added to the weights of norms.
        window_pattern: every how many layers one sees everything, where others have a window.
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
# llama.cpp's defaults where a file is too old to say.
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

# Words of config.json by llama.cpp's keys, behind the name of the architecture.
_REQUIRED = {
    'block_count': 'num_hidden_layers',
    'embedding_length': 'hidden_size',
    'feed_forward_length': 'intermediate_size',
    'attention.head_count': 'num_attention_heads',
    'context_length': 'max_position_embeddings',
    'attention.layer_norm_rms_epsilon': 'rms_norm_eps',
}
_OPTIONAL = {
    'attention.head_count_kv': 'num_key_value_heads',
    'attention.key_length': 'head_dim',
    'rope.freq_base': 'rope_theta',
    'rope.freq_base_swa': 'rope_local_base_freq',
    'attention.sliding_window': 'sliding_window',
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
_TOKENS = {'bos_token_id': 'bos', 'eos_token_id': 'eos', 'pad_token_id': 'padding'}


@dataclasses.dataclass(frozen=True)
class Weight:
    """A tensor of the file, and what was done to it.

    Attributes:
        heads: the rows of so many heads are interleaved; 0, they are as Hugging Face has them.
        offset: was added to it.
    """

    stored: gguf_file.Tensor
    heads: int = 0
    offset: float = 0.0

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        if self.heads:
            rows = np.arange(self.stored.shape[0]).reshape(self.heads, -1, 2)
            rows = rows.swapaxes(1, 2).ravel()
            index = (rows[index[0] if index else slice(None)], *index[1:])
        values = self.stored.read(index)
        return values - self.offset if self.offset else values


class GgufTensors:
    """The weights of a file, dequantised when they are read; of rows alone, only those rows."""

    def __init__(self, weights: dict[str, Weight]):
        self._weights = weights
        self.shapes = {name: weight.stored.shape for name, weight in weights.items()}
        self.dtypes = {name: weight.stored.dtype for name, weight in weights.items()}

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A part of a tensor; for quantised ones float32, for others what the file has."""
        return self._weights[name].read(index)


def open_gguf(path) -> Pretrained:
    """The model in a file; its weights are mapped, not read.

    Raises:
        MissingInputError, PermissionDeniedError: the file is not there, or closed to us.
        DataError: the file is bad (see `gguf_file.read`), of an architecture that is not read, or
            lacks or has too many keys or tensors.
    """
    path = Path(path).expanduser()
    metadata, stored = gguf_file.read(path)
    name = metadata.get('general.architecture')
    if name not in ARCHITECTURES:
        raise DataError(
            f'{path} has the architecture {name!r}; read are {", ".join(ARCHITECTURES)}'
        )
    architecture = ARCHITECTURES[name]
    try:
        config = _config(architecture, Keys(metadata, name), stored)
        weights = _weights(architecture, config, stored)
    except DataError as error:
        raise DataError(f'{path} {error}') from error
    tokens = _token_ids(metadata)
    has_tokenizer = 'tokenizer.ggml.tokens' in metadata
    tokenizer = str(path) if has_tokenizer else ''
    return Pretrained(path, config | tokens, GgufTensors(weights), tokenizer, tokens)


class Keys:
    """The metadata of an architecture; DataError for values that are no number."""

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
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise DataError(f'has {self._architecture}.{key} {value!r}, which is no number')
        return value

    def required(self, keys: dict[str, str]) -> dict:
        found = {key: self.number(key) for key in keys}
        if missing := [f'{self._architecture}.{key}' for key in keys if not found[key]]:
            raise DataError(f'does not say {", ".join(missing)}')
        return {name: found[key] for key, name in keys.items()}

    def optional(self, keys: dict[str, str]) -> dict:
        found = {name: self.number(key) for key, name in keys.items()}
        return {name: value for name, value in found.items() if value is not None}


def _config(architecture: Architecture, keys: Keys, stored: dict[str, gguf_file.Tensor]) -> dict:
    """What config.json would say, the ids of tokens apart."""
    if keys.number('expert_count'):
        raise DataError('is a mixture of experts, which is not read')
    config = {'model_type': architecture.model_type, 'architectures': [architecture.class_name]}
    config |= keys.required(_REQUIRED)
    heads = config['num_attention_heads']
    config |= {
        'head_dim': config['hidden_size'] // heads,
        'num_key_value_heads': heads,
        'rope_theta': 10000.0,
        'tie_word_embeddings': 'output.weight' not in stored,
        'attention_bias': 'blk.0.attn_q.bias' in stored,
        'mlp_bias': 'blk.0.ffn_up.bias' in stored,
        **architecture.config,
        **keys.optional(_OPTIONAL),
    }
    if keys.number('attention.value_length') not in (None, config['head_dim']):
        raise DataError('has heads whose values have another size than their keys, not read')
    config['vocab_size'] = _vocabulary_size(keys, stored)
    config |= _window(architecture, config, keys)
    config |= _rope(config, keys, stored)
    config |= _known_of_family(config)
    return config


def _vocabulary_size(keys: Keys, stored: dict[str, gguf_file.Tensor]) -> int:
    if 'token_embd.weight' not in stored:
        raise DataError('lacks the tensor token_embd.weight')
    rows = stored['token_embd.weight'].shape[0]
    tokens = len(keys.metadata.get('tokenizer.ggml.tokens', ()))
    if tokens > rows:
        raise DataError(f'has a tokenizer of {tokens} tokens and embeddings of {rows}')
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
    if isinstance(pattern, list):
        has_window = [bool(layer) for layer in pattern]
    else:
        has_window = [bool((i + 1) % pattern) if pattern else True for i in layers]
    if len(has_window) != len(layers):
        raise DataError(f'has windows for {len(has_window)} layers of {len(layers)}')
    if pattern:
        kinds = ('full_attention', 'sliding_attention')
        said['layer_types'] = [kinds[is_sliding] for is_sliding in has_window]
    return said


def _rope(config: dict, keys: Keys, stored: dict[str, gguf_file.Tensor]) -> dict:
    """How the wavelengths are scaled, and what part of a head turns."""
    said = {}
    turned = keys.number('rope.dimension_count') or config['head_dim']
    if turned != config['head_dim']:
        said['partial_rotary_factor'] = turned / config['head_dim']
    scaling = keys.optional({f'rope.scaling.{key}': name for key, name in _SCALING.items()})
    if context := scaling.get('original_max_position_embeddings'):
        said['original_max_position_embeddings'] = context
    kind = keys.get('rope.scaling.type') or ('linear' if scaling.get('factor', 1) != 1 else 'none')
    long, short = (stored.get(f'rope_factors_{which}.weight') for which in ('long', 'short'))
    if 'rope_freqs.weight' in stored:
        factors = stored['rope_freqs.weight'].read()
        said['rope_scaling'] = _llama3_scaling(factors, config['rope_theta'], turned)
    elif long and short:
        said['rope_scaling'] = {
            'rope_type': 'longrope',
            'long_factor': [gguf_file.shortest(value) for value in long.read()],
            'short_factor': [gguf_file.shortest(value) for value in short.read()],
        }
    elif kind != 'none':
        said['rope_scaling'] = {'rope_type': kind, **scaling}
    return said


def _llama3_scaling(factors: np.ndarray, theta: float, turned: int) -> dict | None:
    """The words of Llama 3.1 for factors of its wavelengths; None where nothing is stretched.

    A wavelength of less than context / high goes unchanged, one of more than context / low is
    stretched by `factor`, and 1 / stretch is linear in 1 / wavelength in between. Only the ratios
    of the three are in the factors; the context is taken to be that of Llama 3, 8192.
    """
    if np.all(factors == 1):
        return None
    context, factor = 8192, gguf_file.shortest(factors.max())
    waves = context * theta ** (-np.arange(0, turned, 2) / turned) / (2 * np.pi)
    candidates = [(1.0, 4.0)]  # of all Llama 3
    between = (factors > 1) & (factors < factors.max())
    if len(waves) == len(factors) and between.sum() > 1:
        smooth = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
        slope, start = np.polyfit(waves[between], smooth, 1)
        low = float(-start / slope)
        candidates.append((round(low, 3), round(low + 1 / float(slope), 3)))
    for low, high in candidates:
        smooth = np.clip((waves - low) / (high - low), 0, 1) if high > low else np.zeros(1)
        stretch = 1 / ((1 - smooth) / factor + smooth)
        if stretch.shape == factors.shape and np.allclose(stretch, factors, rtol=1e-4):
            return {
                'rope_type': 'llama3',
                'factor': factor,
                'low_freq_factor': low,
                'high_freq_factor': high,
                'original_max_position_embeddings': context,
            }
    raise DataError('has rope_freqs.weight that are not those of Llama 3, not read')


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


def _token_ids(metadata: dict) -> dict:
    """The ids of tokens; where another token ends a turn, both end a text."""
    found = {name: metadata.get(f'tokenizer.ggml.{key}_token_id') for name, key in _TOKENS.items()}
    turn = metadata.get('tokenizer.ggml.eot_token_id')
    if turn is not None and found['eos_token_id'] not in (None, turn):
        found['eos_token_id'] = [found['eos_token_id'], turn]
    return {name: i for name, i in found.items() if i is not None}


def _weights(
    architecture: Architecture, config: dict, stored: dict[str, gguf_file.Tensor]
) -> dict[str, Weight]:
    """The weights by their Hugging Face names; DataError unless they are just what should be."""
    names = _names(architecture, config['num_hidden_layers'])
    optional = {name for name in names if name.endswith('.bias')} | {'output.weight'}
    factors = {f'{name}.weight' for name in _ROPE_FACTORS}
    for what, found in (
        ('lacks the tensors', [name for name in names if name not in stored.keys() | optional]),
        ('has unknown tensors', [name for name in stored if name not in names.keys() | factors]),
    ):
        if found:
            raise DataError(f'{what} {gguf_file.some(found)}')
    weights = {}
    for name in filter(stored.__contains__, names):
        heads = _interleaved_heads(name, config) if architecture.is_interleaved else 0
        if heads and stored[name].shape[0] != heads * config['head_dim']:
            raise DataError(
                f'has {name} of shape {list(stored[name].shape)}, '
                f'for {heads} heads of {config["head_dim"]}'
            )
        offset = architecture.norm_offset if name.endswith('norm.weight') else 0.0
        weights[names[name]] = Weight(stored[name], heads, offset)
    return weights


def _names(architecture: Architecture, layers: int) -> dict[str, str]:
    """All names that a file may have, with those of Hugging Face; biases may be absent."""
    names = {f'{theirs}.weight': f'{ours}.weight' for theirs, ours in _OUTSIDE.items()}
    for i in range(layers):
        for theirs, ours in architecture.layer.items():
            for part in ('weight', 'bias') if theirs in _MATRICES else ('weight',):
                names[f'blk.{i}.{theirs}.{part}'] = f'model.layers.{i}.{ours}.{part}'
    return names


def _interleaved_heads(name: str, config: dict) -> int:
    found = re.search(r'\.attn_([qk])\.', name)
    if not found:
        return 0
    return config['num_attention_heads' if found[1] == 'q' else 'num_key_value_heads']

"""Defines a model family and converts between config.json and our model config, both ways.

Throughout, `hf` is the content of a Hugging Face config.json, from transformers 4 or 5.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

from pydantic import ValidationError

from jaxfm.errors import ConfigError, DataError
from jaxfm.models import BlockConfig, RopeConfig, TransformerConfig
from jaxfm.models.families import FAMILIES
from jaxfm.registry import load_target

# The parameter that a tensor becomes, or for a fused tensor the parameters of its row blocks, in
# order.
Target = str | tuple[str, ...]

# Names that most families share. A layer's target is relative to its block; /0 and /1 are gate and
# up in gate_up.
LLAMA_WEIGHTS: Mapping[str, Target] = {
    'model.embed_tokens.weight': 'embedding/table',
    'model.norm.weight': 'final_norm/scale',
    'lm_head.weight': 'head/table',
    'model.layers.{}.input_layernorm.weight': 'pre_attention/scale',
    'model.layers.{}.self_attn.q_proj.weight': 'attention/q',
    'model.layers.{}.self_attn.k_proj.weight': 'attention/k',
    'model.layers.{}.self_attn.v_proj.weight': 'attention/v',
    'model.layers.{}.self_attn.o_proj.weight': 'attention/out',
    'model.layers.{}.self_attn.q_proj.bias': 'attention/q_bias',
    'model.layers.{}.self_attn.k_proj.bias': 'attention/k_bias',
    'model.layers.{}.self_attn.v_proj.bias': 'attention/v_bias',
    'model.layers.{}.self_attn.o_proj.bias': 'attention/out_bias',
    'model.layers.{}.post_attention_layernorm.weight': 'pre_mlp/scale',
    'model.layers.{}.mlp.gate_proj.weight': 'mlp/gate_up/0',
    'model.layers.{}.mlp.up_proj.weight': 'mlp/gate_up/1',
    'model.layers.{}.mlp.down_proj.weight': 'mlp/down',
    'model.layers.{}.mlp.gate_proj.bias': 'mlp/gate_up_bias/0',
    'model.layers.{}.mlp.up_proj.bias': 'mlp/gate_up_bias/1',
    'model.layers.{}.mlp.down_proj.bias': 'mlp/down_bias',
}
QK_NORM_WEIGHTS: Mapping[str, Target] = {
    'model.layers.{}.self_attn.q_norm.weight': 'attention/q_norm/scale',
    'model.layers.{}.self_attn.k_norm.weight': 'attention/k_norm/scale',
}

ACTIVATIONS = {
    'silu': 'silu',
    'swish': 'silu',
    'gelu': 'gelu',
    'gelu_pytorch_tanh': 'gelu_tanh',
    'gelu_new': 'gelu_tanh',
    'relu2': 'relu_squared',
}
# Options that change the outputs and that no family here implements, with the values that leave the
# outputs unchanged. Any other value is refused.
NEUTRAL = {
    'partial_rotary_factor': (None, 1.0),
    'attention_multiplier': (None, 1.0),
    'logits_scaling': (None, 1.0),
    'residual_multiplier': (None, 1.0),
    'clip_qkv': (None,),
    'use_bidirectional_attention': (None, False),
    'quantization_config': (None,),
    'num_local_experts': (None, 0, 1),
    'num_experts': (None, 0, 1),
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of models.

    block(hf, layer): BlockConfig values of a layer, added to what `_block` reads for all families.
    model(hf): TransformerConfig values, added to what `read_config` reads for all families.
    keys(model): config.json keys, added to what `write_config` writes for all families.
    defaults: values of the keys that a config.json may omit.
    """

    model_type: str
    architecture: str
    weights: Mapping[str, Target] = dataclasses.field(default_factory=lambda: LLAMA_WEIGHTS)
    block: Callable[[Mapping, int], dict] = lambda hf, layer: {}
    model: Callable[[Mapping], dict] = lambda hf: {}
    keys: Callable[[TransformerConfig], dict] = lambda model: {}
    defaults: Mapping = dataclasses.field(default_factory=dict)


def find_family(model_type: str) -> Family:
    """The family of a model_type; raises DataError, which lists the supported ones, if unknown."""
    # No "did you mean": the nearest name would mislead, as mixtral is not mistral.
    if model_type not in FAMILIES:
        raise DataError(
            f'model_type {model_type!r} is not supported; supported: '
            f'{", ".join(FAMILIES)} (no mixture-of-experts models yet)'
        )
    return load_target(FAMILIES[model_type])


def read_config(hf: Mapping) -> dict:
    """The TransformerConfig values of a config.json.

    Raises:
        DataError: the family is unknown, or a value is missing, of a wrong type or unsupported.
    """
    family = find_family(_model_type(hf))
    hf = {**family.defaults, **hf}
    for name, neutral in NEUTRAL.items():
        if hf.get(name) not in neutral:
            raise DataError(f'{name} {hf[name]!r} is not supported')
    _check_values(hf)
    try:
        blocks = [_block(family, hf, layer) for layer in range(hf['num_hidden_layers'])]
        values = dict(
            name='transformer',
            family=family.model_type,
            context_length=hf.get('max_position_embeddings') or 0,
            vocab_size=hf['vocab_size'],
            embed_dim=hf['hidden_size'],
            num_layers=hf['num_hidden_layers'],
            block=blocks[0],
            tie_embeddings=hf.get('tie_word_embeddings', False),
        )
        values |= _segments(blocks) | family.model(hf)
        TransformerConfig.model_validate(values)
    except KeyError as error:
        raise DataError(f'{error.args[0]} is missing') from None
    except ValidationError as error:
        first = error.errors()[0]
        where = '.'.join(map(str, first['loc']))
        raise DataError(f'not a valid {family.model_type} model: {where}: {first["msg"]}') from None
    except (TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise DataError(f'a value has the wrong type or length: {error}') from None
    return values


_SIZES = (
    *('vocab_size', 'hidden_size', 'num_hidden_layers', 'intermediate_size'),
    *('num_attention_heads', 'num_key_value_heads', 'head_dim', 'max_position_embeddings'),
    *('sliding_window', 'no_rope_layer_interval'),
)
_NUMBERS = ('rms_norm_eps', 'rope_theta', 'rope_local_base_freq', 'query_pre_attn_scalar')
_MOST_LAYERS = 10_000  # every layer gets a config, so a corrupt number would hang the reader


def _check_values(hf: Mapping) -> None:
    """Raises DataError if a common key is present with an impossible value."""
    given = {name: hf[name] for name in (*_SIZES, *_NUMBERS) if hf.get(name) is not None}
    for name, value in given.items():
        is_number = isinstance(value, int if name in _SIZES else int | float)
        if not is_number or isinstance(value, bool) or not 0 < value < math.inf:
            wanted = 'a whole number' if name in _SIZES else 'a number'
            raise DataError(f'{name} must be {wanted} above 0, not {value!r}')
    layers = given.get('num_hidden_layers', 0)
    if layers > _MOST_LAYERS:
        raise DataError(f'num_hidden_layers {layers} is more than the limit of {_MOST_LAYERS}')
    for name in ('layer_types', 'no_rope_layers'):
        entries = hf.get(name)
        if entries and layers and not (isinstance(entries, list) and len(entries) == layers):
            raise DataError(
                f'{name} must be a list of {layers} entries, one per layer, not {entries!r}'
            )
    for name in ('rope_parameters', 'rope_scaling'):
        if not isinstance(hf.get(name) or {}, Mapping):
            raise DataError(f'{name} must be an object, not {hf[name]!r}')


def _model_type(hf: Mapping) -> str:
    """The model_type at the top level: a vision-language model must not pass as its text model."""
    name = hf.get('model_type')
    if not isinstance(name, str) or not name:
        raise DataError('model_type is missing; it must name the model family, such as llama')
    return name


def _block(family: Family, hf: Mapping, layer: int) -> dict:
    heads = hf['num_attention_heads']
    activation = hf.get('hidden_activation') or hf.get('hidden_act') or 'silu'
    if activation not in ACTIVATIONS:
        known = ', '.join(ACTIVATIONS)
        raise DataError(f'hidden_act {activation!r} is not supported; supported: {known}')
    values = dict(
        num_heads=heads,
        num_kv_heads=hf.get('num_key_value_heads') or heads,
        head_dim=hf.get('head_dim') or hf['hidden_size'] // heads,
        mlp_dim=hf['intermediate_size'],
        activation=ACTIVATIONS[activation],
        rope=rope(hf),
        norm_epsilon=float(hf['rms_norm_eps']),
    )
    return values | family.block(hf, layer)


def rope(hf: Mapping, layer_type: str = 'full_attention') -> dict:
    """RopeConfig values for layers of one type; DataError if the scaling is unsupported."""
    said = hf.get('rope_parameters')
    if said is None:
        said = {'rope_theta': hf.get('rope_theta', 10_000.0), **(hf.get('rope_scaling') or {})}
    said = said.get(layer_type, said)
    kind = said.get('rope_type', said.get('type', 'default'))
    theta = float(said.get('rope_theta') or hf.get('rope_theta') or 10_000.0)
    if said.get('partial_rotary_factor') not in NEUTRAL['partial_rotary_factor']:
        raise DataError(f'partial_rotary_factor {said["partial_rotary_factor"]!r} is not supported')
    known = {'default': 'none', 'linear': 'linear', 'llama3': 'llama3', 'yarn': 'yarn'}
    if kind not in known:
        raise DataError(f'RoPE scaling {kind!r} is not supported; supported: {", ".join(known)}')
    values = {'theta': theta, 'scaling': known[kind]}
    if kind == 'default':
        return values
    values['factor'] = float(said['factor'])
    if kind == 'llama3':
        names = ('low_freq_factor', 'high_freq_factor')
        values |= {name: float(said[name]) for name in names}
    if kind == 'yarn':
        for name in ('mscale', 'mscale_all_dim'):
            if said.get(name):
                raise DataError(f'RoPE scaling yarn with {name} is not supported')
        if not said.get('truncate', True):
            raise DataError('RoPE scaling yarn with truncate = false is not supported')
        values |= {name: float(said.get(name) or default) for name, default in _YARN.items()}
    if kind != 'linear':
        length = said.get('original_max_position_embeddings') or hf['max_position_embeddings']
        values['original_max_position'] = length
    return values


_YARN = {'beta_slow': 1.0, 'beta_fast': 32.0, 'attention_factor': 0.0}


def rope_keys(config: RopeConfig) -> dict:
    """The config.json keys rope_theta and rope_scaling."""
    keys = {'rope_theta': config.theta}
    if config.scaling == 'none':
        return keys
    scaling = {'rope_type': config.scaling, 'factor': config.factor}
    if config.scaling == 'llama3':
        scaling |= {name: getattr(config, name) for name in ('low_freq_factor', 'high_freq_factor')}
    if config.scaling == 'yarn':
        scaling |= {name: getattr(config, name) for name in _YARN if getattr(config, name)}
    if config.scaling != 'linear':
        scaling['original_max_position_embeddings'] = config.original_max_position
    return keys | {'rope_scaling': scaling}


def layer_types(hf: Mapping, period: int) -> list[str]:
    """The attention type of each layer; by default, every `period`-th layer has full attention."""
    said = hf.get('layer_types')
    if said is None:
        count = hf['num_hidden_layers']
        return [_layer_type((layer + 1) % period != 0) for layer in range(count)]
    wrong = [kind for kind in said if kind not in ('sliding_attention', 'full_attention')]
    if wrong:
        raise DataError(f'{wrong[0]!r} in layer_types is not supported')
    return said


def _layer_type(is_sliding: bool) -> str:
    return 'sliding_attention' if is_sliding else 'full_attention'


def layer_type_keys(model: TransformerConfig) -> dict:
    """The config.json keys layer_types and sliding_window."""
    windows = [block.window for block in blocks_of(model)]
    return {
        'layer_types': [_layer_type(window > 0) for window in windows],
        'sliding_window': max(windows) or None,
    }


def blocks_of(model: TransformerConfig) -> list[BlockConfig]:
    """The block config of every layer, in order."""
    return [b for s in model.trunk for _ in range(s.repeats) for b in s.pattern]


def _segments(blocks: list[dict]) -> dict:
    """`segments` that cover these blocks with repeated patterns; {} if all blocks are equal."""
    if all(block == blocks[0] for block in blocks):
        return {}
    segments, start = [], 0
    while start < len(blocks):
        rest = blocks[start:]
        found = [(period * times, period) for period, times in _repetitions(rest)]
        covered, period = max(found, key=lambda pair: (pair[0], -pair[1]))
        segments.append(dict(pattern=rest[:period], repeats=covered // period))
        start += covered
    return {'segments': segments}


def _repetitions(blocks: list[dict]):
    """(period, times) of each pattern repeated at the start; a single block need not repeat."""
    for period in range(1, len(blocks) // 2 + 1) or (1,):
        times = 1
        while blocks[times * period :][:period] == blocks[:period]:
            times += 1
        if times > 1 or period == 1:
            yield period, times


def write_config(model: TransformerConfig) -> dict:
    """The config.json of a model, for its `family` or else the first that can express it.

    Raises:
        ConfigError: no family can; lists for each one tried what it cannot express.
    """
    names = [model.family] if model.family else list(FAMILIES)
    problems = []
    for name in names:
        family = find_family(name)
        hf = _common_keys(family, model) | family.keys(model)
        different = _differences(model, hf)
        if not different:
            return hf
        problems.append(f'  {name}: {", ".join(different)}')
    which = f'family {model.family} cannot' if model.family else 'no family can'
    raise ConfigError(
        f"{which} express this model in Hugging Face's layout; these values would be lost:\n"
        + '\n'.join(problems)
    )


def _common_keys(family: Family, model: TransformerConfig) -> dict:
    block = blocks_of(model)[0]
    to_hf = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    rope_of = next((b.rope for b in blocks_of(model) if b.rope and not b.window), block.rope)
    return {
        'architectures': [family.architecture],
        'model_type': family.model_type,
        'vocab_size': model.vocab_size,
        'hidden_size': model.embed_dim,
        'intermediate_size': block.mlp_dim,
        'num_hidden_layers': model.num_layers,
        'num_attention_heads': block.num_heads,
        'num_key_value_heads': block.num_kv_heads,
        'head_dim': block.head_dim,
        'hidden_act': to_hf[block.activation],
        'max_position_embeddings': model.context_length or 2048,
        'rms_norm_eps': block.norm_epsilon,
        'tie_word_embeddings': model.tie_embeddings,
        'attention_dropout': 0.0,
        'use_cache': True,
        **(rope_keys(rope_of) if rope_of else {}),
    }


# Values that define the function a model computes; the others affect only how it trains and runs.
_MEANING = (
    *('vocab_size', 'embed_dim', 'num_layers', 'tie_embeddings', 'embedding_scale'),
    *('embedding_norm', 'logits_softcap'),
)


def _differences(model: TransformerConfig, hf: Mapping) -> list[str]:
    """Names of the values that would change if the model were read back from this config.json."""
    try:
        again = TransformerConfig.model_validate(read_config(hf))
    except DataError as error:
        return [str(error)]
    names = [name for name in _MEANING if getattr(model, name) != getattr(again, name)]
    for mine, read in zip(blocks_of(model), blocks_of(again), strict=False):
        names += [
            f'block.{name}'
            for name in type(mine).model_fields
            if _meaning(mine, name) != _meaning(read, name)
        ]
    return list(dict.fromkeys(names))


def _meaning(block: BlockConfig, name: str):
    value = getattr(block, name)
    return (value or block.head_dim**-0.5) if name == 'query_scale' else value

"""OLMo 3 (OLMo Team, 2025): OLMo 2 with windows in three of four layers; YaRN in the fourth."""

from jaxfm.models.families.base import (
    Family,
    blocks_of,
    layer_type_keys,
    layer_types,
    rope,
    rope_keys,
)
from jaxfm.models.families.olmo2 import OLMO_WEIGHTS, olmo_block, olmo_keys


def _block(hf, layer):
    values = olmo_block(hf, layer)
    if layer_types(hf, period=4)[layer] == 'full_attention':
        return values
    local = {'theta': rope(hf)['theta'], 'scaling': 'none'}
    if hf.get('rope_parameters'):
        local = rope(hf, 'sliding_attention')
    return values | dict(window=hf['sliding_window'], rope=local)


def _keys(model):
    # transformers 5 gives local layers its own default theta unless each layer type has one.
    by_type = {}
    for block in blocks_of(model):
        keys = rope_keys(block.rope) if block.rope else {}
        scaling = keys.pop('rope_scaling', {'rope_type': 'default'})
        name = 'sliding_attention' if block.window else 'full_attention'
        by_type[name] = keys | scaling
    by_type = {'sliding_attention': by_type.get('full_attention'), **by_type}
    return olmo_keys(model) | layer_type_keys(model) | {'rope_parameters': by_type}


FAMILY = Family(
    model_type='olmo3',
    architecture='Olmo3ForCausalLM',
    weights=OLMO_WEIGHTS,
    block=_block,
    keys=_keys,
    defaults={'rms_norm_eps': 1e-5, 'sliding_window': 4096, 'rope_theta': 500_000.0},
)

"""The golden of every family, converted to .gguf, loads as the same model."""

import json

import gguf
import numpy as np
import pytest

from jaxfm.models.families.base import read_config
from jaxfm.pretrained.gguf.model import open_gguf
from tests import gguf_files
from tests.models import goldens

# llama.cpp's architecture of each family; some share one.
ARCHITECTURES = {'llama3': 'llama', 'mistral': 'llama', 'olmo3': 'olmo2'}


def converted(golden: goldens.Golden, path) -> dict:
    """Writes the file -> the golden's config, without what a .gguf file cannot store."""
    config = json.loads((golden.path / 'config_v4.json').read_text())
    if golden.name == 'llama3':  # a file lacks the original context length, so Llama 3's is assumed
        config['rope_scaling']['original_max_position_embeddings'] = 8192
        config['rope_theta'] = 5e5
    config.setdefault('head_dim', config['hidden_size'] // config['num_attention_heads'])
    architecture = ARCHITECTURES.get(golden.name, golden.name)
    [kind] = [kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
    names = gguf.get_tensor_name_map(kind, config['num_hidden_layers'])
    keys = gguf_files.shape_keys(config) | {'.attention.key_length': config['head_dim']}
    for word, key in (
        ('sliding_window', 'attention.sliding_window'),
        ('rope_local_base_freq', 'rope.freq_base_swa'),
        ('attn_logit_softcapping', 'attn_logit_softcapping'),
        ('final_logit_softcapping', 'final_logit_softcapping'),
    ):
        if config.get(word) and config.get('use_sliding_window', True):
            keys[f'.{key}'] = config[word]
    if golden.name == 'olmo3':
        kinds = [kind == 'sliding_attention' for kind in config['layer_types']]
        keys['.attention.sliding_window_pattern'] = kinds
    tensors = {}
    for name, tensor in goldens.read_safetensors(golden.path / 'model.safetensors').items():
        if architecture in ('llama', 'smollm3'):
            for part, word in (('q_proj', 'attention'), ('k_proj', 'key_value')):
                if part in name:
                    tensor = gguf_files.interleaved(tensor, config[f'num_{word}_heads'])
        if 'gemma' in architecture and name.endswith('norm.weight'):
            tensor = tensor + 1
        tensors[names.get_name(name, try_suffixes=('.weight', '.bias'))] = tensor
    if scaling := config.get('rope_scaling'):
        keys |= _scaling_keys(scaling)
        if scaling['rope_type'] == 'llama3':
            tensors['rope_freqs.weight'] = gguf_files.llama3_factors(
                config['rope_theta'], config['head_dim'], scaling
            )
    gguf_files.write(path, architecture, keys, tensors)
    return config


def _scaling_keys(scaling: dict) -> dict:
    keys = {
        'factor': '.factor',
        'original_max_position_embeddings': '.original_context_length',
        'attention_factor': '.yarn_attn_factor',
        'beta_fast': '.yarn_beta_fast',
        'beta_slow': '.yarn_beta_slow',
        'rope_type': '.type',
    }
    said = {} if scaling['rope_type'] == 'llama3' else scaling
    return {f'.rope.scaling{keys[word]}': value for word, value in said.items()}


def flat(values, path='') -> dict:
    if isinstance(values, list):
        values = dict(enumerate(values))
    if not isinstance(values, dict):
        return {path: values}
    return {k: v for name in values for k, v in flat(values[name], f'{path}.{name}').items()}


@pytest.mark.parametrize('name', goldens.FAMILIES)
def test_a_golden_of_every_family_is_the_same_model_in_a_gguf(name, tmp_path):
    golden = goldens.Golden(name)
    config = converted(golden, tmp_path / 'model.gguf')
    model = open_gguf(tmp_path / 'model.gguf')
    said = dict(model.hf_config)
    if 'gemma' in name:  # it has neither of the two sizes that llama.cpp knows
        said['query_pre_attn_scalar'] = config['query_pre_attn_scalar']
    ours, theirs = flat(read_config(said)), flat(read_config(config))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key] == (pytest.approx(value) if isinstance(value, float) else value), key
    tensors = goldens.read_safetensors(golden.path / 'model.safetensors')
    assert model.tensors.shapes == {name: tensor.shape for name, tensor in tensors.items()}
    for tensor_name, tensor in tensors.items():
        # Adding one to a number near zero loses some of its bits.
        lost = 1e-6 if 'gemma' in name and tensor_name.endswith('norm.weight') else 0
        np.testing.assert_allclose(model.tensors.read(tensor_name), tensor, 0, lost, tensor_name)

"""Models in .gguf files: a real one, one of every architecture, and bad ones."""

import json
import math
import random
import subprocess
import sys
import time
import tracemalloc

import gguf
import numpy as np
import pytest

from jaxfm.errors import DataError, MissingInputError, PermissionDeniedError
from jaxfm.pretrained.gguf import container
from jaxfm.pretrained.gguf.architectures import ARCHITECTURES
from jaxfm.pretrained.gguf.model import open_gguf
from tests import gguf_files

HF = {
    'num_hidden_layers': 2,
    'hidden_size': 32,
    'intermediate_size': 96,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'head_dim': 16,
    'max_position_embeddings': 256,
    'rms_norm_eps': 1e-5,
    'rope_theta': 5e5,
}
VOCAB = 40
NORMS = {
    'llama': ['input_layernorm', 'post_attention_layernorm'],
    'gemma': [
        'input_layernorm',
        'post_attention_layernorm',
        'pre_feedforward_layernorm',
        'post_feedforward_layernorm',
    ],
    'olmo2': ['post_attention_layernorm', 'post_feedforward_layernorm'],
}
NORMS |= dict.fromkeys(('smollm3', 'qwen2', 'qwen3', 'phi3'), NORMS['llama'])
NORMS |= dict.fromkeys(('gemma2', 'gemma3'), NORMS['gemma'])
HF_TYPES = {'gemma3': ('gemma3_text', 'Gemma3ForCausalLM')} | {
    name: (name, f'{cased}ForCausalLM')
    for name, cased in {
        'llama': 'Llama',
        'smollm3': 'SmolLM3',
        'qwen2': 'Qwen2',
        'qwen3': 'Qwen3',
        'gemma2': 'Gemma2',
        'olmo2': 'Olmo2',
        'phi3': 'Phi3',
    }.items()
}


def shapes(architecture: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the Hugging Face model with the config HF."""
    width, inner = HF['hidden_size'], HF['intermediate_size']
    q, kv = 4 * HF['head_dim'], 2 * HF['head_dim']
    found = {'model.embed_tokens.weight': (VOCAB, width), 'model.norm.weight': (width,)}
    for layer in range(HF['num_hidden_layers']):
        inside = {f'{name}.weight': (width,) for name in NORMS[architecture]}
        if architecture == 'phi3':
            inside['self_attn.qkv_proj.weight'] = (q + 2 * kv, width)
            inside['mlp.gate_up_proj.weight'] = (2 * inner, width)
        else:
            for name, rows in (('q', q), ('k', kv), ('v', kv)):
                inside[f'self_attn.{name}_proj.weight'] = (rows, width)
                if architecture == 'qwen2':
                    inside[f'self_attn.{name}_proj.bias'] = (rows,)
            inside['mlp.gate_proj.weight'] = inside['mlp.up_proj.weight'] = (inner, width)
        inside['self_attn.o_proj.weight'] = (width, q)
        inside['mlp.down_proj.weight'] = (width, inner)
        if architecture in ('qwen3', 'gemma3'):
            inside |= {f'self_attn.{name}_norm.weight': (HF['head_dim'],) for name in 'qk'}
        if architecture == 'olmo2':
            inside |= {'self_attn.q_norm.weight': (q,), 'self_attn.k_norm.weight': (kv,)}
        found |= {f'model.layers.{layer}.{name}': shape for name, shape in inside.items()}
    return found


def random_tensors(wanted: dict, seed=0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    # Multiples of 1/8, so that adding one to a norm is exact.
    return {
        name: (draw.integers(-64, 64, shape) / 8).astype(np.float32)
        for name, shape in wanted.items()
    }


def converted(architecture: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Applies llama.cpp's conversion to the tensors, with names from the package gguf."""
    [kind] = [kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
    names = gguf.get_tensor_name_map(kind, HF['num_hidden_layers'])
    found = {}
    for name, tensor in tensors.items():
        if architecture in ('llama', 'smollm3'):
            for part, heads in (('q_proj', 4), ('k_proj', 2)):
                tensor = gguf_files.interleaved(tensor, heads) if part in name else tensor
        if architecture.startswith('gemma') and name.endswith('norm.weight'):
            tensor = tensor + 1
        found[names.get_name(name, try_suffixes=('.weight', '.bias'))] = tensor
    return found


def keys(**changed) -> dict:
    found = gguf_files.shape_keys(HF) | {'.attention.key_length': HF['head_dim']}
    found |= {f'.{key.replace("__", ".")}': value for key, value in changed.items()}
    return {key: value for key, value in found.items() if value is not None}


def make(path, architecture='llama', extra=None, without=(), kinds=None, more=None, **changed):
    """A small file of an architecture; `changed` sets keys (__ for a dot; None removes one)."""
    tensors = converted(architecture, random_tensors(shapes(architecture) | (extra or {})))
    tensors = {name: t for name, t in (tensors | (more or {})).items() if name not in without}
    return gguf_files.write(path, architecture, keys(**changed), tensors, kinds)


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'model.gguf'


@pytest.fixture(scope='module')
def real(smollm2_gguf):
    return open_gguf(smollm2_gguf)


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_every_architecture_is_read_with_hugging_faces_names_and_rows(name, path):
    model = open_gguf(make(path, name))
    tensors = random_tensors(shapes(name))
    assert model.tensors.shapes == {name: tensor.shape for name, tensor in tensors.items()}
    for tensor_name, tensor in tensors.items():
        np.testing.assert_array_equal(model.tensors.read(tensor_name), tensor, tensor_name)
        assert model.tensors.dtypes[tensor_name] == np.float32
    model_type, class_name = HF_TYPES[name]
    expected = HF | {'vocab_size': VOCAB, 'tie_word_embeddings': True}
    expected |= {'model_type': model_type, 'architectures': [class_name]}
    assert expected.items() <= model.hf_config.items()
    assert json.loads(json.dumps(model.hf_config)) == model.hf_config


def test_a_real_llama_is_read_bit_for_bit(path, shared_data):
    directory = shared_data / 'stories260k_hf'
    model = open_gguf(gguf_files.stories(path, directory))
    tensors = gguf_files.read_safetensors(directory / 'model.safetensors')
    assert model.tensors.shapes.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(model.tensors.read(name), tensor, name)
    said = json.loads((directory / 'config.json').read_text())
    for key in said.keys() & model.hf_config.keys() - {'pad_token_id'}:
        assert model.hf_config[key] == said[key], key
    assert model.generation == {'bos_token_id': 1, 'eos_token_id': 2}
    assert (model.path, model.tokenizer) == (path, str(path))


def test_the_real_model_is_dequantised_as_by_the_gguf_package(real, smollm2_gguf):
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    by_name = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2_gguf).tensors}
    assert len(by_name) == len(real.tensors.shapes) == 272
    for name, shape in real.tensors.shapes.items():
        stored = by_name[names.get_name(name, try_suffixes=('.weight',))]
        values = gguf.dequantize(stored.data, stored.tensor_type)
        for part, heads in (('q_proj', 9), ('k_proj', 3)):
            if part in name:
                values = values.reshape(heads, 32, 2, 576).swapaxes(1, 2).reshape(shape)
        assert np.array_equal(real.tensors.read(name), values), name
    assert sum(math.prod(shape) for shape in real.tensors.shapes.values()) == 134515008


def test_the_config_of_the_real_model_equals_its_hugging_face_repository(real):
    expected = {
        'architectures': ['LlamaForCausalLM'],
        'attention_bias': False,
        'bos_token_id': 1,
        'eos_token_id': 2,
        'pad_token_id': 2,
        'hidden_act': 'silu',
        'hidden_size': 576,
        'intermediate_size': 1536,
        'max_position_embeddings': 8192,
        'mlp_bias': False,
        'model_type': 'llama',
        'num_attention_heads': 9,
        'num_hidden_layers': 30,
        'num_key_value_heads': 3,
        'rms_norm_eps': 1e-05,
        'rope_theta': 100000,
        'tie_word_embeddings': True,
        'vocab_size': 49152,
    }
    assert expected.items() <= real.hf_config.items()


def test_the_real_model_is_read_in_seconds(smollm2_gguf):
    started_at = time.process_time()  # other processes on the machine do not count
    model = open_gguf(smollm2_gguf)
    for name in model.tensors.shapes:
        model.tensors.read(name)
    assert time.process_time() - started_at < 3


PARTS = [
    (slice(3, 9),),
    (slice(0, 20, 3), slice(None)),
    (slice(None), slice(0, 32)),
    (slice(5, 6), slice(33, 71)),
    (slice(2, 2), slice(None)),
    (slice(1, 30), slice(40, 40)),
    (slice(-3, None), slice(1, 96, 5)),
]


@pytest.mark.parametrize('kind', [None, 'Q8_0', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'BF16', 'F16'])
def test_a_slice_of_a_tensor_equals_the_slice_of_the_whole(kind, path):
    name = 'blk.0.ffn_down.weight'
    kinds = {f'blk.0.attn_{x}.weight': gguf_files.TYPES[kind] for x in 'qk'} if kind else {}
    kinds |= {name: gguf_files.TYPES[kind]} if kind else {}
    tensors = open_gguf(make(path, kinds=kinds)).tensors
    for hf_name in tensors.shapes:
        whole = tensors.read(hf_name)
        assert whole.shape == tensors.shapes[hf_name] and whole.dtype == tensors.dtypes[hf_name]
        for part in PARTS:
            part = part[: whole.ndim]
            np.testing.assert_array_equal(tensors.read(hf_name, part), whole[part], hf_name)


def test_numbers_that_are_not_quantised_keep_their_type(path):
    kinds = {
        f'blk.0.ffn_{x}.weight': gguf_files.TYPES[k]
        for x, k in (('up', 'BF16'), ('down', 'F16'), ('gate', 'Q8_0'))
    }
    tensors = open_gguf(make(path, kinds=kinds)).tensors
    found = {
        x: tensors.dtypes[f'model.layers.0.mlp.{x}_proj.weight'].name
        for x in ('up', 'down', 'gate')
    }
    assert found == {'up': 'bfloat16', 'down': 'float16', 'gate': 'float32'}


def test_only_the_requested_rows_are_dequantised_and_held(real):
    name = 'model.embed_tokens.weight'
    real.tensors.read(name, (slice(0, 1),))
    tracemalloc.start()
    real.tensors.read(name, (slice(40000, 40064),))
    few = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    whole = real.tensors.read(name)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert few < 2e6
    assert most < whole.nbytes + 4e6


def test_keys_that_only_some_models_have(path):
    said = open_gguf(make(path, extra={'lm_head.weight': (VOCAB, 32)})).hf_config
    assert said['tie_word_embeddings'] is False
    said = open_gguf(make(path, attention__sliding_window=64)).hf_config
    assert (said['model_type'], said['sliding_window']) == ('mistral', 64)
    assert said['architectures'] == ['MistralForCausalLM']
    said = open_gguf(make(path, 'qwen2')).hf_config
    assert said['attention_bias'] and not said['use_sliding_window']
    said = open_gguf(
        make(path, 'qwen2', attention__key_length=None, rope__dimension_count=None)
    ).hf_config
    assert said['head_dim'] == 8


def test_windows_and_caps_of_gemma(path):
    said = open_gguf(make(path, 'gemma2', attn_logit_softcapping=40.0)).hf_config
    assert said['attn_logit_softcapping'] == 40 and said['final_logit_softcapping'] == 30
    assert said['layer_types'] == ['sliding_attention', 'full_attention']
    assert (said['sliding_window'], said['query_pre_attn_scalar']) == (4096, 16)
    said = open_gguf(make(path, 'gemma3', attention__sliding_window=512)).hf_config
    assert said['layer_types'] == ['sliding_attention'] * 2
    assert (said['rope_local_base_freq'], said['query_pre_attn_scalar']) == (1e4, 16)
    assert said['hidden_activation'] == 'gelu_pytorch_tanh'


def test_olmo3_is_recognised_by_its_windows(path):
    pattern = {'attention__sliding_window_pattern': [True, False]}
    said = open_gguf(make(path, 'olmo2', attention__sliding_window=64, **pattern)).hf_config
    assert (said['model_type'], said['architectures']) == ('olmo3', ['Olmo3ForCausalLM'])
    assert said['layer_types'] == ['sliding_attention', 'full_attention']


def test_smollm3_leaves_every_fourth_layer_without_rope(path, monkeypatch):
    monkeypatch.setitem(HF, 'num_hidden_layers', 5)
    said = open_gguf(make(path, 'smollm3')).hf_config
    assert (said['no_rope_layers'], said['no_rope_layer_interval']) == ([1, 1, 1, 0, 1], 4)


def test_every_sixth_layer_of_gemma3_has_full_attention(path, monkeypatch):
    monkeypatch.setitem(HF, 'num_hidden_layers', 7)
    said = open_gguf(make(path, 'gemma3', attention__sliding_window=512)).hf_config
    assert [kind.split('_')[0] for kind in said['layer_types']] == [
        *['sliding'] * 5,
        'full',
        'sliding',
    ]


@pytest.mark.parametrize('name, layers', [('gemma2', 46), ('gemma3', 62)])
def test_the_largest_gemma_scales_by_its_width(name, layers, path, monkeypatch):
    monkeypatch.setitem(HF, 'num_hidden_layers', layers)
    assert open_gguf(make(path, name)).hf_config['query_pre_attn_scalar'] == 8


def test_the_end_of_turn_token_ends_a_text_too(path):
    ids = {'tokenizer.ggml.eos_token_id': 3, 'tokenizer.ggml.eot_token_id': 7}
    tensors = converted('llama', random_tensors(shapes('llama')))
    gguf_files.write(path, 'llama', keys() | ids, tensors)
    model = open_gguf(path)
    assert model.generation == {'eos_token_id': [3, 7]}
    assert (model.hf_config['eos_token_id'], model.tokenizer) == ([3, 7], '')


def test_version_2_and_other_alignments_are_read(path):
    tensors = converted('llama', random_tensors(shapes('llama')))
    writer = gguf.GGUFWriter(path, 'llama')
    writer.add_custom_alignment(256)
    for key, value in keys().items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f'llama{key}', value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = path.read_bytes()
    path.write_bytes(b'GGUF' + (2).to_bytes(4, 'little') + content[8:])
    model = open_gguf(path).tensors
    for name, tensor in random_tensors(shapes('llama')).items():
        np.testing.assert_array_equal(model.read(name), tensor)


def test_scaled_rope(path):
    scaling = {'rope__scaling__type': 'yarn', 'rope__scaling__factor': 4.0}
    scaling |= {'rope__scaling__original_context_length': 64}
    assert open_gguf(make(path, 'qwen2', **scaling)).hf_config['rope_scaling'] == {
        'rope_type': 'yarn',
        'factor': 4.0,
        'original_max_position_embeddings': 64,
    }
    factors = {'long': np.linspace(1, 9, 6), 'short': np.linspace(1, 2, 6)}
    more = {f'rope_factors_{which}.weight': f.astype('f4') for which, f in factors.items()}
    context = {'rope__scaling__original_context_length': 64, 'rope__dimension_count': 12}
    context['attention__sliding_window'] = 0
    said = open_gguf(make(path, 'phi3', more=more, **context)).hf_config
    assert said['rope_scaling']['rope_type'] == 'longrope'
    np.testing.assert_allclose(said['rope_scaling']['long_factor'], factors['long'], 1e-6)
    assert (said['original_max_position_embeddings'], said['sliding_window']) == (64, None)
    assert said['partial_rotary_factor'] == 0.75


@pytest.mark.parametrize(
    'turned, factor, low, high', [(128, 8, 1, 4), (64, 32, 1, 4), (128, 4, 2, 6)]
)
def test_the_rope_scaling_of_llama3_is_recovered(turned, factor, low, high, path):
    scaling = dict(factor=factor, low_freq_factor=low, high_freq_factor=high)
    scaling['original_max_position_embeddings'] = 8192
    factors = {'rope_freqs.weight': gguf_files.llama3_factors(5e5, turned, scaling)}
    shape = {'blk.0.attn_q.weight': (4 * turned, 32), 'blk.0.attn_k.weight': (2 * turned, 32)}
    more = factors | random_tensors(shape | {n.replace('0', '1'): s for n, s in shape.items()})
    length = {'attention__key_length': turned, 'rope__dimension_count': turned}
    model = open_gguf(make(path, more=more, **length))
    assert model.hf_config['rope_scaling'] == {
        'rope_type': 'llama3',
        'factor': factor,
        'low_freq_factor': pytest.approx(low),
        'high_freq_factor': pytest.approx(high),
        'original_max_position_embeddings': 8192,
    }
    assert 'rope_freqs.weight' not in model.tensors.shapes


def test_factors_of_one_mean_no_scaling(path):
    ones = {'rope_freqs.weight': np.ones(8, np.float32)}
    assert open_gguf(make(path, more=ones)).hf_config['rope_scaling'] is None


BAD = {
    'unknown architecture': (
        dict(architecture='mamba'),
        r"the architecture 'mamba', which is not supported; supported: llama, smollm3, qwen2, ",
    ),
    'mixture': (dict(expert_count=8), 'is a mixture of experts'),
    'missing key': (
        dict(block_count=None, context_length=None),
        'lacks the metadata llama.block_count, llama.context_length',
    ),
    'key of text': (dict(embedding_length='many'), "has llama.embedding_length 'many'"),
    'layers that differ': (
        dict(attention__head_count_kv=[1, 2]),
        'layers with different llama.attention.head_count_kv',
    ),
    'missing tensor': (
        dict(without=('blk.1.ffn_up.weight', 'output_norm.weight')),
        'lacks the tensors output_norm.weight, blk.1.ffn_up.weight',
    ),
    'no embeddings': (dict(without=('token_embd.weight',)), 'lacks the tensor token_embd.weight'),
    'extra tensor': (
        dict(more={'blk.0.attn_sinks.weight': np.ones(4, np.float32)}),
        'has unknown tensors blk.0.attn_sinks.weight',
    ),
    'heads': (
        dict(attention__head_count=2),
        r'attn_q.weight of shape \[64, 32\], .* not fit 2 heads of',
    ),
    'layers': (dict(block_count=1 << 31), 'has only 20 tensors for 2147483648 layers'),
    'size': (dict(attention__key_length=0), 'has a head size, .* of zero'),
    'negative': (dict(rope__freq_base=-1.0), 'has llama.rope.freq_base -1.0, which must be'),
    'fraction': (dict(block_count=1.5), 'block_count 1.5, which is not a whole number'),
    'turned': (dict(rope__dimension_count=32), 'rotates 32 dimensions of heads of only 16'),
    'windows': (
        dict(attention__sliding_window=8, attention__sliding_window_pattern=[True]),
        r'has the window pattern \[True\] for 2 layers',
    ),
    'values': (dict(attention__value_length=8), 'values and keys of different head sizes'),
    'rope': (
        dict(more={'rope_freqs.weight': np.linspace(1, 3, 8, dtype=np.float32)}),
        "has a rope_freqs.weight unlike Llama 3's",
    ),
    'types': (
        dict(
            more={
                'blk.0.ffn_up.weight': np.ones((96, 32), np.int8),
                'output_norm.weight': np.ones(32),
            }
        ),
        r'unsupported types: F64 \(output_norm.weight\), I8 \(blk.0.ffn_up.weight\); '
        'supported: F32, F16, Q4_0, ',
    ),
    'tokens': (dict(tokens=VOCAB + 1), 'tokenizer of 41 tokens, but embeddings for only 40'),
    'parts': (dict(split=3), 'is one of 3 parts: join them'),
}


@pytest.mark.parametrize('case', BAD)
def test_a_file_that_cannot_be_a_model_is_refused_with_the_names(case, path):
    options, message = BAD[case]
    options = dict(options)
    architecture = options.pop('architecture', 'llama')
    if case == 'unknown architecture':
        gguf_files.write(path, architecture, keys(), random_tensors({'x.weight': (4, 4)}))
    elif case in ('tokens', 'parts'):
        other = {'tokenizer.ggml.tokens': [f'{i}' for i in range(options.get('tokens', 1))]}
        other |= {'split.count': options['split']} if case == 'parts' else {}
        tensors = converted('llama', random_tensors(shapes('llama')))
        gguf_files.write(path, 'llama', keys() | other, tensors)
    else:
        make(path, architecture, **options)
    with pytest.raises(DataError, match=message) as caught:
        open_gguf(path)
    assert str(path) in str(caught.value) and '\n' not in str(caught.value)


def test_a_file_that_is_not_gguf_is_refused(path):
    with pytest.raises(MissingInputError, match='cannot be read: No such file'):
        open_gguf(path)
    for content, message in (
        (b'', 'is not a GGUF file: it is empty'),
        (b'PK\x03\x04' * 10, "is not a GGUF file: it starts with b'PK"),
        (b'GGUF\x01\x00\x00\x00' + bytes(16), 'is GGUF version 1; versions 2 and 3 are supported'),
        (b'GGUF\x00\x00\x00\x03' + bytes(16), 'is big-endian; only little-endian'),
        (b'GG', 'is damaged: the header runs past the end of the file at 2 bytes'),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            open_gguf(path)


def test_an_unreadable_gguf_file_is_a_permission_error(path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(container, 'open', refuse, raising=False)
    with pytest.raises(PermissionDeniedError, match='model.gguf may not be read'):
        open_gguf(path)


def test_a_tensor_that_occurs_twice_is_named(path):
    content = make(path).read_bytes()
    path.write_bytes(content.replace(b'blk.1.ffn_up.weight', b'blk.0.ffn_up.weight'))
    with pytest.raises(DataError, match='tensors occur twice: blk.0.ffn_up.weight'):
        open_gguf(path)
    path.write_bytes(content.replace(b'llama.context_length', b'llama.rope.freq_base'))
    with pytest.raises(DataError, match='the key llama.rope.freq_base occurs twice'):
        open_gguf(path)


def test_a_tensor_at_the_wrong_offset_is_named(path):
    content = bytearray(make(path).read_bytes())
    name = b'blk.0.ffn_up.weight'
    at = content.index(name) + len(name) + 4 + 2 * 8 + 4
    assert int.from_bytes(content[at : at + 8], 'little') % 32 == 0
    content[at : at + 8] = (64).to_bytes(8, 'little')
    path.write_bytes(content)
    with pytest.raises(DataError, match='do not start where the previous .*: blk.0.ffn_up.weight'):
        open_gguf(path)


def test_a_file_that_ends_early_is_refused_wherever_it_ends(path):
    kinds = {'blk.0.ffn_up.weight': gguf_files.TYPES.Q8_0}
    content = make(path, kinds=kinds, names=['a', 'word', 'and another']).read_bytes()
    texts = content.index(b'llama.names')
    draw = random.Random(0)
    for length in [
        *range(1, 40),
        *range(texts, texts + 100),
        *draw.sample(range(len(content)), 100),
        len(content) - 1,
    ]:
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match='is damaged|is truncated') as caught:
            open_gguf(path)
        assert str(path) in str(caught.value)
    assert 'tensors run past its end' in str(caught.value)


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_a_damaged_header_gives_a_clear_error_or_none(name, path):
    content = make(path, name, rope__scaling__type='linear').read_bytes()
    end, refused = content.index(b'blk.1.') + 400, 0
    for seed in range(80):
        draw = random.Random(seed)
        damaged = bytearray(content)
        for _ in range(draw.choice([1, 1, 8])):
            damaged[draw.randrange(4, end)] = draw.choice([0, 255, draw.randrange(256)])
        path.write_bytes(damaged)
        try:
            model = open_gguf(path)
        except DataError as error:
            refused += str(path) in str(error)
        else:
            for tensor_name in model.tensors.shapes:
                model.tensors.read(tensor_name)
    assert refused > 40


def test_every_supported_type_gives_its_number_of_values():
    read = container.readable_kinds()
    assert {'F32', 'F16', 'BF16', 'Q8_0', 'Q4_K', 'Q6_K', 'IQ4_XS', 'MXFP4'} <= set(read)
    for name in set(read) - {'F32', 'F16', 'BF16'}:
        kind = gguf_files.TYPES[name]
        size, length = gguf.GGML_QUANT_SIZES[kind]
        blocks = np.zeros((3, 2, length), np.uint8)
        stored = container.Tensor((3, 2 * size), int(kind), blocks)
        assert stored.read((slice(1, 3), slice(size - 1, size + 2))).shape == (2, 3)


def test_opening_a_file_imports_no_jax(path):
    program = 'import sys; from jaxfm.pretrained.gguf.model import open_gguf; '
    program += 'open_gguf(sys.argv[1]); '
    program += "print('jax' in sys.modules)"
    command = [sys.executable, '-c', program, str(make(path))]
    assert subprocess.run(command, capture_output=True, check=True, text=True).stdout == 'False\n'

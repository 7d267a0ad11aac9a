"""Damaged, unknown or hostile directories in Hugging Face's layout: each is refused with one
message and its exit code before anything is written, and nothing in them is ever run."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxfm import main
from jaxfm.config.load import load_config, write_config
from jaxfm.errors import DataError
from jaxfm.pretrained.huggingface.directory import open_directory
from jaxfm.pretrained.locate import open_pretrained, values_of
from tests.hf_directories import DEEP, LLAMA, random_tensors, write_json, write_model

ROOT = Path(__file__).resolve().parents[3]
PRETRAINED = str(ROOT / 'configs' / 'pretrained.py')
WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'
UP_PROJ = 'model.layers.0.mlp.up_proj.weight'

pytestmark = pytest.mark.usefixtures('compilation_cache_as_before')


# Ways to damage the directory of a good model.


def said(**changes):
    """Sets values in config.json; None removes a key."""

    def change(path):
        config = json.loads((path / 'config.json').read_text()) | changes
        kept = {name: value for name, value in config.items() if value is not None}
        write_json(path / 'config.json', kept)

    return change


def written(name, content):
    data = content.encode() if isinstance(content, str) else content
    return lambda path: (path / name).write_bytes(data)


def removed(*names):
    def remove(path):
        for name in names:
            (path / name).unlink()

    return remove


def cut(name, end):
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:end])


def header(change):
    """Replaces the header in front of the same tensors."""

    def rewrite(path):
        data = (path / WEIGHTS).read_bytes()
        size = int.from_bytes(data[:8], 'little')
        text = change(data[8 : 8 + size])
        (path / WEIGHTS).write_bytes(len(text).to_bytes(8, 'little') + text + data[8 + size :])

    return rewrite


def indexed(weight_map=None, **entries):
    """Adds an index of the one file, with changed entries for some tensors."""

    def write(path):
        names = dict.fromkeys(load_file(path / WEIGHTS), WEIGHTS) | entries
        write_json(path / INDEX, {'weight_map': names if weight_map is None else weight_map})

    return write


class Planted:
    """Writes `ran` into the current directory when it is unpickled."""

    def __reduce__(self):
        return exec, ("open('ran', 'w')",)


def pickled(path):
    (path / WEIGHTS).unlink()
    (path / 'pytorch_model.bin').write_bytes(pickle.dumps(Planted()))


def bringing_code(path):
    (path / WEIGHTS).unlink()
    (path / 'modeling_own.py').write_text("open('ran', 'w')\n")
    said(model_type='own', auto_map={'AutoModelForCausalLM': 'modeling_own.Own'})(path)


def scaled(**rope_scaling):
    return said(rope_scaling=rope_scaling)


# {name: (damage, exit code, words)}: found without jax.
FIRST_STAGE = {
    'no config': (removed('config.json'), 66, ['neither config.json']),
    'config is no JSON': (written('config.json', '{"a": '), 65, ['config.json', 'damaged']),
    'config is no UTF-8': (written('config.json', b'\xff\xfe'), 65, ['config.json', 'damaged']),
    'config is nested without end': (
        written('config.json', DEEP),
        65,
        ['config.json is damaged', 'recursion'],
    ),
    'config is a directory': (
        lambda path: [removed('config.json')(path), (path / 'config.json').mkdir()],
        66,
        ['neither config.json'],
    ),
    'config is a list': (written('config.json', '[1]'), 65, ['config.json', 'JSON object']),
    'generation config is damaged': (
        written('generation_config.json', '{'),
        65,
        ['generation_config.json', 'damaged'],
    ),
    'no weights': (removed(WEIGHTS), 66, ['has no weights', WEIGHTS, INDEX]),
    'an unknown family': (said(model_type='bloom'), 65, ["'bloom'", 'llama, qwen3']),
    'a mixture of experts': (
        said(model_type='mixtral', num_local_experts=8),
        65,
        ["'mixtral'", 'llama, qwen3', 'no mixture-of-experts'],
    ),
    'another mixture of experts': (said(model_type='qwen3_moe'), 65, ['no mixture-of-experts']),
    'experts in a known family': (said(num_experts=8), 65, ['num_experts 8', 'not supported']),
    'no family': (said(model_type=None), 65, ['model_type is missing']),
    'a family that is no text': (said(model_type=3), 65, ['model_type']),
    'a missing size': (said(vocab_size=None), 65, ['vocab_size is missing']),
    'a missing number of layers': (said(num_hidden_layers=None), 65, ['num_hidden_layers']),
    'text for a size': (said(hidden_size='16'), 65, ['hidden_size', 'whole number', "'16'"]),
    'a list for a size': (said(num_attention_heads=[4]), 65, ['num_attention_heads', '[4]']),
    'a fraction for a size': (said(intermediate_size=2.5), 65, ['intermediate_size', '2.5']),
    'a truth for a size': (said(num_hidden_layers=True), 65, ['num_hidden_layers', 'True']),
    'no layers': (said(num_hidden_layers=0), 65, ['num_hidden_layers', 'above 0, not 0']),
    'layers below zero': (said(num_hidden_layers=-2), 65, ['num_hidden_layers', '-2']),
    'layers without end': (said(num_hidden_layers=10**12), 65, ['num_hidden_layers', 'more than']),
    'a size below zero': (said(intermediate_size=-24), 65, ['intermediate_size', '-24']),
    'no heads for keys': (said(num_key_value_heads=0), 65, ['num_key_value_heads', 'not 0']),
    'heads that do not divide': (said(num_key_value_heads=3), 65, ['num_kv_heads 3', 'llama']),
    'an odd head': (said(head_dim=5), 65, ['head_dim', 'multiple of 2']),
    'text for an epsilon': (said(rms_norm_eps='small'), 65, ['rms_norm_eps', "'small'"]),
    'an infinite theta': (said(rope_theta=float('inf')), 65, ['rope_theta', 'inf']),
    'text for a truth': (said(tie_word_embeddings='no'), 65, ['tie_embeddings', 'boolean']),
    'an unknown activation': (said(hidden_act='mish'), 65, ["hidden_act 'mish'", 'silu']),
    'too few kinds of layer': (
        said(model_type='olmo3', layer_types=['full_attention']),
        65,
        ['layer_types', '2 entries'],
    ),
    'an unknown kind of layer': (
        said(model_type='qwen2', use_sliding_window=True, layer_types=['chunked', 'chunked']),
        65,
        ["'chunked' in layer_types"],
    ),
    'positions of another length': (
        said(model_type='smollm3', no_rope_layers=[1]),
        65,
        ['no_rope_layers', '2 entries'],
    ),
    'dynamic RoPE scaling': (scaled(rope_type='dynamic', factor=2.0), 65, ["'dynamic'", 'yarn']),
    'long RoPE': (scaled(type='longrope', long_factor=[1.0]), 65, ["'longrope'", 'llama3']),
    'RoPE scaling without a factor': (scaled(rope_type='linear'), 65, ['factor is missing']),
    'text for RoPE scaling': (said(rope_scaling='linear'), 65, ['rope_scaling', "'linear'"]),
    'text for a factor': (scaled(rope_type='linear', factor='x'), 65, ["'x'"]),
    'part of a head turned': (
        said(rope_parameters={'rope_theta': 1e4, 'partial_rotary_factor': 0.5}),
        65,
        ['partial_rotary_factor 0.5'],
    ),
    'quantised weights': (
        said(quantization_config={'quant_method': 'gptq', 'bits': 4}),
        65,
        ['quantization_config', 'gptq'],
    ),
    'a truncated file': (cut(WEIGHTS, -100), 65, [WEIGHTS, 'damaged']),
    'a file of a few bytes': (cut(WEIGHTS, 5), 65, [WEIGHTS, 'damaged']),
    'an empty file': (cut(WEIGHTS, 0), 65, [WEIGHTS, 'damaged']),
    'a header of another length': (
        lambda path: (path / WEIGHTS).write_bytes(
            b'\xff' * 7 + b'\x00' + (path / WEIGHTS).read_bytes()[8:]
        ),
        65,
        [WEIGHTS, 'damaged'],
    ),
    'a header that is no JSON': (header(lambda text: b'?' + text[1:]), 65, [WEIGHTS, 'damaged']),
    'offsets beyond the file': (
        header(lambda text: text.replace(b'"data_offsets":[0,', b'"data_offsets":[9,')),
        65,
        [WEIGHTS, 'damaged'],
    ),
    'a dtype of eight bits': (
        lambda path: save_file(
            random_tensors(LLAMA) | {UP_PROJ: np.zeros((24, 16), ml_dtypes.float8_e4m3fn)},
            path / WEIGHTS,
        ),
        65,
        [UP_PROJ, 'F8_E4M3', 'F32, F16, BF16'],
    ),
    'whole numbers': (
        lambda path: save_file(
            random_tensors(LLAMA) | {UP_PROJ: np.zeros((24, 16), np.int8)}, path / WEIGHTS
        ),
        65,
        [UP_PROJ, 'I8'],
    ),
    'a shard that is missing': (
        indexed(**{UP_PROJ: 'model-2.safetensors'}),
        65,
        [INDEX, 'model-2.safetensors'],
    ),
    'a shard that lacks a tensor': (
        indexed(**{'model.more.weight': WEIGHTS}),
        65,
        [WEIGHTS, 'model.more.weight'],
    ),
    'a shard outside': (
        indexed(**{UP_PROJ: '../model.safetensors'}),
        65,
        [INDEX, UP_PROJ, "'../model.safetensors'"],
    ),
    'a shard at an absolute path': (indexed(**{UP_PROJ: '/etc/passwd'}), 65, ["'/etc/passwd'"]),
    'a shard that is a number': (indexed(**{UP_PROJ: 3}), 65, [INDEX, UP_PROJ]),
    'an index without a map': (written(INDEX, '{}'), 65, [INDEX, 'weight_map']),
    'an index of nothing': (indexed({}), 65, [INDEX, 'weight_map']),
    'an index that is a list': (indexed([UP_PROJ]), 65, [INDEX, 'weight_map']),
    'an index that is no JSON': (written(INDEX, 'weights'), 65, [INDEX, 'damaged']),
    'an index that is nested without end': (written(INDEX, DEEP), 65, [INDEX, 'damaged']),
    'weights in a pickle': (pickled, 65, ['pytorch_model.bin', 'never loaded']),
    'code of its own': (bringing_code, 65, ['never run', 'auto_map']),
}


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp('good') / 'model')


def damaged(good, path, damage):
    shutil.copytree(good, path)
    damage(path)
    return path


@pytest.fixture(scope='module')
def first_stage(good, tmp_path_factory):
    """The result of a command line for every damage of FIRST_STAGE, all in one process."""
    root = tmp_path_factory.mktemp('first')
    commands = {}
    for number, (name, (damage, *_)) in enumerate(FIRST_STAGE.items()):
        path = damaged(good, root / 'models' / str(number), damage)
        commands[name] = ['--config', PRETRAINED, f'--config.init_from={path}', '--workdir=run']
        commands[name] += ['--mode=export', '--output=out'] if number % 2 else ['--mode=sample']
    program = """
import contextlib, io, json, sys
from jaxfm import main
results = {}
for name, argv in json.load(sys.stdin).items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        code = main.main(argv)
    results[name] = code, out.getvalue(), err.getvalue(), 'jax' in sys.modules
json.dump(results, sys.stdout)
"""
    done = subprocess.run(
        [sys.executable, '-c', program],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in root.iterdir()] == ['models']  # nothing written, nothing run
    return json.loads(done.stdout)


def assert_one_message(error: str, words):
    assert 'Traceback' not in error
    [message] = error.split('error: ')[1:]
    for word in words:
        assert word in message


@pytest.mark.parametrize('name', FIRST_STAGE)
def test_a_bad_directory_is_refused_without_jax_and_nothing_is_written(name, first_stage):
    _, expected, words = FIRST_STAGE[name]
    code, out, error, has_jax = first_stage[name]
    assert (code, out, has_jax) == (expected, '', False), error
    assert_one_message(error, ['config.init_from', *words])


def test_the_undamaged_directory_is_read(good):
    config = load_config(PRETRAINED, [f'init_from={good}'])
    assert (config.model.family, config.model.num_layers) == ('llama', 2)
    assert config.sampling.stop_ids == [1, 7]
    assert config.tokenizer.path == str(good)
    pretrained = open_directory(good)
    for name, value in load_file(good / WEIGHTS).items():
        np.testing.assert_array_equal(pretrained.tensors.read(name), value)


def test_an_unreadable_file_is_a_permission_error(good, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr('jaxfm.pretrained.huggingface.directory.safe_open', refuse)
    argv = ['--config', PRETRAINED, f'--config.init_from={good}', '--mode=sample']
    assert main.main([*argv, '--workdir', str(tmp_path / 'run')]) == 77


def test_code_and_pickles_next_to_good_weights_are_ignored(good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = damaged(good, tmp_path / 'model', pickled)
    shutil.copy(good / WEIGHTS, path)
    (path / 'modeling_own.py').write_text("open('ran', 'w')\n")
    said(auto_map={'AutoModelForCausalLM': 'modeling_own.Own'})(path)
    values = values_of(open_pretrained(str(path)))
    assert values['model']['family'] == 'llama'
    assert not (tmp_path / 'ran').exists()


def test_only_tensors_in_the_index_are_read(good, tmp_path):
    path = damaged(good, tmp_path / 'model', lambda path: None)
    tensors = load_file(path / WEIGHTS)
    names = sorted(tensors)
    (path / WEIGHTS).unlink()
    parts = {'a.safetensors': names[:5], 'b.safetensors': names[5:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part} | {'other': np.zeros(3)}, path / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    write_json(path / INDEX, {'weight_map': weight_map})
    assert open_directory(path).tensors.shapes == {n: v.shape for n, v in tensors.items()}


# The second stage: jax is imported, but nothing is written yet.


@pytest.fixture
def refused(tiny, good, tmp_path, monkeypatch, capsys):
    """Runs a command line on a damaged model in this process -> (code, stdout, stderr)."""
    monkeypatch.setenv('XDG_CACHE_HOME', tiny.environment['XDG_CACHE_HOME'])
    monkeypatch.chdir(tmp_path)

    def run(damage, *argv, mode='sample'):
        path = damaged(good, tmp_path / 'model', damage)
        argv = argv or ['--config', PRETRAINED]
        argv = [*argv, f'--config.init_from={path}', '--workdir=run', f'--mode={mode}']
        code = main.main([*argv, '--output=out'] if mode == 'export' else argv)
        return code, *capsys.readouterr()

    yield run
    assert [path.name for path in tmp_path.iterdir()] == ['model']


def tensors(change):
    def write(path):
        values = load_file(path / WEIGHTS)
        change(values)
        save_file(values, path / WEIGHTS)

    return write


BAD_TENSORS = {
    'one is missing': (tensors(lambda t: t.pop(UP_PROJ)), ['missing', UP_PROJ]),
    'the head is missing': (
        tensors(lambda t: t.pop('lm_head.weight')),
        ['missing: lm_head.weight'],
    ),
    'one too many': (
        tensors(lambda t: t.update({'model.more.weight': np.zeros(3, np.float32)})),
        ['unexpected', 'model.more.weight'],
    ),
    'a bias too many': (
        tensors(
            lambda t: t.update({'model.layers.1.self_attn.q_proj.bias': np.zeros(16, np.float32)})
        ),
        ['unexpected', 'layers.1.self_attn.q_proj.bias'],
    ),
    'one of another shape': (
        tensors(lambda t: t.update({UP_PROJ: np.zeros((16, 24), np.float32)})),
        ['wrong shape', f'{UP_PROJ} is [16, 24], not [24, 16]'],
    ),
    'one without dimensions': (
        tensors(lambda t: t.update({'model.norm.weight': np.zeros((), np.float32)})),
        ['wrong shape', 'model.norm.weight is [], not [16]'],
    ),
    'another vocabulary': (said(vocab_size=280), ['embed_tokens.weight is [300, 16], not [280']),
    'too many layers': (said(num_hidden_layers=3), ['missing', 'model.layers.2.', 'and 3 more']),
    'too few layers': (said(num_hidden_layers=1), ['unexpected', 'model.layers.1.']),
    'another family': (said(model_type='qwen3'), ['missing', 'self_attn.q_norm.weight']),
}


@pytest.mark.parametrize('name', BAD_TENSORS)
def test_weights_that_do_not_match_the_config_are_named(name, refused, monkeypatch):
    damage, words = BAD_TENSORS[name]
    mode = 'export' if list(BAD_TENSORS).index(name) % 2 else 'sample'
    monkeypatch.setattr(f'jaxfm.modes.{mode}.open_tokenizer', None)  # must not be reached
    code, out, error = refused(damage, mode=mode)
    assert (code, out) == (65, '')
    assert_one_message(error, ['the weights do not match its config', *words])


def test_training_from_bad_weights_is_refused_before_the_data_is_read(refused, tiny, monkeypatch):
    monkeypatch.setattr('jaxfm.modes.train.open_data', None)
    path = tiny.derive('no_model', '    del config["model"]; del config["tokenizer"]')
    damage, words = BAD_TENSORS['one is missing']
    code, _, error = refused(damage, '--config', str(path), mode='train')
    assert code == 65
    assert_one_message(error, words)


def test_a_second_copy_of_a_tied_head_is_allowed(good, tmp_path):
    from tests.pretrained.loading import Loading  # imports jax

    path = damaged(good, tmp_path / 'model', said(tie_word_embeddings=True))
    inverse = tensors(
        lambda t: t.update({'model.layers.0.self_attn.rotary_emb.inv_freq': np.zeros(2)})
    )
    inverse(path)
    params = Loading(path).load()
    assert 'head/table' not in params


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(refused):
    small = LLAMA | {'vocab_size': 200}
    both = [said(vocab_size=200), lambda p: save_file(random_tensors(small), p / WEIGHTS)]
    code, out, error = refused(lambda path: [change(path) for change in both])
    assert (code, out) == (65, '')
    assert_one_message(error, ['258 tokens', 'vocab_size is only 200'])


@pytest.mark.parametrize(
    'name, content, words',
    [
        ('tokenizer.json', '{"a": 1}', ['tokenizer']),
        ('tokenizer_config.json', '[]', ['tokenizer_config.json', 'object']),
        ('tokenizer_config.json', '{"eos_token": "<|nowhere|>"}', ['<|nowhere|>']),
        ('tokenizer_config.json', '{"tokenizer_class": [1]}', ['eos_token']),
        ('tokenizer.json', DEEP, ['tokenizer.json']),
        ('tokenizer_config.json', DEEP, ['tokenizer_config.json is damaged', 'recursion']),
        *(
            ('tokenizer_config.json', f'{{"chat_template": {said}}}', ['chat_template must be'])
            for said in ('[{"name": "default"}]', '[{"template": "a"}]', '["a"]', '{"a": 1}', '3')
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_damaged_tokenizer_is_refused(refused, name, content, words):
    code, out, error = refused(written(name, content))
    assert (code, out) == (65, '')
    assert_one_message(error, words)


ESCAPE = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    "{{ cycler.__init__.__globals__.os.system('touch ran') }}"
)


@pytest.mark.parametrize('mode', ['sample', 'export'])
def test_a_template_does_not_leave_its_sandbox(refused, mode):
    config = {'bos_token': '<|bos|>', 'eos_token': '<|eos|>', 'chat_template': ESCAPE}
    code, out, error = refused(written('tokenizer_config.json', json.dumps(config)), mode=mode)
    assert (code, out) == (65, '')
    assert_one_message(error, ['chat template', 'unsafe'])


def test_a_run_without_checkpoints_is_refused_and_leaves_no_work_directory(
    tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv('XDG_CACHE_HOME', tiny.environment['XDG_CACHE_HOME'])
    (tmp_path / 'earlier').mkdir()
    write_config(load_config(str(tiny.config)), tmp_path / 'earlier' / 'config.json')
    from jaxfm.tokenizer import BytesConfig
    from jaxfm.tokenizer.build import Bytes

    Bytes(BytesConfig(), ()).save(tmp_path / 'earlier' / 'tokenizer')
    earlier = f'--config.init_from={tmp_path / "earlier"}'
    assert main.main(tiny.arguments(tmp_path / 'new' / 'run', earlier)) == 66
    assert_one_message(capsys.readouterr().err, ['holds no checkpoint yet', 'earlier'])
    assert [path.name for path in tmp_path.iterdir()] == ['earlier']


def test_data_errors_name_the_directory(good, tmp_path):
    path = damaged(good, tmp_path / 'model', said(model_type='bloom'))
    with pytest.raises(DataError, match=str(path)):
        values_of(open_pretrained(str(path)))

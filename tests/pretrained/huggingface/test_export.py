"""Exports: complete or absent, identical from any mesh, and equal when read back."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file

from jaxfm import main
from jaxfm.chat.render import Chat
from jaxfm.config.load import load_config
from jaxfm.errors import ConfigError, PermissionDeniedError, StorageError
from jaxfm.metrics.writers import read_records
from jaxfm.models import TransformerConfig
from jaxfm.models.families import FAMILIES
from jaxfm.models.families.base import read_config, write_config
from jaxfm.pretrained import ExportConfig
from jaxfm.pretrained.huggingface.directory import open_directory
from jaxfm.pretrained.huggingface.export import Exporter
from jaxfm.tokenizer import BytesConfig
from jaxfm.tokenizer.build import Bytes, build_tokenizer, load_tokenizer
from tests.hf_directories import write_model
from tests.pretrained.loading import ROOT, Loading
from tests.runs import PATIENCE

PRETRAINED = str(ROOT / 'configs' / 'pretrained.py')
WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'
CHATML = BytesConfig(special_tokens=['<|im_start|>', '<|im_end|>'], chat_template='chatml')

pytestmark = pytest.mark.usefixtures('quick_compilation', 'compilation_cache_as_before')


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A random model with a tokenizer that has a chat template."""
    path = write_model(tmp_path_factory.mktemp('source') / 'model', tokenizer=False)
    Bytes(CHATML, ()).save(path)
    return path


def write(source, output, mesh=None, tokenizer=None, **config):
    """Loads the model on a mesh and writes it."""
    loading = Loading(source, mesh or {})
    tokenizer = tokenizer or Bytes(CHATML, ())
    parts = loading.parts
    exporter = Exporter(
        ExportConfig(**config), loading.config, parts.axes, parts.shapes, tokenizer, {1, 7}
    )
    params = loading.load()
    with jax.set_mesh(loading.mesh):
        exporter.write(params, output)
    return output


def weights(path) -> dict[str, np.ndarray]:
    """{name: array} of a directory with any number of files."""
    found = {}
    for file in sorted(path.glob('*.safetensors')):
        found |= load_file(file)
    return found


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value, name)


def test_several_files_make_one_model(source, tmp_path):
    path = write(source, tmp_path / 'out', shard_gigabytes=12e-6)
    files = sorted(file.name for file in path.glob('*.safetensors'))
    assert len(files) > 3
    assert files[0] == f'model-00001-of-{len(files):05}.safetensors'
    index = json.loads((path / INDEX).read_text())
    before = load_file(source / WEIGHTS)
    assert index['metadata']['total_size'] == sum(value.nbytes for value in before.values())
    for file in files:
        tensors = load_file(path / file)
        said = {name for name, where in index['weight_map'].items() if where == file}
        assert said == set(tensors)
        assert len(tensors) == 1 or sum(value.nbytes for value in tensors.values()) <= 12_000
    assert_equal(weights(path), before)
    again = open_directory(path).tensors
    assert_equal({name: again.read(name) for name in again.shapes}, before)


@pytest.mark.parametrize('mesh', [dict(fsdp=8), dict(replica=2, fsdp=2, tensor=2)], ids=str)
def test_eight_devices_write_the_same_files_as_one(source, tmp_path, mesh):
    alone = write(source, tmp_path / 'alone')
    together = write(source, tmp_path / 'together', mesh)
    assert sorted(file.name for file in together.iterdir()) == sorted(
        file.name for file in alone.iterdir()
    )
    for file in alone.iterdir():
        assert (together / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize('name', ['float32', 'bfloat16', 'float16'])
def test_weights_are_written_in_the_requested_dtype(source, tmp_path, name):
    path = write(source, tmp_path / 'out', dtype=name)
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    rounded = {key: value.astype(dtype) for key, value in load_file(source / WEIGHTS).items()}
    assert_equal(weights(path), rounded)
    assert json.loads((path / 'config.json').read_text())['torch_dtype'] == name
    config = load_config(PRETRAINED, [f'init_from={path}'])
    assert config.export.dtype == name  # an export of the export has the same dtype


# Command line


@pytest.fixture
def cli(tiny, monkeypatch, capsys):
    """Runs a command line in this process, on its eight devices -> (code, stderr)."""
    monkeypatch.setenv('XDG_CACHE_HOME', tiny.environment['XDG_CACHE_HOME'])

    def run(*argv):
        capsys.readouterr()
        code = main.main([str(argument) for argument in argv])
        out, error = capsys.readouterr()
        assert out == ''
        return code, error

    return run


def export(init_from, output):
    """The arguments to export a pretrained model unchanged."""
    argv = ['--config', PRETRAINED, f'--config.init_from={init_from}', '--mode=export']
    return [*argv, '--workdir', output.with_name('unused'), '--output', output]


def assert_one_message(error: str, words):
    assert 'Traceback' not in error
    [message] = error.split('error: ')[1:]
    for word in words:
        assert word in message


def test_tokenizer_template_and_stop_ids_round_trip(cli, source, tmp_path):
    assert cli(*export(source, tmp_path / 'out'))[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ['out']
    before, after = (
        load_config(PRETRAINED, [f'init_from={path}']) for path in (source, tmp_path / 'out')
    )
    assert after.model == before.model
    one, other = (build_tokenizer(config.tokenizer, ()) for config in (before, after))
    assert other.chat_template == one.chat_template != ''
    assert (other.bos_id, other.eos_id) == (one.bos_id, one.eos_id)
    chat = [{'role': 'user', 'content': 'Hi'}]
    assert Chat(other).prompt(chat) == Chat(one).prompt(chat)
    end = one.special_tokens['<|im_end|>']
    assert set(after.sampling.stop_ids) == set(before.sampling.stop_ids) | {one.eos_id, end}
    generation = json.loads((tmp_path / 'out' / 'generation_config.json').read_text())
    assert generation['eos_token_id'] == sorted({1, 7, one.eos_id, end})


@pytest.mark.parametrize(
    'name, bos_id, expected',
    [
        ('tokenizer.model', None, dict(tokenizer_class='LlamaTokenizer', add_bos_token=False)),
        ('tokenizer.model', 1, dict(tokenizer_class='LlamaTokenizer', add_bos_token=True)),
        ('tokenizer.json', None, dict(tokenizer_class='PreTrainedTokenizerFast')),
    ],
)
def test_an_export_tells_transformers_how_to_read_its_tokenizer(
    source, tmp_path, name, bos_id, expected
):
    def save(directory):
        (directory / name).write_text('{}')
        (directory / 'tokenizer_config.json').write_text('{"eos_token": "</s>"}')

    tokenizer = SimpleNamespace(bos_id=bos_id, eos_id=1, save=save)
    path = write(source, tmp_path / 'out', tokenizer=tokenizer)
    said = json.loads((path / 'tokenizer_config.json').read_text())
    assert said == {'eos_token': '</s>'} | expected


def test_an_existing_output_is_not_overwritten(cli, source, tmp_path, monkeypatch):
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'precious').write_text('')
    (tmp_path / 'file').write_text('')
    (tmp_path / 'empty').mkdir()
    for name in ('full', 'file'):
        code, error = cli(*export(source, tmp_path / name))
        assert code == 78
        assert_one_message(error, [str(tmp_path / name), 'already exists'])
    assert [path.name for path in (tmp_path / 'full').iterdir()] == ['precious']
    monkeypatch.chdir(tmp_path / 'empty')
    assert cli(*export(source, tmp_path / 'empty')[:-1], '.')[0] == 0
    assert (tmp_path / 'empty' / WEIGHTS).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['empty', 'file', 'full']


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_loaded(
    cli, source, tmp_path, monkeypatch
):
    monkeypatch.setattr('jaxfm.modes.load', None)
    (tmp_path / 'file').write_text('')
    code, error = cli(*export(source, tmp_path / 'file' / 'below' / 'out'))
    assert code == 74
    assert_one_message(error, ['out: cannot be written', 'file is not a directory'])
    monkeypatch.setattr('os.access', lambda path, how: False)
    code, error = cli(*export(source, tmp_path / 'out'))
    assert code == 77
    assert_one_message(error, ['out: cannot be written', str(tmp_path)])


@pytest.mark.parametrize(
    'refusal, kind, words',
    [
        (OSError(28, 'No space left on device'), StorageError, 'out: cannot be written: No space'),
        (PermissionError(13, 'Denied'), PermissionDeniedError, 'out: cannot be written: Denied'),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
    ids=['full', 'closed', 'interrupted'],
)
def test_a_failed_export_leaves_nothing(source, tmp_path, monkeypatch, refusal, kind, words):
    def refuse(*arguments):
        raise refusal

    monkeypatch.setattr('jaxfm.pretrained.huggingface.export._write_json', refuse)
    with pytest.raises(kind, match=words):
        write(source, tmp_path / 'out')
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_no_directory_with_the_final_name(cli, tiny, source, tmp_path):
    program = """
import os, signal, sys
from jaxfm import main
from jaxfm.pretrained.huggingface.export import Exporter
Exporter._write_configs = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
main.main(sys.argv[1:])
"""
    argv = [str(argument) for argument in export(source, tmp_path / 'out')]
    environment = os.environ | tiny.environment | {'PYTHONPATH': str(ROOT)}
    done = subprocess.run([sys.executable, '-c', program, *argv], env=environment)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ['out.partial']
    assert cli(*argv)[0] == 0  # leftovers do not block the next export
    assert [path.name for path in tmp_path.iterdir()] == ['out']
    assert_equal(weights(tmp_path / 'out'), load_file(source / WEIGHTS))


# Runs of ours


@pytest.fixture(scope='module')
def exporting(tiny):
    """A run on one device that exports during training -> (its config file, work directory)."""
    change = '    config.export = dict(every=4)\n    config.steps = 6'
    config, workdir = tiny.derive('exporting', change), tiny.root / 'exporting'
    process = tiny.start(workdir, '--config.sampling.num_samples=0', config=config)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, Path(f'{workdir}.stderr').read_text()[-2000:]
    return config, workdir


def test_a_run_exports_at_its_cadence_and_at_the_end(exporting, tiny):
    config, workdir = exporting
    assert sorted(path.name for path in (workdir / 'export').iterdir()) == ['4', '6']
    loading = Loading(workdir / 'export' / '6')
    params, saved = loading.load(), tiny.saved_state(workdir, 6)
    for path, value in params.items():
        # Padding rows of the tables are not written.
        used = slice(loading.config.vocab_size if path.endswith('table') else None)
        np.testing.assert_array_equal(value[used], saved[f'trainable/{path}'][used], path)
    earlier = weights(workdir / 'export' / '4')
    assert any((earlier[n] != v).any() for n, v in weights(workdir / 'export' / '6').items())
    records = read_records(workdir / 'metrics.jsonl')
    assert {r['step'] for r in records if 'eval/export/seconds' in r} == {4, 6}


def test_the_mode_exports_a_work_directory_a_run_and_a_directory_alike(cli, exporting, tmp_path):
    config, workdir = exporting
    newest = ['--config', config, '--workdir', workdir, '--mode=export', '--output']
    assert cli(*newest, tmp_path / 'own')[0] == 0
    assert cli(*export(workdir, tmp_path / 'run'))[0] == 0
    assert cli(*export(workdir / 'export' / '6', tmp_path / 'directory'))[0] == 0
    expected = weights(workdir / 'export' / '6')
    for name in ('own', 'run', 'directory'):
        assert_equal(weights(tmp_path / name), expected)
        for file in ('config.json', 'generation_config.json', 'tokenizer.json'):
            right = (workdir / 'export' / '6' / file).read_bytes()
            assert (tmp_path / name / file).read_bytes() == right, (name, file)


_PADDED = ('embedding', 'head')


def test_a_run_starts_from_an_export_as_from_the_run_itself(cli, exporting, tiny, tmp_path):
    _, workdir = exporting
    found = []
    for number, origin in enumerate((workdir, workdir / 'export' / '6')):
        new = tmp_path / str(number)
        more = ['--config.steps=1', '--config.optimizer.warmup_steps=0']
        more += ['--config.sampling.num_samples=0', '--config.metrics.log_every=1']
        assert cli(*tiny.arguments(new, *more, f'--config.init_from={origin}'))[0] == 0
        records = [r for r in read_records(new / 'metrics.jsonl') if r['kind'] in ('train', 'eval')]
        # Norms count the rows that pad the vocabulary, which no export has.
        differ = {'time', *(f'train/{n}_norm/{g}' for n in ('param', 'update') for g in _PADDED)}
        found.append([{k: v for k, v in r.items() if k not in differ} for r in records])
    assert found[0] == found[1]
    assert any('eval/heldout/loss' in record for record in found[0])


def test_evaluation_exports_nothing(cli, exporting):
    config, workdir = exporting
    before = {path: path.stat().st_mtime_ns for path in (workdir / 'export').rglob('*')}
    assert cli('--config', config, '--workdir', workdir, '--mode=eval')[0] == 0
    assert {path: path.stat().st_mtime_ns for path in (workdir / 'export').rglob('*')} == before


def test_a_model_that_no_family_can_express_is_refused_before_the_run_begins(cli, tiny, tmp_path):
    more = ['--config.model.embedding_norm=true', '--config.export.every=4']
    code, error = cli(*tiny.arguments(tmp_path / 'new' / 'run', *more))
    assert code == 78
    assert_one_message(error, ['no family can express'])
    for name in FAMILIES:
        assert re.search(rf'^  {name}: .*embedding_norm', error, re.MULTILINE), name
    assert list(tmp_path.iterdir()) == []


# Which family can express a model defined here


def model(block=None, **changes) -> TransformerConfig:
    block = dict(num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24) | (block or {})
    values = dict(vocab_size=60, embed_dim=16, num_layers=2, block=block)
    return TransformerConfig.model_validate(values | changes)


@pytest.mark.parametrize(
    'family, block',
    [
        ('llama', {}),
        ('llama', dict(activation='relu_squared', qkv_bias=True, output_bias=True)),
        ('llama', dict(rope=dict(theta=5e5, scaling='llama3', factor=8.0))),
        ('qwen3', dict(qk_norm=True)),
        ('qwen2', dict(qkv_bias=True)),
        ('mistral', dict(window=4)),
        ('smollm3', dict(rope=None)),
        ('olmo2', dict(pre_norm=False, post_norm=True, qk_norm=True, joint_qk_norm=True)),
    ],
)
def test_a_model_goes_to_the_first_family_that_can_express_it(family, block):
    config = model(block)
    hf = write_config(config)
    assert hf['model_type'] == family
    again = TransformerConfig.model_validate(read_config(hf))
    ours, theirs = dict(config), dict(again)
    for name in ('family', 'context_length'):
        ours.pop(name), theirs.pop(name)
    assert theirs == ours


@pytest.mark.parametrize(
    'name, config',
    [
        ('block.gated', model(dict(gated=False))),
        ('block.query_scale', model(dict(query_scale=0.5))),
        ('block.attention_softcap', model(dict(attention_softcap=20.0))),
        ('embedding_norm', model(embedding_norm=True)),
        ('logits_softcap', model(logits_softcap=30.0)),
        ('embedding_scale', model(embedding_scale=2.0)),
    ],
)
def test_what_each_family_would_lose_is_listed(name, config):
    with pytest.raises(ConfigError) as caught:
        write_config(config)
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(':')[0].strip() for line in lines] == list(FAMILIES)
    assert name in lines[0]


def test_a_model_with_a_family_lists_only_what_that_family_would_lose():
    with pytest.raises(ConfigError, match=r'family llama cannot(.|\n)*llama: block\.qk_norm$'):
        write_config(model(dict(qk_norm=True), family='llama'))


def test_an_exported_tokenizer_puts_bos_in_front_of_a_text(source, tmp_path):
    written = write(source, tmp_path / 'out') / 'tokenizer.json'
    assert tokenizers.Tokenizer.from_file(str(written)).encode('a').ids == [0, 99]
    assert load_tokenizer(tmp_path / 'out').bos_id == 0
    assert load_tokenizer(tmp_path / 'out').encode('a') == [99]

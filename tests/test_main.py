"""The command line: modes, what they leave, and one clear line for every mistake."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxfm import main
from jaxfm.metrics.writers import read_records

# Mistakes that are found without jax: (arguments after those of the tiny run, code, words).
FIRST_STAGE = {
    'a typo': (['--config.model.embed_dmi=64'], 78, ['embed_dmi', 'did you mean embed_dim?']),
    'a typo in a flag': (['--wrokdir=x'], 64, ['--wrokdir']),
    'a flag without its value': (['--prompt'], 64, ['--prompt']),
    'an unknown mode': (['--mode=trian'], 64, ['trian', 'train']),
    'a wrong type': (['--config.steps=ten'], 78, ['config.steps', "'ten'"]),
    'a wrong name': (['--config.optimizer.name=adam'], 78, ['adam', 'adamw']),
    'several mistakes': (
        ['--config.steps=ten', '--config.model.embed_dmi=64', '--config.data.batch_size=0'],
        78,
        ['config.steps', 'embed_dim', 'batch_size'],
    ),
    'rows that no mesh splits': (['--config.mesh.fsdp=3'], 78, ['8 = 2 x 3 + 2']),
    'heads that no mesh splits': (['--config.mesh.tensor=4'], 78, ['num_kv_heads 2', '2 = 0 x 4']),
    'an axis that splits nothing yet': (['--config.mesh.expert=2'], 78, ['mesh.expert']),
    'a tokenizer larger than the model': (
        ['--config.data.tokenizer.name=bpe', '--config.data.tokenizer.vocab_size=400'],
        78,
        ['400', '300', '100 tokens would have no embedding'],
    ),
    'an unknown group to change': (['--allow_change=optimiser'], 64, ['optimizer']),
    'no tokens wanted': (['--mode=sample', '--max_tokens=0'], 64, ['--max_tokens', '0']),
    'a temperature below zero': (['--mode=sample', '--temperature=-1'], 64, ['-1']),
    'nothing to sample from': (['--mode=sample'], 66, ['holds no run to sample']),
    'nothing to evaluate': (['--mode=eval'], 66, ['holds no run to eval']),
}


@pytest.fixture(scope='module')
def first_stage(tiny, tmp_path_factory):
    """Every mistake of FIRST_STAGE and of the file itself, tried in one process."""
    root = tmp_path_factory.mktemp('first')
    arguments = {
        name: tiny.arguments(root / 'run', *more) for name, (more, *_) in FIRST_STAGE.items()
    }
    arguments['no such file'] = ['--config', str(tiny.root / 'tinny.py'), '--workdir', 'run']
    arguments['no config'] = ['--workdir', 'run']
    # A group to change is looked at when there is a run.
    (root / 'other').mkdir()
    shutil.copy(_config_json(tiny, root), root / 'other' / 'config.json')
    arguments['an unknown group to change'][3] = str(root / 'other')
    program = """
import contextlib, io, json, sys, time
from jaxfm import main
results = {}
for name, argv in json.load(sys.stdin).items():
    start, out, err = time.monotonic(), io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        code = main.main(argv)
    heavy = [module for module in ('jax', 'numpy', 'tokenizers') if module in sys.modules]
    results[name] = code, out.getvalue(), err.getvalue(), heavy, time.monotonic() - start
json.dump(results, sys.stdout)
"""
    start = time.monotonic()
    process = subprocess.run(
        [sys.executable, '-c', program],
        input=json.dumps(arguments),
        capture_output=True,
        text=True,
        env=os.environ | tiny.environment,
        cwd=root,
    )
    assert process.returncode == 0, process.stderr
    results = json.loads(process.stdout)
    results['seconds'] = time.monotonic() - start
    results['left'] = sorted(path.name for path in root.iterdir())
    return results


def _config_json(tiny, directory) -> Path:
    from jaxfm import config

    path = directory / 'config.json'
    config.write(config.load(str(tiny.config)), path)
    return path


def assert_one_clear_message(error: str, words):
    lines = error.splitlines()
    assert lines[0].startswith('error: ')
    assert 'Traceback' not in error
    for word in words:
        assert word in error


@pytest.mark.parametrize('name', FIRST_STAGE)
def test_a_mistake_is_told_without_jax_and_nothing_is_written(name, first_stage):
    _, expected, words = FIRST_STAGE[name]
    code, out, error, heavy, seconds = first_stage[name]
    assert (code, out, heavy) == (expected, '', [])
    assert_one_clear_message(error, words)
    assert seconds < 2
    assert first_stage['left'] == ['config.json', 'other']


def test_all_mistakes_at_once_cost_less_than_two_seconds_each(first_stage):
    assert first_stage['seconds'] < 2 * len(FIRST_STAGE)


def test_a_missing_config_file_is_told_with_the_nearest_name(first_stage):
    code, _, error, *_ = first_stage['no such file']
    assert code == 66
    assert_one_clear_message(error, ['tinny.py', 'did you mean tiny.py?'])


def test_a_command_without_config_names_a_good_first_one(first_stage):
    code, _, error, *_ = first_stage['no config']
    assert code == 64
    assert_one_clear_message(error, ['configs/quickstart.py'])

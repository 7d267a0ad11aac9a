"""The lifecycle config learns what it promises, and only with the right mask. Takes minutes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxfm.metrics.writers import read_records

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
# Runs the command line after the assistant's mask has been moved by SHIFT tokens.
SHIFTED = """
import sys
import numpy as np
from jaxfm.chat.render import Chat
from jaxfm.main import main

encode = Chat.encode

def shifted(self, messages, tools=()):
    ids, mask = encode(self, messages, tools)
    return ids, np.roll(mask, SHIFT)

Chat.encode = shifted
sys.exit(main(sys.argv[1:]))
"""


def run(workdir, *command):
    arguments = ['--config', 'configs/lifecycle.py', '--workdir', str(workdir)]
    cache = {'XDG_CACHE_HOME': str(workdir) + '.cache'}  # of its own: a mask is in the token cache
    ended = subprocess.run(
        [sys.executable, *command, *arguments], cwd=ROOT, env=os.environ | cache, timeout=1200
    )
    assert ended.returncode == 0


def scores(workdir) -> dict[str, dict[str, float]]:
    """{what has been trained on: {name: score}}."""
    records = [r for r in read_records(workdir / 'metrics.jsonl') if r['kind'] == 'eval']
    named = [
        {k.removeprefix('eval/problems/'): v for k, v in r.items() if 'eval/problems/' in k}
        for r in records
    ]
    named = [values for values in named if values]
    return dict(zip(('nothing', 'pretrain', 'sft'), named, strict=True))


@pytest.fixture(scope='module')
def life(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('life') / 'run'
    run(workdir, '-m', 'jaxfm.main')
    return workdir


def test_pre_training_teaches_the_skills_and_fine_tuning_when_to_use_them(life):
    found = scores(life)
    records = list(read_records(life / 'metrics.jsonl'))
    print({name: values['pass@1'] for name, values in found.items()})
    print(found['sft'], f'{records[-1]["time"] - records[0]["time"]:.0f} s')
    assert found['nothing']['prompts'] >= 200
    assert found['nothing']['pass@1'] < 0.02
    assert found['pretrain']['pass@1'] < 0.05
    assert found['sft']['pass@1'] >= 0.9
    kinds = {
        name: value
        for name, value in found['sft'].items()
        if name.startswith('pass@1/') and not name.endswith(('_low', '_high'))
    }
    assert len(kinds) >= 4
    assert min(kinds.values()) >= 0.8


@pytest.mark.parametrize('shift', [1, -1])
def test_a_mask_that_is_shifted_by_one_teaches_no_answer(life, shift, tmp_path):
    workdir = tmp_path / 'shifted'
    shutil.copytree(life, workdir)
    for step in (life / 'checkpoints').glob('[0-9]*'):
        if int(step.name) > end_of_pretraining(life):
            shutil.rmtree(workdir / 'checkpoints' / step.name)
    run(workdir, '-c', SHIFTED.replace('SHIFT', str(shift)))
    assert scores(workdir)['sft']['pass@1'] < 0.8  # far below the bar above


def end_of_pretraining(workdir) -> int:
    """The step whose checkpoint stays, whatever comes after it."""
    train = [r for r in read_records(workdir / 'metrics.jsonl') if r['kind'] == 'train']
    return max(r['step'] for r in train if r['phase'] == 'pretrain')

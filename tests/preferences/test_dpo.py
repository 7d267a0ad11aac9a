"""The shipped config of preference learning: what it promises, and smoke."""

import json
import math

import pytest

from jaxfm.metrics.writers import read_records
from tests.conftest import ROOT
from tests.runs import PATIENCE


def run(tiny, workdir, name, *more):
    process = tiny.start(workdir, *more, config=ROOT / 'configs' / name)
    process.communicate(timeout=5 * PATIENCE)
    assert process.returncode == 0
    return [r for r in read_records(workdir / 'metrics.jsonl') if 'eval/pairs/accuracy' in r]


def test_smoke_learns_from_pairs_to_the_end(tiny, tmp_path):
    records = run(tiny, tmp_path / 'run', 'dpo.py:smoke')
    assert [record['step'] for record in records] == [0, 10, 20, 30]
    assert (tmp_path / 'run' / 'report.html').exists()
    # Pairs of one's own, with adapters: the reference is then the model without them.
    pairs = [
        {'prompt': f'{n}?', 'chosen': 'yes' * (n % 4 + 1), 'rejected': 'no'} for n in range(60)
    ]
    (tmp_path / 'pairs.jsonl').write_text('\n'.join(map(json.dumps, pairs)), 'utf-8')
    more = ('model.lora.rank=4', f'init_from={tmp_path / "run"}', 'steps=12', 'metrics.log_every=1')
    more += (f'data.path={tmp_path / "pairs.jsonl"}', 'data.sequence_length=128')
    more += ('optimizer.learning_rate=0.02', 'optimizer.warmup_steps=0')
    tuned = tmp_path / 'tuned'
    before, after = run(tiny, tuned, 'dpo.py:files', *(f'--config.{each}' for each in more))
    assert before['step'] == 0 and after['step'] == 12
    losses = [r['train/loss'] for r in read_records(tuned / 'metrics.jsonl') if 'train/loss' in r]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < 0.3
    # What these weights have yet to learn, that model knows.
    more += (f'objective.reference={tuned}',)
    other = tmp_path / 'other'
    run(tiny, other, 'dpo.py:files', *(f'--config.{each}' for each in more))
    known = [r['train/loss'] for r in read_records(other / 'metrics.jsonl') if 'train/loss' in r]
    assert known[0] > 1.2 and known[-1] < known[0] - 0.5


@pytest.mark.slow
def test_the_model_learns_which_answers_are_wrong(tiny, tmp_path):
    """From 0.89 to 0.97 when this was written."""
    found = {r['step']: r for r in run(tiny, tmp_path / 'run', 'dpo.py')}
    assert found[325]['eval/pairs/accuracy_low'] > found[225]['eval/pairs/accuracy_high']

"""The shipped configs of reinforcement learning: what rl_addition promises, and smoke."""

import pytest

from jaxfm.metrics.writers import read_records
from tests.conftest import ROOT
from tests.runs import PATIENCE


def run(tiny, workdir, name):
    process = tiny.start(workdir, config=ROOT / 'configs' / name)
    process.communicate(timeout=5 * PATIENCE)
    assert process.returncode == 0
    return list(read_records(workdir / 'metrics.jsonl'))


@pytest.mark.parametrize('name', ['rl_gsm8k', pytest.param('rl_addition', marks=pytest.mark.slow)])
def test_smoke_samples_and_trains_to_the_end(tiny, tmp_path, name):
    records = run(tiny, tmp_path / 'run', f'{name}.py:smoke')
    rewards = [record['rollout/reward'] for record in records if 'rollout/reward' in record]
    assert rewards and all(0 <= reward <= 1 for reward in rewards)
    assert (tmp_path / 'run' / 'report.html').exists()


@pytest.mark.slow
def test_rewards_alone_teach_to_add(tiny, tmp_path):
    """From 0.23 to 0.97 in 125 steps when this was written."""
    records = run(tiny, tmp_path / 'run', 'rl_addition.py')
    scores = {r['step']: r['eval/sums/pass@1'] for r in records if 'eval/sums/pass@1' in r}
    assert scores[325] < 0.5
    assert scores[450] > 0.95

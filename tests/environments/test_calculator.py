"""The shipped config: what rl_calculator promises, and smoke."""

import pytest

from jaxfm.evals.samples import read_samples
from jaxfm.metrics.writers import read_records
from tests.conftest import ROOT
from tests.runs import PATIENCE


def run(tiny, workdir, name, *more):
    process = tiny.start(workdir, *more, config=ROOT / 'configs' / name)
    process.communicate(timeout=5 * PATIENCE)
    assert process.returncode == 0
    return list(read_records(workdir / 'metrics.jsonl'))


def test_smoke_asks_and_trains_to_the_end(tiny, tmp_path):
    records = run(tiny, tmp_path / 'run', 'rl_calculator.py:smoke')
    rewards = [record['rollout/reward'] for record in records if 'rollout/reward' in record]
    assert rewards and all(0 <= reward <= 1 for reward in rewards)
    assert (tmp_path / 'run' / 'report.html').exists()


@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_with_the_calculator_it_is_right_and_without_it_not(tiny, tmp_path, seed):
    """On 256 products that neither has seen, the intervals are far apart."""
    scores = {}
    for form in ('', ':alone'):
        workdir = tmp_path / f'run{form[1:]}'
        records = run(tiny, workdir, f'rl_calculator.py{form}', f'--config.seed={seed}')
        [*_, scores[form]] = [r for r in records if 'eval/products/pass@1' in r]
    low = scores['']['eval/products/pass@1_low']
    assert low > scores[':alone']['eval/products/pass@1_high'] + 0.3
    _, samples = read_samples(tmp_path / 'run' / 'samples' / 'products-000150.jsonl')
    assert sum(len(sample['turns']) == 3 for sample in samples) > 200

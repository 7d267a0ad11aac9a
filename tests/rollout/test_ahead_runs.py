"""Real runs that sample ahead: stopped and resumed, on two devices, and every sample again."""

import re
import signal
import time

import jax
import numpy as np
import pytest

from jaxfm import sharding
from jaxfm.config.load import read_config
from jaxfm.config.run import RunConfig
from jaxfm.evals.samples import read_samples
from jaxfm.rollout.replay import replay
from jaxfm.run.run import model_maker
from jaxfm.sampling.engine import Sampler
from jaxfm.state import split
from tests.rollout.test_runs import FIRST, LAST, PHASES, steps_of
from tests.runs import finish, stderr_of, wait_for_step

AHEAD = (
    PHASES
    + """
    rollout.update(max_staleness=2, write_every=1)
    config.evals = dict(heldout=dict(name='loss', phase='text', every=3, batch_size=8))
    config.checkpoint = dict(every=1, keep=20)
    config.sampling.update(decode_steps=1)
"""
)


@pytest.fixture(scope='module')
def ahead(tiny, tmp_path_factory):
    """A run that a signal has stopped, and that has gone on; the seconds from signal to end."""
    workdir = tmp_path_factory.mktemp('ahead') / 'run'
    options = dict(config=tiny.derive('ahead', AHEAD), devices=2)
    process = tiny.start(workdir, **options)
    wait_for_step(workdir, 6, process)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    finish(process, 75)
    seconds = time.monotonic() - began
    finish(tiny.start(workdir, **options))
    return workdir, seconds


def samples_of(workdir) -> dict[int, list[dict]]:
    """{step: its samples}."""
    paths = (workdir / 'samples').glob('rl-*.jsonl')
    return {int(path.stem[-6:]): read_samples(path)[1] for path in paths}


def test_a_signal_ends_it_within_seconds_and_it_goes_on(ahead):
    workdir, seconds = ahead
    assert seconds < 15
    assert 'resumed at step' in stderr_of(workdir) and 'Traceback' not in stderr_of(workdir)


def test_the_log_tells_what_the_second_weights_take(ahead):
    assert re.search(r'second weights +\d.* a device', (ahead[0] / 'log.txt').read_text())


def test_the_cap_holds_for_every_token(ahead):
    samples = samples_of(ahead[0])
    lags = {step: [] for step in samples}
    for step, found in samples.items():
        for sample in found:
            for version, count in sample['versions']:
                lags[step] += [step - version] * count
    assert sorted(samples) == list(range(FIRST, LAST))
    assert all(0 <= lag <= 2 for each in lags.values() for lag in each)
    assert any(lag for each in lags.values() for lag in each)
    for record in steps_of(ahead[0]):
        mine = lags[record['step'] - 1]
        assert record['rollout/staleness'] == pytest.approx(np.mean(mine))
        assert record['rollout/staleness_max'] == max(mine)


def test_every_prompt_of_the_order_is_learned_from_once(ahead):
    numbers = [[s['number'] for s in found] for _, found in sorted(samples_of(ahead[0]).items())]
    assert [sorted({*each}) for each in numbers] == [
        list(range(4 * step, 4 * step + 4)) for step in range(10)
    ]


def test_the_ratio_compares_with_the_weights_that_sampled(ahead):
    """Tokens from the very weights have the ratio 1 to the bit; those from others have not."""
    for record in steps_of(ahead[0]):
        is_stale = record['rollout/staleness_max'] > 0
        assert (record['train/ratio_max'] != 1.0) == is_stale
        assert (record['train/sampler_kl'] != 0.0) == is_stale
        # Over tokens of the policy that the log-probs are of, the ratio is 1 on average.
        assert record['train/ratio'] == pytest.approx(1, abs=0.15)


def test_a_sample_is_made_again_from_its_seed_and_the_versions_of_its_tokens(ahead, tiny):
    workdir = ahead[0]
    config = read_config(workdir / 'config.json', RunConfig)
    parts = split(model_maker(config.model))
    samples = [sample for found in samples_of(workdir).values() for sample in found]
    mixed = [sample for sample in samples if len(sample['versions']) > 1]
    print(f'{len(mixed)} of {len(samples)} samples are from several versions')
    assert mixed
    chosen = [*mixed[:: max(1, len(mixed) // 4)][:4], *samples[::100]]
    mesh = sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1), jax.devices()[:1])

    def weights(version):
        saved = tiny.saved_state(workdir, version)
        return {
            path: saved[name]
            for name in saved
            for path in [name.partition('/')[2]]
            if path in parts.axes
        }

    with jax.set_mesh(mesh):
        sampler = Sampler(parts.merge, config.model, config.sampling, mesh)
        for sample in chosen:
            tokens, logprobs = replay(sampler, sample, weights)
            assert tokens == sample['tokens']
            assert logprobs == sample['logprobs']
        other = mixed[0] | {'versions': [[FIRST, len(mixed[0]['tokens'])]]}
        assert replay(sampler, other, weights)[1] != mixed[0]['logprobs']

"""Runs with several phases, in real processes: equal to chained runs, resumed after any kill."""

import json
import shutil
import signal

import numpy as np
import pytest

from jaxfm.metrics.writers import read_records
from tests.runs import finish, wait_until

# The second phase freezes a layer and has another learning rate, batch size and row length.
PHASES = """
    own = {key: config[key] for key in ('data', 'optimizer')}
    for key in ('data', 'optimizer', 'steps'):
        del config[key]
    later = dict(learning_rate=3e-3, frozen=['trunk/0/0/attention/*'])
    config.phases = [
        dict(name='first', steps=12, **own),
        dict(
            name='second',
            steps=10,
            data=dict(own['data'], batch_size=4, sequence_length=16),
            optimizer=dict(own['optimizer'], **later),
        ),
    ]
    config.evals = dict(heldout=dict(name='loss', phase='second', every=6, batch_size=8))
    config.checkpoint = dict(every=5)
    config.sampling.num_samples = 0
"""
CHAINED = [
    '--config.steps=10',
    '--config.seed=1',
    '--config.data.batch_size=4',
    '--config.data.sequence_length=16',
    '--config.optimizer.learning_rate=3e-3',
    "--config.optimizer.frozen=['trunk/0/0/attention/*']",
]


@pytest.fixture(scope='module')
def config(tiny):
    return tiny.derive('phases', PHASES)


@pytest.fixture(scope='module')
def whole(tiny, config):
    """An uninterrupted run of both phases."""
    finish(tiny.start(tiny.root / 'whole', config=config))
    return tiny.root / 'whole'


def records(workdir, kind='train'):
    found = [r for r in read_records(workdir / 'metrics.jsonl') if r['kind'] == kind]
    return [{k: v for k, v in r.items() if k != 'time'} for r in found]


def assert_bitwise_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert np.asarray(one[name]).tobytes() == np.asarray(other[name]).tobytes(), name


def test_a_phase_has_its_own_learning_rate_batch_and_name(whole):
    train = records(whole)
    names = {r['step']: r['phase'] for r in train}
    assert [names[step] for step in (2, 12, 14, 22)] == ['first', 'first', 'second', 'second']
    rates = {r['step']: r['train/learning_rate'] for r in train}
    assert rates[6] == pytest.approx(1e-2, rel=0.1)  # after the warm-up of 5 steps
    assert rates[14] == pytest.approx(3e-3 * 2 / 5)  # the second phase starts its own schedule
    tokens = {r['step']: r['perf/total_tokens'] for r in records(whole, 'perf')}
    assert tokens[12] == 12 * 8 * 32
    assert tokens[22] == 12 * 8 * 32 + 10 * 4 * 16


def test_the_end_of_a_phase_is_evaluated_and_its_checkpoint_is_kept(tiny, whole):
    assert tiny.committed(whole) == [12, 20, 22]
    assert {r['step'] for r in records(whole, 'eval')} == {0, 6, 12, 18, 22}


def test_a_phase_trains_all_but_its_frozen_parameters(tiny, whole):
    boundary, end = tiny.saved_state(whole, 12), tiny.saved_state(whole, 22)
    frozen = [name for name in end if name.startswith('frozen/')]
    assert frozen and all('trunk/0/0/attention' in name for name in frozen)
    for name in frozen:
        before = boundary[name.replace('frozen/', 'trainable/')]
        assert np.array_equal(end[name], before), name
    trained = [name for name in end if name.startswith('trainable/')]
    assert not any(np.array_equal(end[name], boundary[name]) for name in trained)


def test_two_phases_equal_two_runs_one_after_the_other(tiny, whole):
    earlier, later = tiny.root / 'earlier', tiny.root / 'later'
    options = ['--config.sampling.num_samples=0', '--config.evals={}']
    finish(tiny.start(earlier, '--config.steps=12', *options))
    finish(tiny.start(later, f'--config.init_from={earlier}', *CHAINED, *options))
    assert_bitwise_equal(tiny.saved_state(whole, 12), tiny.saved_state(earlier, 12))
    assert_bitwise_equal(tiny.saved_state(whole, 22), tiny.saved_state(later, 10))
    losses = [r['train/loss'] for r in records(later) if r['step'] % 2 == 0]
    assert losses == [r['train/loss'] for r in records(whole) if r['step'] > 12]


def test_a_run_resumes_wherever_it_was_killed(tiny, config, whole):
    workdir = tiny.root / 'killed'
    expected = records(whole), records(whole, 'eval')
    for last in (5, 15):  # inside the first and inside the second phase
        process = tiny.start(workdir, config=config)
        wait_until(lambda last=last: last in tiny.committed(workdir), process)
        process.kill()
        finish(process, -signal.SIGKILL)
    finish(tiny.start(workdir, config=config))
    assert (records(workdir), records(workdir, 'eval')) == expected
    assert_bitwise_equal(tiny.saved_state(workdir, 22), tiny.saved_state(whole, 22))


def test_a_run_killed_between_phases_begins_the_second_one(tiny, config, whole):
    workdir = tiny.root / 'between'
    shutil.copytree(whole, workdir)
    for step in (20, 22):
        shutil.rmtree(workdir / 'checkpoints' / str(step))
    finish(tiny.start(workdir, config=config))
    assert (records(workdir), records(workdir, 'eval')) == (records(whole), records(whole, 'eval'))
    assert_bitwise_equal(tiny.saved_state(workdir, 22), tiny.saved_state(whole, 22))


@pytest.mark.parametrize('number', [11, 25])  # the checkpoint is in the second phase, or no longer
def test_the_steps_of_an_ended_phase_cannot_change(tiny, config, whole, number):
    workdir = tiny.root / f'changed-{number}'
    shutil.copytree(whole, workdir)
    before = (workdir / 'config.json').read_bytes()
    flags = [f'--config.phases[0].steps={number}', '--config.phases[1].steps=30']
    finish(tiny.start(workdir, *flags, '--allow_change=phases', config=config), code=78)
    said = (tiny.root / f'changed-{number}.stderr').read_text()
    assert 'the steps of phases that have ended' in said
    assert (workdir / 'config.json').read_bytes() == before
    assert json.loads(before)['phases'][0]['steps'] == 12


def test_other_data_is_refused_or_if_allowed_read_from_its_first_row(tiny, config, whole):
    workdir = tiny.root / 'other'
    shutil.copytree(whole, workdir)
    for step in (20, 22):
        shutil.rmtree(workdir / 'checkpoints' / str(step))
    change = '--config.phases[0].data.heldout_fraction=0.3'
    finish(tiny.start(workdir, change, config=config), code=78)
    finish(tiny.start(workdir, change, '--allow_change=phases', config=config))
    errors = (tiny.root / 'other.stderr').read_text()
    assert '--allow_change=phases' in errors
    assert "the data differs from the checkpoint's, so it is read from its first row" in errors

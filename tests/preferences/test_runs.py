"""Learning from preferences in real runs: the reference, resuming, several devices."""

import math
import shutil

import pytest

from jaxfm.checkpoint.store import Store
from jaxfm.metrics.writers import read_records
from jaxfm.storage import open_storage
from tests.runs import assert_same_state, finish, measured, start_ranks, stderr_of

PHASES = """
    text, adamw = config.data, config.optimizer
    for key in ('data', 'optimizer', 'steps', 'evals'):
        del config[key]
    config.model.update(num_layers=1)
    pairs = dict(
        name='problems',
        form='pairs',
        kinds=['reverse'],
        num_problems=80,
        num_heldout=24,
        sequence_length=192,
        batch_size=8,
    )
    adamw = dict(
        name='adamw', learning_rate=1e-2, schedule='constant', warmup_steps=0, accumulate=2
    )
    config.phases = [
        dict(name='kto', steps=3, data=pairs, objective=dict(name='kto'), optimizer=adamw),
        dict(name='dpo', steps=6, data=pairs, objective=dict(name='dpo'), optimizer=adamw),
    ]
    config.evals = dict(pairs=dict(name='preference', phase='dpo', batch_size=8))
    config.checkpoint = dict(every=2, keep=9)
    config.sampling = dict(max_tokens=8, num_samples=0)
    config.metrics.log_every = 1
"""
# One phase, of dpo.
TUNED = (
    PHASES
    + """
    del config.phases, config.evals
    config.update(steps=4, data=pairs, objective=dict(name='dpo'), optimizer=adamw)
"""
)
ADAPTED = TUNED + '    config.model.lora = dict(rank=2, alpha=4.0)'
FIRST, LAST = 3, 9  # steps of the second phase


@pytest.fixture(scope='module')
def config(tiny):
    return tiny.derive('preferences', PHASES)


@pytest.fixture(scope='module')
def train(tiny, config):
    def run(workdir, *more):
        process = tiny.start(workdir, *more, config=config, devices=2)
        finish(process)

    return run


@pytest.fixture(scope='module')
def whole(train, tmp_path_factory):
    directory = tmp_path_factory.mktemp('preferences') / 'run'
    train(directory)
    return directory


def steps_of(workdir):
    """{step: what was logged of its training}."""
    return {step: values for (step, kind), values in measured(workdir).items() if kind == 'train'}


def test_a_phase_begins_where_its_reference_is(whole):
    """And not the phase before: there, the policy has moved on."""
    values = steps_of(whole)
    assert values[1]['train/kl'] == 0.0
    for step in (1, FIRST + 1):
        assert values[step]['train/reward_chosen'] == pytest.approx(0, abs=1e-5)
        assert values[step]['train/reward_rejected'] == pytest.approx(0, abs=1e-5)
        assert abs(values[step + 1]['train/reward_chosen']) > 1e-3
    assert values[1]['train/loss'] == pytest.approx(0.5, abs=1e-5)
    assert values[FIRST + 1]['train/loss'] == pytest.approx(math.log(2), abs=1e-5)
    assert all(value['train/kl'] >= 0 for step, value in values.items() if step <= FIRST)


def test_pairs_are_learned(whole):
    losses = [values['train/loss'] for step, values in steps_of(whole).items() if step > FIRST]
    assert losses[-1] < losses[0] - 0.01


def test_the_model_is_asked_which_chat_it_prefers(whole):
    found = {
        record['step']: record
        for record in read_records(whole / 'metrics.jsonl')
        if 'eval/pairs/accuracy' in record
    }
    assert set(found) == {0, FIRST, LAST}
    for record in found.values():
        low, high = (record[f'eval/pairs/accuracy_{end}'] for end in ('low', 'high'))
        assert low <= record['eval/pairs/accuracy'] <= high
        assert record['eval/pairs/left_out'] == 0


@pytest.mark.parametrize('kept', ['there', 'gone', 'of another beginning'])
def test_a_run_goes_on_in_the_middle_with_the_same_bits(tiny, train, whole, tmp_path, kept):
    again = tmp_path / 'again'
    shutil.copytree(whole, again)
    file = again / 'reference' / 'dpo.npz'
    if kept == 'gone':
        file.unlink()
    elif kept == 'of another beginning':
        shutil.copy(again / 'reference' / 'kto.npz', file)
    train(again, '--resume_step=6')
    assert measured(again) == measured(whole)
    assert_same_state(tiny.saved_state(again, LAST), tiny.saved_state(whole, LAST))
    assert ('under the reference' in stderr_of(again)) == (kept != 'there')


def test_the_reference_stays_that_of_the_start(tiny, whole, tmp_path):
    """Although the run that it is from, which has adapters, has gone on, and its file is gone."""
    origin, tuned, again = (tmp_path / name for name in ('origin', 'tuned', 'again'))

    def run(workdir, name, change, init_from, *more):
        config = tiny.derive(name, change)
        more = f'--config.init_from={init_from}', *more
        finish(tiny.start(workdir, *more, config=config, devices=2))

    run(origin, 'adapted', ADAPTED, whole)
    store = Store(open_storage(origin / 'checkpoints'))
    store.set_aside(newest := store.commits()[4])
    run(tuned, 'tuned', TUNED, origin)
    store.take_back(newest.directory, newest.epoch)
    shutil.copytree(tuned, again)
    (again / 'reference' / 'reference.npz').unlink()
    run(again, 'tuned', TUNED, origin, '--resume_step=2')
    assert 'under the reference' in stderr_of(again)
    assert measured(again) == measured(tuned)
    store.set_aside(store.commits()[2])
    shutil.rmtree(again / 'reference')
    config = tiny.derive('tuned', TUNED)
    options = dict(config=config, devices=2)
    finish(tiny.start(again, f'--config.init_from={origin}', '--resume_step=2', **options), 66)
    assert f'{origin} has no checkpoint 2, whose weights are the reference' in stderr_of(again)


def test_the_run_can_be_evaluated(tiny, config, whole):
    output = f'--output={whole.parent / "scores.jsonl"}'
    finish(tiny.start(whole, '--mode=eval', output, config=config, devices=2))


def test_two_processes_learn_as_one(tiny, config, whole, tmp_path):
    def start(workdir, **environment):
        return tiny.start(workdir, config=config, **environment)

    for process in start_ranks(start, tmp_path / 'two'):
        finish(process)
    ours, theirs = steps_of(tmp_path / 'two'), steps_of(whole)
    for step in theirs:
        for name in ('loss', 'reward_chosen'):
            key = f'train/{name}'
            assert ours[step][key] == pytest.approx(theirs[step][key], abs=2e-5), step

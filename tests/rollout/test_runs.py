"""Reinforcement learning in real runs: on-policy, resumed, with a reference, on several devices."""

import re
import shutil
import signal

import pytest

from jaxfm.checkpoint.store import Store
from jaxfm.evals.samples import read_samples
from jaxfm.metrics.writers import read_records
from jaxfm.storage import open_storage
from tests.rollout import faults
from tests.runs import assert_same_state, finish, measured, start_ranks, stderr_of

PHASES = """
    text, adamw = config.data, config.optimizer
    for key in ('data', 'optimizer', 'steps', 'evals'):
        del config[key]
    config.model.update(batch_invariant=True, num_layers=1)
    rollout = dict(
        name='rollout',
        task=dict(name='tests.rollout.tasks:Ascii'),
        prompts=4,
        samples=8,
        sequence_length=32,
        batch_size=16,
        max_tokens=12,
        write_every=4,
    )
    config.phases = [
        dict(name='text', steps=2, data=text, optimizer=dict(adamw, warmup_steps=0)),
        dict(
            name='rl',
            steps=10,
            data=rollout,
            objective=dict(name='grpo', kl=0.01),
            optimizer=dict(
                name='adamw',
                learning_rate=3e-2,
                schedule='constant',
                warmup_steps=0,
                accumulate=2,
            ),
        ),
    ]
    config.checkpoint = dict(every=4, keep=9)
    config.sampling = dict(slots=32, max_length=64, decode_steps=4, max_tokens=8, num_samples=0)
    config.metrics.log_every = 1
"""
# One that tests/rollout/faults.py can kill.
MORTAL = """
    from tests.rollout import faults

    faults.install()
"""
# With all that a step may do, and that its state may hold.
FULL = (
    PHASES
    + """
    config.phases[1]['objective'].update(old_logprobs='recomputed', importance='truncate')
    rollout.update(curriculum=dict(low=0.4, high=0.6), filter='zero_variance')
"""
)
TUNED = (
    PHASES
    + """
    second = config.phases[1]
    del config.phases
    config.update(steps=4, data=rollout, objective=second['objective'])
    config.optimizer = second['optimizer']
    config.checkpoint.every = 2
    config.model.lora = dict(rank=2, alpha=4.0)
"""
)
FIRST, LAST = 2, 12  # steps of the phase


@pytest.fixture(scope='module')
def config(tiny):
    return tiny.derive('rollout', PHASES + MORTAL)


@pytest.fixture(scope='module')
def train(tiny, config):
    def run(workdir, *more):
        finish(tiny.start(workdir, *more, config=config, devices=2))

    return run


@pytest.fixture(scope='module')
def whole(train, tmp_path_factory):
    directory = tmp_path_factory.mktemp('rollout') / 'run'
    train(directory)
    return directory


def steps_of(workdir):
    """The records of the phase, those of a step joined."""
    found = {}
    for record in read_records(workdir / 'metrics.jsonl'):
        if record['kind'] in ('train', 'perf') and record['step'] > FIRST:
            found.setdefault(record['step'], {}).update(record)
    return [found[step] for step in range(FIRST + 1, LAST + 1)]


def test_on_policy_no_ratio_differs_from_one_by_a_bit(whole):
    for record in steps_of(whole):
        assert record['train/ratio_max'] == record['train/ratio'] == 1.0
        assert record['train/ratio_error_p999'] == record['train/sampler_kl'] == 0.0
        assert record['train/clip_fraction'] == 0.0


def test_the_reward_rises(whole):
    rewards = [record['rollout/reward'] for record in steps_of(whole)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2


def test_the_reference_is_what_the_phase_began_with(whole):
    divergence = [record['train/reference_kl'] for record in steps_of(whole)]
    assert divergence[0] == 0.0
    assert all(value > 0 for value in divergence[1:])


def test_a_run_goes_on_in_the_middle_of_the_phase_with_the_same_bits(tiny, train, whole, tmp_path):
    again = tmp_path / 'again'
    shutil.copytree(whole, again)
    train(again, '--resume_step=8')
    assert measured(again) == measured(whole)
    assert_same_state(tiny.saved_state(again, LAST), tiny.saved_state(whole, LAST))


def kill_and_go_on(tiny, config, workdir) -> dict[str, int]:
    """Kills a run in each part of a step, and lets it end -> {part: the step it resumed at}."""
    options, resumed = dict(config=config, devices=2), {}
    for kill in ('generate@5', 'logprobs@7', 'train@10'):
        finish(tiny.start(workdir, **options, **{faults.VARIABLE: kill}), -signal.SIGKILL)
        place, _, step = kill.partition('@')
        resumed[place] = max(tiny.committed(workdir))
        assert resumed[place] < int(step)
    finish(tiny.start(workdir, **options))
    steps = [int(step) for step in re.findall(r'resumed at step (\d+)', stderr_of(workdir))]
    assert steps == [*resumed.values()]
    return resumed


@pytest.fixture(scope='module')
def killed(tiny, config, whole):
    workdir = whole.parent / 'killed'
    return workdir, kill_and_go_on(tiny, config, workdir)


@pytest.mark.parametrize('place', ['generate', 'logprobs', 'train'])
def test_a_run_killed_in_any_part_of_a_step_goes_on_with_the_same_bits(tiny, whole, killed, place):
    workdir, resumed = killed
    first = resumed[place]
    last = min((step for step in resumed.values() if step > first), default=LAST)

    def between(run):
        return {key: values for key, values in measured(run).items() if first < key[0] <= last}

    assert between(workdir) == between(whole) != {}
    assert_same_state(tiny.saved_state(workdir, last), tiny.saved_state(whole, last))


@pytest.mark.slow
def test_a_run_with_every_part_goes_on_with_the_same_bits_after_kills(tiny, tmp_path):
    config = tiny.derive('full', FULL + MORTAL)
    finish(tiny.start(tmp_path / 'whole', config=config, devices=2))
    kill_and_go_on(tiny, config, tmp_path / 'killed')
    assert measured(tmp_path / 'killed') == measured(tmp_path / 'whole')
    saved = [tiny.saved_state(tmp_path / name, LAST) for name in ('killed', 'whole')]
    assert_same_state(*saved)
    for record in steps_of(tmp_path / 'whole'):
        assert record['rollout/medium_prompts'] < 1 and 'train/reference_kl' in record


def test_the_reference_stays_that_of_the_start(tiny, train, whole, tmp_path):
    """Although the run that it is from has gone on meanwhile."""
    origin, tuned, again = (tmp_path / name for name in ('origin', 'tuned', 'again'))
    shutil.copytree(whole, origin)
    store = Store(open_storage(origin / 'checkpoints'))
    store.set_aside(newest := store.commits()[LAST])
    options = dict(config=tiny.derive('tuned', TUNED), devices=2)
    finish(tiny.start(tuned, f'--config.init_from={origin}', **options))
    store.take_back(newest.directory, newest.epoch)
    shutil.copytree(tuned, again)
    finish(tiny.start(again, f'--config.init_from={origin}', '--resume_step=2', **options))
    assert measured(again) == measured(tuned)
    divergence = [values['train/reference_kl'] for values in measured(tuned).values()]
    assert divergence[0] == 0.0 < divergence[1]


def test_the_run_can_be_evaluated(tiny, config, whole):
    text = "--config.evals.text={'name':'loss','phase':'text','batch_size':8}"
    output = f'--output={whole.parent / "scores.jsonl"}'
    finish(tiny.start(whole, '--mode=eval', text, output, config=config, devices=2))


def test_samples_are_kept_with_their_rewards(whole):
    paths = sorted((whole / 'samples').glob('rl-*.jsonl'))
    assert [path.stem for path in paths] == ['rl-000004', 'rl-000008']
    header, samples = read_samples(paths[0])
    assert header['weights']['step'] == 4
    assert len(samples) == 4 * 8
    for sample in samples:
        assert sample['versions'] == [[4, len(sample['tokens'])]]
        assert sample['num_tokens'] == len(sample['tokens']) == len(sample['logprobs']) <= 12
    means = {}
    for sample in samples:
        means.setdefault(sample['id'], []).append(sample['reward'])
        assert (sample['advantage'] > 0) == (
            sample['reward'] > sum(s['reward'] for s in samples if s['id'] == sample['id']) / 8
        )
    reward = next(r for r in steps_of(whole) if r['step'] == 5)['rollout/reward']
    assert sum(sum(each) / 8 for each in means.values()) / 4 == pytest.approx(reward)


def test_time_and_tokens_are_those_of_samples(whole):
    first, *_, record = steps_of(whole)
    names = ('goodput/generate_seconds', 'goodput/data_wait_seconds')
    generate, wait = (record[name] - first[name] for name in names)
    assert generate > 0 == wait
    parts = [f'rollout/{part}_seconds' for part in ('generate', 'judge', 'logprobs', 'idle')]
    told = sum(each[part] for each in steps_of(whole)[1:] for part in parts)
    assert 0.8 * generate < told < generate
    assert record['perf/total_tokens'] < 2 * 8 * 32 + 10 * 16 * 32  # rows are not full
    assert record['rollout/prompts'] == 10 * 4
    assert record['rollout/epochs'] == 2


def test_two_processes_sample_and_train_as_one(tiny, config, whole, tmp_path):
    def start(workdir, **environment):
        return tiny.start(workdir, config=config, **environment)

    for process in start_ranks(start, tmp_path / 'two'):
        finish(process)
    for ours, theirs in zip(steps_of(tmp_path / 'two'), steps_of(whole)):
        for name in ('rollout/reward', 'rollout/length', 'train/ratio_max'):
            assert ours[name] == theirs[name]
        assert ours['train/loss'] == pytest.approx(theirs['train/loss'], abs=2e-6)
        assert ours['train/grad_norm'] == pytest.approx(theirs['train/grad_norm'], rel=2e-5)

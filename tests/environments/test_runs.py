"""Environments in real runs: on-policy to the bit, resumed, evaluated, in two processes."""

import json
import shutil

import jax
import pytest

from jaxfm import sharding
from jaxfm.config.load import read_config
from jaxfm.config.run import RunConfig
from jaxfm.evals.samples import read_samples
from jaxfm.metrics.writers import read_records
from jaxfm.rollout.replay import replay
from jaxfm.run.run import model_maker
from jaxfm.sampling.engine import Sampler
from jaxfm.state import split
from tests.runs import assert_same_state, finish, measured, start_ranks

RUN = """
    config.model.update(batch_invariant=True, num_layers=1)
    counting = dict(name='tests.environments.counting:Counting')
    task = dict(name='tests.rollout.tasks:Ascii')
    config.steps = 4
    config.data = dict(
        name='rollout',
        task=task,
        environment=counting,
        prompts=4,
        samples=8,
        sequence_length=63,
        batch_size=32,
        max_tokens=12,
        write_every=2,
    )
    config.objective = dict(name='grpo')
    config.optimizer = dict(
        name='adamw', learning_rate=3e-2, schedule='constant', warmup_steps=0, accumulate=2
    )
    config.evals = dict(
        counted=dict(
            name='generate', task=task, environment=counting, max_tokens=12, temperature=1.0,
            at_start=False,
        ),
    )
    config.checkpoint = dict(every=2, keep=9)
    config.sampling = dict(slots=32, max_length=64, decode_steps=4, max_tokens=8, num_samples=0)
    config.metrics.log_every = 1
"""
LAST = 4


@pytest.fixture(scope='module')
def config(tiny):
    return tiny.derive('environment', RUN)


@pytest.fixture(scope='module')
def whole(tiny, config, tmp_path_factory):
    directory = tmp_path_factory.mktemp('environment') / 'run'
    finish(tiny.start(directory, config=config, devices=2))
    return directory


def values_of(workdir, name):
    records = read_records(workdir / 'metrics.jsonl')
    return [record[name] for record in records if name in record]


def test_on_policy_no_ratio_differs_from_one_by_a_bit(whole):
    """So the log-probs of all turns are in their places, with the tokens they belong to."""
    assert values_of(whole, 'train/ratio_max') == [1.0] * LAST
    assert values_of(whole, 'train/sampler_kl') == [0.0] * LAST
    assert min(values_of(whole, 'rollout/turns')) > 1.5
    assert max(values_of(whole, 'rollout/failed')) == 0


def test_samples_are_recorded_by_turns(whole):
    path = whole / 'samples' / 'rollout-000002.jsonl'
    _, samples = read_samples(path)
    assert len(samples) == 32 and max(len(sample['turns']) for sample in samples) == 5
    for sample in samples:
        own = [turn['tokens'] for turn in sample['turns'] if turn['by'] == 'model']
        assert sum(own, []) == sample['tokens']
        assert len(sample['logprobs']) == len(sample['tokens'])
        counts, turns = 0, sample['turns']
        for turn, observed in zip(turns[::2], turns[1::2]):
            counts += len(turn['tokens'])
            assert observed['text'] == f' {counts}é'
            assert observed['tokens'] == [2 + byte for byte in observed['text'].encode()]


def test_a_run_goes_on_with_the_same_bits(tiny, config, whole, tmp_path):
    again = tmp_path / 'again'
    shutil.copytree(whole, again)
    finish(tiny.start(again, '--resume_step=2', config=config, devices=2))
    assert measured(again) == measured(whole)
    assert_same_state(tiny.saved_state(again, LAST), tiny.saved_state(whole, LAST))


def test_episodes_are_made_again_from_what_is_recorded(tiny, whole):
    config = read_config(whole / 'config.json', RunConfig)
    parts = split(model_maker(config.model))
    _, samples = read_samples(whole / 'samples' / 'rollout-000002.jsonl')
    saved = {n.partition('/')[2]: each for n, each in tiny.saved_state(whole, 2).items()}
    params = {path: saved[path] for path in parts.axes}
    mesh = sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        sampler = Sampler(parts.merge, config.model, config.sampling, mesh)
        for sample in samples[::5]:
            found = replay(sampler, sample, {2: params}.get)
            assert found == (sample['tokens'], sample['logprobs'])


def test_the_eval_mode_scores_the_same_episodes(tiny, config, whole, tmp_path):
    output = tmp_path / 'scores.jsonl'
    finish(tiny.start(whole, '--mode=eval', f'--output={output}', config=config, devices=2))
    lines = [json.loads(line) for line in output.read_text(encoding='utf-8').splitlines()]
    [score] = [each for line in lines for key, each in line.items() if key.endswith('pass@1')]
    assert [score] == values_of(whole, 'eval/counted/pass@1')


@pytest.mark.slow
def test_two_processes_play_as_one(tiny, config, whole, tmp_path):
    def start(workdir, **environment):
        return tiny.start(workdir, '--config.steps=2', config=config, **environment)

    for process in start_ranks(start, tmp_path / 'two'):
        finish(process)
    for name in ('rollout/reward', 'rollout/turns', 'train/ratio_max'):
        assert values_of(tmp_path / 'two', name) == values_of(whole, name)[:2]
    assert values_of(tmp_path / 'two', 'train/loss') == pytest.approx(
        values_of(whole, 'train/loss')[:2], abs=2e-6
    )

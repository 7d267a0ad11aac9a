"""Rollouts with an environment: what is learned, what a fault costs, and what is recorded."""

import json
import types

import jax
import numpy as np
import pytest

from jaxfm import sharding
from jaxfm.config.validation import validate
from jaxfm.errors import DataError
from jaxfm.evals.samples import read_samples
from jaxfm.objectives import OBJECTIVES
from jaxfm.rollout import RolloutConfig
from jaxfm.rollout.source import Rollouts
from jaxfm.tasks.base import Prompt, Task
from tests.environments.scripted import Tokenizer, Writer
from tests.environments.test_episode import DOUBLING, MOODY, next_of


class Length(Task):
    """The reward is the number of letters after the last observation; '?' is a fault."""

    texts = ('p:', 'q:')

    def __init__(self, config, documents):
        pass

    def prompts(self):
        return [Prompt(text, text) for text in self.texts]

    def evaluate(self, prompt, completion):
        return float('nan') if completion == '?' else len(completion)


@pytest.fixture
def make(monkeypatch, tmp_path):
    monkeypatch.setattr('jaxfm.evals.prompts.TASKS', types.SimpleNamespace(load=lambda n: Length))

    def rollouts(script, name=DOUBLING, max_turns=4, **changes):
        values = dict(
            task=dict(name='arithmetic'),
            environment=dict(name=name, max_turns=max_turns),
            prompts=1,
            samples=2,
            sequence_length=24,
            batch_size=2,
            packing='none',
            max_tokens=6,
            write_every=1,
            call_seconds=0.2,
        )
        sizes = dict.fromkeys(sharding.MESH_AXES, 1)
        context = types.SimpleNamespace(
            sampler=Writer(next_of(script)),
            tokenizer=Tokenizer(),
            chat=lambda: types.SimpleNamespace(stop_ids=frozenset([0])),
            samples_directory=tmp_path,
            weights=lambda step: {'step': step},
            mesh=sharding.make_mesh(sizes, jax.devices()[:1]),
        )
        config, objective = RolloutConfig(**values | changes), OBJECTIVES['rloo'].schema()
        return Rollouts(config, objective, context, seed=3, put=dict)

    return rollouts


SCRIPT = {':': ['[3]', 'xyz$'], '=6;': 'v$'}


def test_a_batch_is_masked_exactly_on_what_the_model_wrote(make):
    batch = make(SCRIPT).next(None, 0)
    row = int(np.argmax(batch['tokens'][:, 2] == ord('[')))
    one = {name: array[row][:10].tolist() for name, array in batch.items()}
    ids = [one['tokens'][0], *map(ord, ':[3]=6;'), 221, 0]
    assert one['tokens'] == [*ids[:-1], 0]
    assert one['targets'] == [*ids[1:], 0]
    assert one['positions'] == [*range(9), 0]
    assert one['segment_ids'] == [1] * 9 + [0]
    assert one['loss_mask'] == [0, 1, 1, 1, 0, 0, 0, 1, 1, 0]
    assert one['lengths'] == [0, 5, 5, 5, 0, 0, 0, 5, 5, 0]
    # Leave-one-out, from rewards of 1 and 3.
    assert one['advantages'] == [0, -2, -2, -2, 0, 0, 0, -2, -2, 0]
    places = [0, 3, 4, 5, 0, 0, 0, 9, 10, 0]  # as the engine tells them
    np.testing.assert_allclose(one['sampler_logprobs'], -0.01 * np.array(places), atol=1e-6)


def test_samples_are_recorded_by_turns(make, tmp_path):
    make(SCRIPT).next(None, 0)
    _, samples = read_samples(tmp_path / 'rollout-000000.jsonl')
    one = samples[0]
    assert one['completion'] == '[3]=6;v' and one['num_tokens'] == len(one['logprobs']) == 5
    assert one['turns'] == [
        {'by': 'model', 'text': '[3]', 'tokens': [91, 51, 93]},
        {'by': 'environment', 'text': '=6;', 'tokens': [61, 54, 59]},
        {'by': 'model', 'text': 'v', 'tokens': [221, 0]},
    ]
    assert (one['reward'], one['advantage'], one['observed_tokens']) == (1, -2, 3)
    assert [len(sample['turns']) for sample in samples] == [3, 1]


def test_a_fault_costs_its_sample_is_counted_and_told_once(make, caplog, tmp_path):
    writes = ['s[3]', 'h[3]', 'r[3]', 'n[3]', 'x[3]', 'klm$']
    source = make({':': writes, ';': 'v$'}, MOODY, samples=6, batch_size=6)
    for step in range(2):
        batch = source.next(None, step)
        assert (batch['loss_mask'].max(axis=1) > 0).sum() == 2
    told = [record.message for record in caplog.records]
    assert told == [
        'step 0: 4 of 6 samples have no reward and are left out; the first: '
        f'{MOODY}: TimeoutError: took longer than 0.2 s'
    ]
    values = source.progress()
    assert values['rollout/failed'] == pytest.approx(4 / 6)
    # Two steps have waited for what hangs, and the engine took no time.
    assert values['rollout/environment_seconds'] > 0.4 > values['rollout/generate_seconds']
    assert values['rollout/turns'] == pytest.approx((2 + 1 + 1 + 1 + 1 + 1) / 6)
    _, samples = read_samples(tmp_path / 'rollout-000001.jsonl')
    assert [sample['finish_reason'] for sample in samples] == [
        'stop',
        *['environment'] * 4,
        'stop',
    ]
    assert [sample['reward'] is None for sample in samples] == [False] + [True] * 4 + [False]


def test_a_step_whose_episodes_all_fail_ends_the_run(make):
    source = make({':': 'r[3]'}, MOODY)
    with pytest.raises(DataError, match='no sample of step 4 could be judged; the first: .*Zero'):
        source.next(None, 4)


def test_the_reward_of_the_environment_is_added(make, tmp_path):
    make({':': ['w$', 'v$']}, MOODY).next(None, 0)
    _, samples = read_samples(tmp_path / 'rollout-000000.jsonl')
    assert [sample['reward'] for sample in samples] == [3.0, 1.0]


@pytest.mark.parametrize('truncated, learned', [('train', 2), ('mask', 0)])
def test_episodes_without_an_end_count_as_truncated(make, truncated, learned):
    script = {':': ['[3]', 'abcdefgh$'], ';': '[1]'}
    source = make(script, max_turns=2, truncated=truncated)
    batch = source.next(None, 0)
    assert (batch['loss_mask'].max(axis=1) > 0).sum() == learned
    assert source.progress()['rollout/truncated'] == 1


def test_an_episode_never_overflows_its_row(make):
    source = make({':': '[3]', ';': '[1]'}, max_turns=99, sequence_length=11)
    batch = source.next(None, 0)
    assert (batch['segment_ids'] > 0).sum(axis=1).tolist() == [10, 10]
    assert batch['loss_mask'].sum(axis=1).tolist() == [6, 6]


def test_a_state_goes_on_with_the_same_batches(make):
    script = {'p:': ['[3]', 'x$'], 'q:': ['[4]', 'yy$'], ';': 'v$'}
    source = make(script)
    source.next(None, 0)
    state = json.loads(json.dumps(source.get_state()))
    expected = source.next(None, 1)
    again = make(script)
    again.set_state(state)
    for name, array in again.next(None, 1).items():
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize(
    'changes, told',
    [
        (dict(max_staleness=1), 'max_staleness is 1, but turns of an environment are limited in'),
        (
            dict(overlong_penalty=0.5, overlong_tokens=4),
            'overlong_penalty is for samples of one turn: set environment to None',
        ),
    ],
)
def test_what_does_not_go_with_an_environment_is_refused(changes, told):
    values = dict(
        name='rollout',
        task=dict(name='arithmetic'),
        environment=dict(name='calculator'),
        prompts=1,
        samples=2,
        sequence_length=24,
        batch_size=2,
        max_tokens=6,
    )
    assert validate(RolloutConfig, values)[1] == []
    _, [problem] = validate(RolloutConfig, values | changes)
    assert told in str(problem)

"""The source of rollouts with a scripted engine and task: what it samples, judges and hands on."""

import json
import math

import numpy as np
import pytest

from jaxfm.data.packing.rows import BATCH_DTYPES
from jaxfm.errors import ConfigError, DataError, NumericsError
from tests.rollout.scripted import SCRIPTS, Engine


def learned(batch):
    """{first letter of a completion, as often as it is there: advantages} of what is learned."""
    found = []
    for row in range(len(batch['tokens'])):
        for segment in range(1, batch['segment_ids'][row].max() + 1):
            mask = (batch['segment_ids'][row] == segment) & (batch['loss_mask'][row] > 0)
            if mask.any():
                letters = ''.join(map(chr, batch['targets'][row][mask]))
                found.append((letters, batch['advantages'][row][mask].tolist()))
    return sorted(found)


def test_a_batch_has_the_samples_with_their_advantages(make):
    source = make(prompts=6, batch_size=24)
    batch = source.next(None, 7)
    found = learned(batch)
    assert len(found) == 24
    assert [letters for letters, _ in found] == ['0xy\0'] * 12 + ['1xy\0'] * 12
    # Leave-one-out, from rewards of 0110, 0000, 1101, 1111, 1000 and 0101.
    rewards = np.array([list(map(float, script)) for script in SCRIPTS.values()])
    expected = (4 * rewards - rewards.sum(1, keepdims=True)) / 3
    advantages = sorted(values[0] for _, values in found)
    np.testing.assert_allclose(advantages, sorted(expected.ravel()), atol=1e-6)
    assert all(len(set(values)) == 1 for _, values in found)
    assert source.engine.versions == [7]
    assert source.tokens == sum(len(text) + 3 for text in SCRIPTS) * 4


def test_every_prompt_comes_once_an_epoch_with_noise_of_its_own(make):
    source = make(prompts=2)
    for step in range(6):
        source.next(None, step)
    asked = [''.join(map(chr, request.tokens)) for request in source.engine.asked]
    assert sorted(asked[:6]) == sorted(asked[6:]) == sorted(SCRIPTS)
    assert asked[:6] != asked[6:]
    assert len({request.seed for request in source.engine.asked}) == 12
    other = make(prompts=6, batch_size=24, seed=4)
    other.next(None, 0)
    assert [''.join(map(chr, request.tokens)) for request in other.engine.asked] != asked[:6]


def test_prompts_whose_samples_are_alike_are_replaced(make):
    source = make(prompts=4, batch_size=16, filter='zero_variance')
    batch = source.next(None, 0)
    assert {values[0] for _, values in learned(batch)} and 0 not in {
        values[0] for _, values in learned(batch)
    }
    assert len(learned(batch)) == 16
    asked = [''.join(map(chr, request.tokens)) for request in source.engine.asked]
    assert {'bb', 'd'} & set(asked)
    assert source.get_state()['next_prompt'] == len(asked)
    values = source.progress()
    assert values['rollout/filtered'] == pytest.approx(1 - 4 / len(asked))
    assert values['rollout/groups'] == 4
    rewards = [sum(map(int, SCRIPTS[text])) / 4 for text in asked]  # of all, not of those left
    assert values['rollout/reward'] == pytest.approx(sum(rewards) / len(asked))


def test_if_nothing_varies_the_step_has_no_gradient(make):
    scripts = dict.fromkeys(SCRIPTS, '1111')
    source = make(Engine(scripts), filter='zero_variance', max_refills=2)
    batch = source.next(None, 0)
    assert not batch['advantages'].any() and batch['loss_mask'].any()
    assert len(source.engine.asked) == 9
    assert source.progress()['rollout/flat_groups'] == 1


def test_a_sample_that_cannot_be_judged_is_left_out_counted_and_told(make, caplog):
    scripts = dict.fromkeys(SCRIPTS, '01x1') | {'a': '01n1', 'bb': '0!11', 'd': '01h1', 'e': '01g1'}
    source = make(Engine(scripts), prompts=6, batch_size=24, write_every=1, call_seconds=0.2)
    batch = source.next(None, 3)
    told = [record.message for record in caplog.records]
    assert len(told) == 1
    assert told[0].startswith(
        'step 3: 6 of 24 samples have no reward and are left out; the first: '
    )
    assert sorted({letters[0] for letters, _ in learned(batch)}) == ['0', '1']
    assert len(learned(batch)) == 18
    # Leave-one-out of the three that are left.
    assert {round(values[0], 5) for _, values in learned(batch)} == {-1.0, 0.5}
    assert source.progress()['rollout/failed'] == 0.25
    (path,) = source._context.samples_directory.glob('*.jsonl')
    errors = {json.loads(line)['error'] for line in path.read_text().splitlines()[1:]}
    assert len(large := [error for error in errors if '1000' in error]) == 1 > len(large[0]) / 100
    assert errors - {*large} == {
        '',
        'NaN logits',
        'TimeoutError: took longer than 0.2 s',
        'the reward is nan, but must be a number from -1e6 to 1e6',
        "ValueError: invalid literal for int() with base 10: 'x'",
    }


def test_distillation_learns_from_samples_without_a_reward(make, caplog):
    scripts = dict.fromkeys(SCRIPTS, '01!n')
    source = make(Engine(scripts), objective='gkd')
    batch = source.next(None, 3)
    assert batch.keys() == BATCH_DTYPES.keys()
    learned = batch['targets'][batch['loss_mask'] > 0]
    # Three samples of each of three prompts: one could not be made.
    assert sorted(map(chr, learned)).count('n') == sorted(map(chr, learned)).count('0') == 3
    assert batch['loss_mask'].sum() == 3 * 3 * 4
    assert 'have no reward; the first: ' in caplog.records[0].message
    values = source.progress()
    assert values['rollout/failed'] == 0.5 == values['rollout/reward']


def test_distillation_goes_on_without_any_reward(make):
    source = make(Engine(dict.fromkeys(SCRIPTS, 'nnnn')), objective='gkd')
    assert source.next(None, 0)['loss_mask'].any()
    values = source.progress()
    assert values['rollout/failed'] == 1 and 'rollout/reward' not in values
    with pytest.raises(NumericsError, match='no sample of step 1 could be made'):
        make(Engine(dict.fromkeys(SCRIPTS, '!!!!')), objective='gkd').next(None, 1)


@pytest.mark.parametrize(
    'letter, error, message',
    [('!', NumericsError, 'no sample of step 5 could be made: NaN logits'), ('n', DataError, 'no')],
)
def test_a_step_without_any_reward_ends_the_run(make, letter, error, message):
    source = make(Engine(dict.fromkeys(SCRIPTS, letter * 4)))
    with pytest.raises(error, match=message):
        source.next(None, 5)
    assert source.get_state()['next_prompt'] == 0


def test_long_completions_pay(make):
    """The penalty is no reward: records and the filter do not see it."""
    scripts = dict.fromkeys(SCRIPTS, '1100')
    options = dict(overlong_tokens=2, overlong_penalty=0.5, max_tokens=5)
    engine = Engine(scripts)
    engine.tails = ['xy\0', 'xyz\0', 'x\0', 'x\0']  # 4, 5, 3 and 3 tokens
    source = make(engine, prompts=1, batch_size=4, **options)
    advantages = {letters: values[0] for letters, values in learned(source.next(None, 0))}
    rewards = np.array([1 - 0.25, 1 - 0.5, 0, 0])
    expected = (4 * rewards - rewards.sum()) / 3
    assert advantages['1xy\0'] == pytest.approx(expected[0])
    assert advantages['1xyz\0'] == pytest.approx(expected[1])
    assert advantages['0x\0'] == pytest.approx(expected[2])
    assert source.progress()['rollout/reward'] == 0.5
    engine.scripts = dict.fromkeys(SCRIPTS, '1111')
    source = make(engine, prompts=1, batch_size=4, filter='zero_variance', max_refills=1, **options)
    source.next(None, 0)
    assert source.progress()['rollout/flat_groups'] == 1


def test_truncated_completions_can_be_left_out(make):
    engine = Engine(tail='xyz')
    assert len(learned(make(engine).next(None, 0))) == 12
    source = make(engine, truncated='mask')
    assert learned(source.next(None, 0)) == []
    assert source.progress()['rollout/truncated'] == 1


def test_the_state_is_the_number_of_the_next_prompt(make):
    source = make()
    source.next(None, 0)
    state = json.loads(json.dumps(source.get_state()))
    expected = source.next(None, 1)
    # Checkpoints of older versions have no list of prompts to ask again.
    for given in (state, {k: v for k, v in state.items() if k != 'asked_again'}):
        again = make()
        again.set_state(given)
        for name, array in again.next(None, 1).items():
            np.testing.assert_array_equal(array, expected[name])
    other = make(seed=4)
    with pytest.raises(ConfigError, match='the prompts changed since the checkpoint: seed is 4'):
        other.set_state(state)


def test_prompts_that_leave_no_room_are_an_error_or_left_out(make, caplog):
    with pytest.raises(DataError, match=r'1 of 6 prompts have more than 2 tokens, the longest 3'):
        make(sequence_length=5)
    source = make(sequence_length=5, too_long='drop', prompts=2)
    assert 'they are left out' in caplog.text
    for step in range(5):
        source.next(None, step)
    assert 'ccc' not in {''.join(map(chr, request.tokens)) for request in source.engine.asked}
    engine = Engine()
    engine.longest = 4
    with pytest.raises(DataError, match='6 of 6 prompts have more than 0 tokens'):
        make(engine, too_long='drop')


def test_rows_that_may_not_hold_all_samples_are_refused(make):
    with pytest.raises(ConfigError, match=r'3 x 4 samples of up to 6 tokens: set batch_size=12'):
        make(batch_size=11)
    make(batch_size=6, sequence_length=12)
    with pytest.raises(ConfigError, match='set batch_size=12'):
        make(batch_size=6, sequence_length=12, packing='none')


@pytest.mark.parametrize(
    'change', [dict(top_p=0.9), dict(top_k=5), dict(min_p=0.1), dict(temperature=0.7)]
)
def test_samples_of_another_distribution_than_the_model_s_are_refused(make, change):
    with pytest.raises(ValueError, match='samples to be from the distribution of the model itself'):
        make(**change)


def test_processes_with_other_prompts_are_refused(make, monkeypatch):
    monkeypatch.setattr(
        'jaxfm.distributed.agree.exchange', lambda name, value: {0: 'other', 1: value}
    )
    with pytest.raises(DataError, match='processes 0 and 1 have different prompts'):
        make()


def test_the_end_of_a_phase_frees_what_it_holds(make):
    source = make()
    source.next(None, 0)
    source.close()
    assert source.engine.versions == [0, 'released']


def test_statistics_are_of_the_steps_since_the_last_record(make):
    source = make(prompts=6, batch_size=24)
    source.next(None, 0)
    values = source.progress()
    assert values['rollout/reward'] == pytest.approx(0.5)
    assert values['rollout/reward_low'] < 0.5 < values['rollout/reward_high']
    assert values['rollout/flat_groups'] == pytest.approx(2 / 6)
    assert values['rollout/length'] == 4 and values['rollout/truncated'] == 0
    assert values['rollout/prompts'] == 6 and values['rollout/epochs'] == 1
    assert not any(math.isnan(value) for value in values.values())
    assert source.progress() == {'rollout/prompts': 6, 'rollout/epochs': 1}
    assert source.statistics['prompts'] == 6 and source.statistics['longest_prompt'] == 3

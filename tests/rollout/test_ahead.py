"""Sampling ahead of the loop: how far, with which weights, and how it ends."""

import json
import signal
import threading
import time

import numpy as np
import pytest

from jaxfm.errors import ConfigError, DataError
from tests.rollout.scripted import SCRIPTS, Engine, Stepwise


def rest(source):
    """Waits until the thread has nothing to do, as a slow loop would."""
    while source._engine._new or source._engine._running:
        time.sleep(0.001)


def train(source, steps, first=0, is_slow=False):
    """-> the batches of some steps, and (mean, largest) lag of each."""
    batches, lags = [], []
    for step in range(first, first + steps):
        batches.append(source.next({'step': step}, step))
        values = source.progress()
        lags.append((values['rollout/staleness'], values['rollout/staleness_max']))
        if is_slow:
            rest(source)
    return batches, lags


def numbers_of(source):
    return [int(request.id) for request in source.engine.asked]


@pytest.mark.parametrize('most', [1, 2, 3])
@pytest.mark.parametrize('seconds, is_slow', [(0.0, True), (0.005, False), (0.0, False)])
def test_no_token_is_from_older_weights_than_the_cap_allows(make, most, seconds, is_slow):
    source = make(Stepwise(seconds), max_staleness=most)
    _, lags = train(source, 10, is_slow=is_slow)
    assert all(0 <= mean <= most and largest <= most for mean, largest in lags)
    assert lags[0] == (0.0, 0)  # what the first step learns from was sampled in it
    if is_slow:  # everything was sampled as soon as it was allowed
        assert lags[most:] == [(most, most)] * (10 - most)


def test_the_batches_are_those_of_the_same_prompts_in_the_same_order(make):
    ahead, _ = train(make(Stepwise(0.001), max_staleness=2), 6)
    alone, _ = train(make(Engine()), 6)
    for ours, theirs in zip(ahead, alone):
        for name, array in theirs.items():
            np.testing.assert_array_equal(ours[name], array, err_msg=name)


def test_samples_that_run_go_on_with_new_weights(make):
    source = make(Stepwise(0.05), max_staleness=1, write_every=1)
    for step in range(4):
        source.next({}, step)
        if step:  # one step of the four that the engine needs for what was ordered just now
            count = len(source.engine.steps)
            while len(source.engine.steps) == count:
                time.sleep(0.001)
    runs = [
        json.loads(line)['versions']
        for path in sorted(source._context.samples_directory.glob('*.jsonl'))
        for line in path.read_text().splitlines()[1:]
    ]
    assert any(len(each) == 2 for each in runs)
    for each in runs:
        assert sum(count for _, count in each) == 4
        assert [version for version, _ in each] == sorted(version for version, _ in each)


def test_what_no_batch_has_is_asked_again(make):
    """A refill has a later number than prompts that were asked ahead, which are still to come."""
    options = dict(max_staleness=2, filter='zero_variance', max_refills=6)
    source = make(Stepwise(0.001), **options)
    train(source, 3)
    state = json.loads(json.dumps(source.get_state()))
    first, again = state['next_prompt'], state['asked_again']
    assert again and max(again) < first - 1
    assert source.progress()['rollout/prompts'] == first - len(again)
    source.close()
    other = make(Stepwise(), **options)
    other.set_state(state)
    for goes_on in (source, other):
        goes_on.engine.asked.clear()
        train(goes_on, 1, first=3)
        assert numbers_of(goes_on)[:9] == [*again, *range(first, first + 9)][:9]
        assert goes_on.progress()['rollout/prompts'] >= first - len(again) + 3


def test_an_error_of_the_thread_ends_the_step_that_waits(make):
    source = make(Stepwise(0.001), max_staleness=1)
    train(source, 2)
    source.engine.fault = DataError('the disk of the moon is full')
    with pytest.raises(DataError, match='of the moon'):
        train(source, 3, first=2)
    assert not source.engine.running and source.engine.cancelled
    source.close()
    source.engine.fault = None
    train(source, 2, first=3)


def test_a_judge_that_hangs_costs_its_sample(make):
    """Its limit is a signal, which no other thread would get."""
    scripts = dict.fromkeys(SCRIPTS, '0111') | {'a': '01h1'}
    options = dict(prompts=6, batch_size=24, call_seconds=0.2, max_staleness=1)
    source = make(Stepwise(scripts=scripts), **options)
    began = time.monotonic()
    train(source, 1)
    assert time.monotonic() - began < 10
    source.next({}, 1)
    assert source.progress()['rollout/failed'] == 1 / 24


@pytest.mark.parametrize('is_waiting', [False, True])
def test_closing_ends_the_thread_after_the_step_it_is_in(make, is_waiting):
    source = make(Stepwise(0.2), max_staleness=3)
    train(source, 2)  # which has ordered the prompts of step 4 just now
    if is_waiting:  # for work
        rest(source)
    while not (is_waiting or source.engine.running):
        time.sleep(0.001)
    began = time.monotonic()
    source.close()
    assert time.monotonic() - began < 0.6  # what is ordered takes 0.8 s
    assert bool(source.engine.cancelled) != is_waiting
    assert source.engine.versions[-1] == 'released'
    assert not [thread for thread in threading.enumerate() if thread.name == 'rollout']


def test_a_signal_reaches_a_loop_that_waits(make):
    """Python's handler runs in the main thread, even if that waits for samples."""
    source = make(Stepwise(0.5), max_staleness=1)
    got = []
    before = signal.signal(signal.SIGUSR2, lambda *_: got.append(time.monotonic()))
    try:
        began = time.monotonic()
        threading.Timer(0.2, signal.raise_signal, [signal.SIGUSR2]).start()
        train(source, 1)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert got and got[0] - began < 1 < time.monotonic() - began


def test_on_several_devices_programs_of_the_loop_and_the_thread_do_not_meet(make):
    source = make(Stepwise(0.004), devices=2, max_staleness=2)
    used = []

    def program(*_):
        began = time.monotonic()
        time.sleep(0.01)
        used.append((began, time.monotonic()))
        return {}

    class Evaluator:
        """Due at every step."""

        is_due = staticmethod(lambda step, last: True)
        run = staticmethod(program)

    programs = source.in_turn(train_step=program, evaluators={'mine': Evaluator()})
    for step in range(4):
        programs['evaluators']['mine'].run({}, step)
        source.next({}, step)
        programs['train_step']({}, {}, 0.0)
        time.sleep(0.02)  # the loop waits: the thread may go on
    for begin, end in source.engine.steps:
        assert not any(begin < theirs[1] and theirs[0] < end for theirs in used)
    assert any(used[1][1] < begin for begin, _ in source.engine.steps)


@pytest.mark.parametrize('most', [0, 1])
def test_recomputed_log_probs_are_of_the_step_and_the_others_of_the_reference(make, most):
    """Also if older weights have sampled: then `importance` sees what lies between."""
    more = dict(
        parts=dict(old_logprobs='recomputed', importance='truncate', kl=0.1),
        score=lambda params, batch: np.full(batch['tokens'].shape, params['step']),
        reference=lambda origin: ({'step': -7}, None),
    )
    source = make(Stepwise() if most else Engine(), more=more, max_staleness=most)
    for step, batch in enumerate(train(source, 3)[0]):
        assert (batch['old_logprobs'] == step).all()
        assert (batch['reference_logprobs'] == -7).all()
        assert set(batch['sampler_logprobs'][batch['loss_mask'] > 0]) == {-0.5, -1.5, -2.5, -3.5}


def test_a_step_out_of_turn_is_refused(make):
    """What was ordered for another one might be from weights that are too old for it."""
    source = make(Stepwise(), max_staleness=1)
    train(source, 2)
    with pytest.raises(RuntimeError, match='samples were ordered for step 2, not 4: close it'):
        source.next({}, 4)
    source.close()
    train(source, 2, first=4)


def test_several_processes_are_refused(make, monkeypatch):
    monkeypatch.setattr('jax.process_count', lambda: 2)
    make()
    with pytest.raises(ConfigError, match='data.max_staleness is 1, but this run has 2 processes'):
        make(max_staleness=1)


def test_where_the_time_goes_is_told(make):
    source = make(Stepwise(0.01), max_staleness=1)
    source.next({}, 0)
    first = source.progress()
    assert first['rollout/generate_seconds'] >= 0.04
    assert first['rollout/idle_seconds'] >= 0.04
    source.next({}, 1)
    source.progress()
    rest(source)  # the loop trains; the thread samples what step 1 has ordered
    source.next({}, 2)
    second = source.progress()
    assert second['rollout/generate_seconds'] >= 0.02 > second['rollout/idle_seconds']
    assert {*first} >= {'rollout/judge_seconds', 'rollout/logprobs_seconds'}

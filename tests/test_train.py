"""The loop: the order of a step, resume bit for bit, a source that samples, and what it refuses."""

import logging
import os
import re
import signal
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxfm import sharding
from jaxfm.checkpoint import CheckpointConfig
from jaxfm.checkpoint.checkpointer import Checkpointer
from jaxfm.checkpoint.reader import Reader
from jaxfm.checkpoint.store import Store
from jaxfm.checkpoint.survey import SET_ASIDE, survey
from jaxfm.distributed.preemption import Preemption
from jaxfm.errors import NumericsError, Preempted, UnavailableError
from jaxfm.evals.base import Periodic
from jaxfm.metrics import goodput
from jaxfm.metrics.clock import StepClock
from jaxfm.metrics.writers import JsonlWriter, Recorder, read_records
from jaxfm.models import TransformerConfig
from jaxfm.models.transformer import Transformer
from jaxfm.objectives import NextTokenConfig
from jaxfm.objectives.next_token import NextToken
from jaxfm.ops.logprobs import logits
from jaxfm.optim import AdamWConfig, SpikesConfig
from jaxfm.optim.adamw import AdamW
from jaxfm.optim.spikes import Rewind, Spikes
from jaxfm.state import abstract_state, init_state, make_train_step, split
from jaxfm.storage.posix import PosixStorage
from jaxfm.train import Loop, train
from tests.data.makers import Made

V, ROWS, LENGTH = 30, 4, 8
MODEL = TransformerConfig.model_validate(
    dict(
        vocab_size=V,
        embed_dim=8,
        num_layers=1,
        block=dict(num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=16),
    )
)
ONE = dict.fromkeys(sharding.MESH_AXES, 1)


pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture(scope='module')
def kit():
    """A model on two devices, its compiled step, and a compiled way to sample from it."""
    mesh = sharding.make_mesh(ONE | dict(fsdp=2), jax.devices()[:2])

    def make_model(key):
        return Transformer(MODEL, nnx.Rngs(key))

    with jax.set_mesh(mesh):
        parts = split(make_model)
        axes = {path: parts.axes[path] for path in sorted(parts.trainable)}
        rule = AdamW(AdamWConfig(learning_rate=0.1, schedule='constant'), 8, axes)

        @jax.jit
        def sample(params, number):
            """A batch whose targets the model draws itself, the one of this number."""
            words_key, noise_key = jax.random.split(jax.random.fold_in(jax.random.key(7), number))
            rows = sharding.activation('batch', 'position')
            tokens = jax.random.randint(words_key, (ROWS, LENGTH), 0, V, out_sharding=rows)
            positions = jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH), out_sharding=rows)
            model = parts.merge(params)
            hidden, _ = model(tokens, positions, jnp.ones_like(tokens))
            scores = logits(hidden, model.unembed())
            places = sharding.activation('batch', 'position', 'vocab')
            noise = jax.random.gumbel(noise_key, scores.shape, out_sharding=places)
            return {
                'tokens': tokens,
                'targets': jnp.argmax(scores + noise, -1).astype(jnp.int32),
                'positions': positions,
                'segment_ids': jnp.ones_like(tokens),
                'loss_mask': jnp.ones_like(tokens, jnp.float32),
            }

        yield types.SimpleNamespace(
            mesh=mesh,
            initial=jax.device_get(init_state(make_model, parts, rule, 0).to_tree()),
            wanted=abstract_state(make_model, parts, rule, 0),
            step=make_train_step(parts, NextToken(NextTokenConfig()), rule),
            sample=sample,
            no_limit=sharding.scalar(np.inf),
        )


def fresh_state(kit):
    places = {name: leaf.sharding for name, leaf in kit.wanted.to_tree().items()}
    return kit.wanted.with_tree(jax.device_put(kit.initial, places))


# Sources


class Maker:
    """Makes batches on the host; the state is the number of the next one."""

    def __init__(self):
        self.number = 0

    def make(self):
        rng = np.random.default_rng(self.number)
        self.number += 1
        tokens, targets = rng.integers(0, V, (2, ROWS, LENGTH), np.int32)
        return {
            'tokens': tokens,
            'targets': targets,
            'positions': np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
            'segment_ids': np.ones((ROWS, LENGTH), np.int32),
            'loss_mask': (rng.random((ROWS, LENGTH)) < 0.8).astype(np.float32),
        }

    def get_state(self):
        return {'number': self.number}

    def set_state(self, state):
        self.number = state['number']


def put(kit):
    return lambda batch: sharding.put(batch, kit.mesh, ROWS)


def prefetched(kit):
    return Made(Maker(), put(kit), ROWS * LENGTH)


def poisoned(*numbers):
    """A source whose batches of these numbers give a loss that is not a number."""

    class Poisoned(Maker):
        def make(self):
            batch = super().make()
            if self.number - 1 in numbers:
                batch['loss_mask'] *= np.float32(np.nan)
            return batch

    return lambda kit: Made(Poisoned(), put(kit))


class Rollout:
    """A source that samples with the weights it is lent."""

    def __init__(self, kit):
        self.kit, self.number = kit, 0
        self.place = jax.NamedSharding(kit.mesh, jax.P())

    def next(self, params, step):
        number = jax.device_put(np.int32(self.number), self.place)
        self.number += 1
        return self.kit.sample(params, number)

    def get_state(self):
        return {'number': self.number}

    def set_state(self, state):
        self.number = state['number']

    bucket, tokens = 'generate', ROWS * LENGTH

    def progress(self):
        return {'data/batches': self.number}

    def close(self):
        pass


class Noting:
    """A source that tells when it is asked, and may do something first."""

    def __init__(self, source, events, before=lambda step: None):
        self.source, self.events, self.before = source, events, before

    def next(self, params, step):
        self.before(step)
        self.events.append(('next', step))
        return self.source.next(params, step)

    def __getattr__(self, name):
        return getattr(self.source, name)


# The other parts of a loop


class Probe(Periodic):
    """An evaluator: one number that depends on every bit of the weights."""

    def __init__(self, every, events):
        super().__init__(every, at_start=True)
        self.events = events

    def run(self, params, step):
        self.events.append(('eval', step))
        return {'sum': float(np.asarray(params['head/table'], np.float64).sum())}


class NotingCheckpointer(Checkpointer):
    settle_seconds = 0.0  # of storage that is slow

    def __init__(self, directory, events, **config):
        super().__init__(CheckpointConfig(**dict(every=4, keep=3) | config), directory)
        self.notes = events

    def save(self, step, state, extra, must, *more):
        self.notes.append(('save', step))
        super().save(step, state, extra, must, *more)
        if must:
            time.sleep(self.settle_seconds)


class StopAt:
    """A preemption that comes at a step."""

    def __init__(self, step=None):
        self.step = step

    def should_stop(self, step):
        return step == self.step


def run(
    kit,
    directory,
    make_source,
    *,
    steps=8,
    stop_at=None,
    before=lambda step: None,
    clock=None,
    policy=types.MappingProxyType({}),
    saving=types.MappingProxyType({}),
    **options,
):
    """The loop in `directory` as `jaxfm.modes.train` builds it, resumed if there is a checkpoint.

    -> (final state, events)
    """
    events = []
    source = make_source(kit)
    checkpointer = NotingCheckpointer(directory / 'checkpoints', events, **saving)
    recorder = Recorder(JsonlWriter(directory / 'metrics.jsonl'))
    spikes = Spikes(SpikesConfig(**policy))
    clock = clock or StepClock(steps)

    def step_with_a_note(state, batch, limit):
        events.append(('step',))
        # Always with a limit: without one it would be another program to compile.
        return kit.step(state, batch, kit.no_limit if limit is None else limit)

    loop = Loop(
        **dict(
            last=steps,
            train_step=step_with_a_note,
            source=Noting(source, events, before),
            spikes=spikes,
            evaluators={'probe': Probe(2, events)},
            checkpointer=checkpointer,
            recorder=recorder,
            log_every=3,
            clock=clock,
            preemption=StopAt(stop_at),
        )
        | options
    )
    step = checkpointer.latest_step()
    try:
        if step is None:
            state = fresh_state(kit)
        else:
            tree, extra = checkpointer.restore(step, kit.wanted.to_tree())
            state = kit.wanted.with_tree(tree)
            source.set_state(extra['source'])
            clock.set_state(extra['clock'])
            spikes.set_state(extra['spikes'])
            recorder.jsonl.truncate(extra['metrics_position'])
        with clock.training():
            state = train(loop, state, step or 0, done=step is not None)
        assert checkpointer.latest_step() == steps
        return state, events
    except Preempted as error:
        error.events = events
        raise
    finally:
        source.close()
        recorder.close()
        checkpointer.close()


def metrics(directory):
    """What was measured, but not when."""
    records = read_records(directory / 'metrics.jsonl')
    return [
        {name: value for name, value in record.items() if name != 'time'}
        for record in records
        if record['kind'] in ('train', 'eval')
    ]


def assert_same_state(state, wanted):
    state, wanted = jax.device_get((state.to_tree(), wanted.to_tree()))
    assert state.keys() == wanted.keys()
    for name in wanted:
        assert state[name].tobytes() == wanted[name].tobytes(), name


@pytest.fixture(scope='module', params=[prefetched, Rollout], ids=['dataset', 'rollout'])
def straight(request, kit, tmp_path_factory):
    """An uninterrupted run of eight steps: (source, directory, final state, events)."""
    directory = tmp_path_factory.mktemp('straight')
    return request.param, directory, *run(kit, directory, request.param)


# The order of a step


def test_a_step_evaluates_then_saves_then_asks_the_source(straight):
    _, _, _, events = straight
    assert events == [
        *[('eval', 0), ('next', 0), ('step',)],
        *[('next', 1), ('step',)],
        *[('eval', 2), ('next', 2), ('step',)],
        *[('next', 3), ('step',)],
        *[('eval', 4), ('save', 4), ('next', 4), ('step',)],
        *[('next', 5), ('step',)],
        *[('eval', 6), ('next', 6), ('step',)],
        *[('next', 7), ('step',)],
        *[('eval', 8), ('save', 8)],
    ]


def test_a_checkpoint_holds_the_position_before_its_next_batch(straight):
    _, directory, _, _ = straight
    reader = Reader(CheckpointConfig(), directory / 'checkpoints')
    extra = {step: reader.read_manifest(step)['extra'] for step in reader.steps()}
    assert {step: values['source'] for step, values in extra.items()} == {
        4: {'number': 4},
        8: {'number': 8},
    }
    assert extra[4]['clock']['tokens'] == 4 * ROWS * LENGTH


def test_the_first_the_last_and_every_nth_step_are_logged(straight):
    _, directory, _, _ = straight
    records = list(read_records(directory / 'metrics.jsonl'))
    steps = {
        kind: [record['step'] for record in records if record['kind'] == kind]
        for kind in ('train', 'perf', 'eval')
    }
    assert steps == {'train': [1, 3, 6, 8], 'perf': [1, 3, 6, 8], 'eval': [0, 2, 4, 6, 8]}
    train_records = [record for record in records if record['kind'] == 'train']
    for record in train_records:
        assert {'train/loss', 'train/grad_norm', 'train/learning_rate'} < record.keys()
        assert record['train/skipped_steps'] == 0
    assert len({record['train/loss'] for record in train_records}) == 4


def test_records_tell_what_was_delivered_and_not_what_is_made_ahead(straight):
    records = read_records(straight[1] / 'metrics.jsonl')
    batches = {r['step']: r['data/batches'] for r in records if r['kind'] == 'perf'}
    assert batches == {step: step for step in (1, 3, 6, 8)}


def test_every_second_of_the_loop_has_a_bucket(kit, tmp_path):
    def slow(step):
        time.sleep(0.02)

    run(kit, tmp_path, prefetched, before=slow)
    perf = [r for r in read_records(tmp_path / 'metrics.jsonl') if r['kind'] == 'perf'][-1]
    account = {bucket: perf[goodput.name_of(bucket)] for bucket in goodput.BUCKETS}
    assert sum(account.values()) == pytest.approx(perf['perf/elapsed_seconds'])
    assert account['data_wait'] >= 8 * 0.02
    assert min(account[bucket] for bucket in ('init', 'step', 'eval', 'checkpoint_save')) > 0
    assert account['wasted'] == account['other'] == 0


def test_waiting_for_the_last_save_is_time_of_saving(kit, tmp_path, monkeypatch):
    monkeypatch.setattr(NotingCheckpointer, 'settle_seconds', 0.3)
    clock = StepClock(2)
    run(kit, tmp_path, prefetched, steps=2, clock=clock)
    assert clock.seconds['checkpoint_save'] >= 0.3


def test_the_step_is_compiled_once_for_fresh_and_restored_states(straight, kit, tmp_path):
    make_source = straight[0]
    before = kit.step._cache_size()
    with pytest.raises(Preempted):
        run(kit, tmp_path, make_source, steps=3, stop_at=1)
    run(kit, tmp_path, make_source, steps=3)
    assert kit.step._cache_size() == before


def test_the_time_to_compile_is_that_of_this_process_and_told_once(kit, tmp_path, caplog):
    clock = StepClock(2)
    clock.set_state({'tokens': 0, 'seconds': {'compile': 1000.0}})  # of earlier processes
    with caplog.at_level(logging.INFO, 'jaxfm'):
        run(kit, tmp_path, prefetched, steps=2, clock=clock)
    [seconds] = re.findall(r'compiled the step in ([\d.]+) s', caplog.text)
    assert float(seconds) < 500 and clock.seconds['compile'] > 1000


# Resume


class Crash(Exception):
    """What a run may die of."""


def crash_at(step):
    def before(now):
        if now == step:
            raise Crash

    return before


def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(straight, kit, tmp_path):
    make_source, directory, state, _ = straight
    with pytest.raises(Preempted, match='saved at step 6') as stopped:
        run(kit, tmp_path, make_source, stop_at=6)
    assert stopped.value.events[-2:] == [('eval', 6), ('save', 6)]  # off the cadence of saves
    resumed, events = run(kit, tmp_path, make_source)
    assert events[:2] == [('next', 6), ('step',)]
    assert_same_state(resumed, state)
    assert metrics(tmp_path) == metrics(directory)


def test_a_run_that_crashed_repeats_what_came_after_its_checkpoint(straight, kit, tmp_path):
    make_source, directory, state, _ = straight
    with pytest.raises(Crash):
        run(kit, tmp_path, make_source, before=crash_at(7))
    assert metrics(tmp_path)[-1]['step'] == 6
    resumed, events = run(kit, tmp_path, make_source)
    assert events[:2] == [('next', 4), ('step',)]  # neither evaluated nor saved again
    assert_same_state(resumed, state)
    assert metrics(tmp_path) == metrics(directory)


def test_the_batches_of_a_rollout_depend_on_the_weights(straight, kit):
    first = Rollout(kit).next(fresh_state(kit).params, 0)
    later = Rollout(kit).next(straight[2].params, 0)
    np.testing.assert_array_equal(first['tokens'], later['tokens'])
    assert not np.array_equal(first['targets'], later['targets'])


# Stopping


def test_a_signal_saves_and_raises_preempted(kit, tmp_path):
    with Preemption() as preemption:

        def send(step):
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                while not preemption.should_stop(step):
                    pass

        with pytest.raises(Preempted, match='saved at step 3; run it again'):
            run(kit, tmp_path, prefetched, before=send, preemption=preemption)
    reader = Reader(CheckpointConfig(), tmp_path / 'checkpoints')
    assert reader.steps() == [3]
    assert reader.read_manifest(3)['extra']['source'] == {'number': 3}


def test_a_stop_right_after_resuming_saves_nothing_again(kit, tmp_path):
    for _ in range(2):
        with pytest.raises(Preempted) as stopped:
            run(kit, tmp_path, prefetched, stop_at=1)
    assert stopped.value.events == []


def test_a_stop_that_comes_at_the_end_is_no_stop(kit, tmp_path):
    _, events = run(kit, tmp_path, prefetched, steps=2, stop_at=2)
    assert events[-2:] == [('eval', 2), ('save', 2)]


def test_no_steps_is_to_evaluate_only(kit, tmp_path):
    state, events = run(kit, tmp_path, prefetched, steps=0)
    assert [event for event in events if event[0] != 'save'] == [('eval', 0)]
    assert_same_state(state, fresh_state(kit))


# Steps that are skipped


def steps_in(directory):
    return Reader(CheckpointConfig(), directory / 'checkpoints').steps()


def test_a_save_that_is_due_waits_for_the_next_update(kit, tmp_path):
    state, events = run(kit, tmp_path, poisoned(2, 3, 4))
    assert [step for kind, *step in events if kind == 'save'] == [[6], [8]]
    assert steps_in(tmp_path) == [6, 8]
    assert int(state.counters['skipped']) == 3


def test_one_skipped_step_delays_no_other_save(kit, tmp_path):
    _, events = run(kit, tmp_path, poisoned(4), steps=9)
    assert [step for kind, *step in events if kind == 'save'] == [[4], [8], [9]]


def test_a_stop_among_skipped_steps_saves_nothing_and_names_the_step_to_resume_at(kit, tmp_path):
    with pytest.raises(Preempted, match='step 6 and not saved.* again to resume at step 4$'):
        run(kit, tmp_path, poisoned(4, 5), stop_at=6)
    assert steps_in(tmp_path) == [4]
    with pytest.raises(Preempted, match='again to start over$'):
        run(kit, tmp_path / 'new', poisoned(0, 1), stop_at=2)


def test_a_phase_that_ends_with_a_skipped_step_fails(kit, tmp_path):
    with pytest.raises(NumericsError, match='from step 7 to 8, .* again to resume at step 4$'):
        run(kit, tmp_path, poisoned(7))
    assert steps_in(tmp_path) == [4]


def test_weights_that_take_no_update_are_set_aside(kit, tmp_path):
    """Checkpoint 8 is of such weights; the run resumes before it and keeps it all the while."""
    bad = range(8, 40)
    options = dict(steps=40, log_every=1000, evaluators={})
    with pytest.raises(NumericsError) as raised:
        run(kit, tmp_path, poisoned(*bad), **options)
    assert str(raised.value) == (
        'no update could be applied from step 8 to 28, because the loss or the gradient was not '
        'finite; checkpoint 8 is set aside; lower the learning rate with --allow_change=optimizer; '
        'run it again to resume at step 4'
    )
    assert steps_in(tmp_path) == [4]
    events = list(read_records(tmp_path / 'metrics.jsonl'))
    assert [e['checkpoint/set_aside'] for e in events if 'checkpoint/set_aside' in e] == [8]

    run(kit, tmp_path, prefetched, steps=24, evaluators={})  # saves step 8 again, and deletes it
    assert steps_in(tmp_path) == [16, 20, 24]
    store = Store(PosixStorage(tmp_path / 'checkpoints'))
    [aside] = [one for one in survey(store).attempts if one.state == SET_ASIDE]
    assert aside.step == 8 and aside.manifest['extra']['source'] == {'number': 8}

    assert store.sweep() == {}


def test_the_first_checkpoint_that_is_left_is_never_set_aside(kit, tmp_path):
    bad = poisoned(*range(4, 30))
    for _ in range(2):
        with pytest.raises(
            NumericsError, match='not finite; lower the .* again to resume at step 4$'
        ):
            run(kit, tmp_path, bad, steps=40, evaluators={})
        assert steps_in(tmp_path) == [4]


def test_a_run_that_resumed_with_ruined_weights_goes_back(kit, tmp_path):
    bad = poisoned(*range(8, 40))
    with pytest.raises(Preempted, match='again to resume at step 8$'):
        run(kit, tmp_path, bad, steps=40, stop_at=12)
    assert steps_in(tmp_path) == [4, 8]
    with pytest.raises(NumericsError, match='checkpoint 8 is set aside; .* at step 4$'):
        run(kit, tmp_path, bad, steps=14)  # the phase ends before there are 20 skipped steps
    assert steps_in(tmp_path) == [4]


def test_weights_that_take_no_update_are_set_aside_on_the_local_tier_too(kit, tmp_path):
    """The durable tier has nothing yet."""
    local = dict(directory=str(tmp_path / 'local'), every=4)
    options = dict(steps=60, log_every=1000, evaluators={}, saving=dict(every=100, local=local))
    with pytest.raises(
        NumericsError, match='8 to 28, .*; checkpoint 8 is set aside; .* at step 4$'
    ):
        run(kit, tmp_path, poisoned(*range(8, 60)), **options)
    _, events = run(kit, tmp_path, prefetched, **options | dict(steps=6))
    assert events[0] == ('next', 4) and steps_in(tmp_path) == [6]


def test_a_place_that_does_not_answer_does_not_hide_the_reason(kit, tmp_path, monkeypatch):
    def refuse(*_):
        monkeypatch.setattr(Store, 'commits', refuse)
        raise UnavailableError('no answer')

    monkeypatch.setattr(Store, 'set_aside', refuse)
    with pytest.raises(NumericsError) as raised:
        run(kit, tmp_path, poisoned(*range(8, 40)), steps=40, evaluators={})
    monkeypatch.undo()
    assert str(raised.value) == (
        'no update could be applied from step 8 to 28, because the loss or the gradient was not '
        'finite; checkpoints from step 8 on could not be set aside: no answer; lower the learning '
        'rate with --allow_change=optimizer; run it again to resume at the newest checkpoint'
    )
    assert steps_in(tmp_path) == [4, 8]


# Losses that spike


def odd(*numbers, poisoned=()):
    """A source whose batches of these numbers have targets that no other batch has.

    poisoned: numbers of batches that give a loss that is not a number.
    """

    class Odd(Maker):
        def make(self):
            batch = super().make()
            is_odd = self.number - 1 in numbers
            batch['targets'] = np.where(is_odd, V - 1, batch['targets'] // 2).astype(np.int32)
            batch['loss_mask'] *= np.float32(np.nan if self.number - 1 in poisoned else 1)
            return batch

    return lambda kit: Made(Odd(), put(kit))


STRICT = dict(window=6, sigmas=4)  # judges from step 8 on


def events_in(directory, prefix='spike/'):
    return [
        (record['step'], {k: v for k, v in record.items() if k.startswith(prefix)})
        for record in read_records(directory / 'metrics.jsonl')
        if record['kind'] == 'event' and any(name.startswith(prefix) for name in record)
    ]


def test_a_spike_is_told_and_changes_nothing_else(kit, tmp_path):
    found = {}
    for policy in ('off', 'warn'):
        directory = tmp_path / policy
        found[policy], _ = run(
            kit, directory, odd(10), steps=14, policy=STRICT | {'policy': policy}
        )
    assert_same_state(found['off'], found['warn'])
    assert events_in(tmp_path / 'off') == []
    [(step, values)] = events_in(tmp_path / 'warn')
    assert step == 11 and values['spike/policy'] == 'warn'
    assert values['spike/loss'] > values['spike/limit']
    counts = {
        r['step']: r['train/spikes'] for r in metrics(tmp_path / 'warn') if 'train/spikes' in r
    }
    assert counts == {1: 0, 3: 0, 6: 0, 9: 0, 12: 1, 14: 1}


@pytest.fixture(scope='module')
def skipping(kit, tmp_path_factory):
    """An uninterrupted run that skips the spikes of steps 11, 12 and 18: (directory, state)."""
    directory = tmp_path_factory.mktemp('skipping')
    state, events = run(
        kit, directory, odd(10, 11, 17), steps=20, policy=STRICT | {'policy': 'skip'}
    )
    return directory, state, events


def test_a_spike_that_is_skipped_leaves_the_weights_and_delays_a_save(skipping, kit):
    directory, state, events = skipping
    assert [step for step, _ in events_in(directory)] == [11, 12, 18]
    assert int(state.counters['skipped']) == 3 and int(state.counters['updates']) == 17
    assert [step for kind, *step in events if kind == 'save'] == [[4], [8], [13], [16], [20]]
    sums = {r['step']: r['eval/probe/sum'] for r in metrics(directory) if 'eval/probe/sum' in r}
    assert sums[10] == sums[12] != sums[14]
    updates = {r['step']: r['train/skipped_steps'] for r in metrics(directory) if 'train/loss' in r}
    assert updates == {1: 0, 3: 0, 6: 0, 9: 0, 12: 2, 15: 2, 18: 3, 20: 3}


@pytest.mark.parametrize('stop', [10, 11, 12, 17])
def test_a_run_that_skips_spikes_resumes_as_if_never_stopped(stop, skipping, kit, tmp_path):
    """Before, at and between the spikes: a loss is judged by the same losses."""
    directory, wanted, _ = skipping
    options = dict(steps=20, policy=STRICT | {'policy': 'skip'})
    said = f'step {stop} and not saved.* at step 8$' if stop in (11, 12) else f'at step {stop}; run'
    with pytest.raises(Preempted, match=said):
        run(kit, tmp_path, odd(10, 11, 17), stop_at=stop, **options)
    state, _ = run(kit, tmp_path, odd(10, 11, 17), **options)
    assert_same_state(state, wanted)
    assert metrics(tmp_path) == metrics(directory)
    assert events_in(tmp_path) == events_in(directory)


def test_the_limit_of_a_step_does_not_depend_on_when_the_host_looks(skipping, kit, tmp_path):
    directory, wanted, _ = skipping
    options = dict(steps=20, policy=STRICT | {'policy': 'skip'}, log_every=1)
    state, _ = run(kit, tmp_path, odd(10, 11, 17), **options)
    assert_same_state(state, wanted)
    assert events_in(tmp_path) == events_in(directory)


def test_stops_among_spikes_that_are_skipped_cost_no_good_checkpoint(kit, tmp_path):
    """A finite loss says nothing about the weights: update 12 may have ruined them."""
    options = dict(steps=60, evaluators={}, policy=STRICT | {'policy': 'skip'})
    options['saving'] = dict(keep=2)
    for stop in (13, 16, 20):
        with pytest.raises(Preempted, match=f'{stop} and not saved, .* to resume at step 12$'):
            run(kit, tmp_path, odd(*range(12, 60)), stop_at=stop, **options)
        assert steps_in(tmp_path) == [8, 12]


@pytest.mark.parametrize('last', [13, 16])
def test_a_phase_that_ends_with_a_spike_that_is_skipped_fails(kit, tmp_path, last):
    """A single one may be the first of many."""
    with pytest.raises(NumericsError) as raised:
        run(kit, tmp_path, odd(*range(12, 60)), steps=last, policy=STRICT | {'policy': 'skip'})
    assert str(raised.value) == (
        f'no update could be applied from step 12 to {last}, because the loss was above the limit '
        'for spikes; lower the learning rate, or set spikes.policy=warn, with '
        '--allow_change=optimizer, if need be from an earlier step (--resume_step=8); run it again '
        'to resume at step 12'
    )
    assert steps_in(tmp_path) == [4, 8, 12]


def test_a_checkpoint_before_an_update_without_a_spike_is_never_deleted(kit, tmp_path):
    """Of step 10 none is known: the loss of step 11 shows its weights."""
    options = dict(steps=30, evaluators={}, policy=STRICT, saving=dict(every=1, keep=2))
    for stop in (11, 12):  # a run that resumes knows it from the checkpoint
        with pytest.raises(Crash):
            run(kit, tmp_path, odd(10, 11), before=crash_at(stop), **options)
        assert [step for step, _ in events_in(tmp_path)][-1] == stop
        assert steps_in(tmp_path) == [9, stop]
    with pytest.raises(Crash):
        run(kit, tmp_path, odd(10, 11), before=crash_at(22), **options)
    assert steps_in(tmp_path) == [21, 22]


def test_updates_of_spikes_are_no_good_updates(kit, tmp_path):
    bad = odd(10, 11, poisoned=range(12, 60))
    options = dict(evaluators={}, policy=STRICT, saving=dict(every=1, keep=3))
    with pytest.raises(NumericsError, match='11 is set aside; .* 12 is set aside; .* at step 9$'):
        run(kit, tmp_path, bad, steps=60, **options)
    assert steps_in(tmp_path) == [9]


def test_losses_that_stay_high_end_a_run_that_skips_them(kit, tmp_path):
    bad = odd(*range(12, 60))
    with pytest.raises(NumericsError) as raised:
        run(kit, tmp_path, bad, steps=60, evaluators={}, policy=STRICT | {'policy': 'skip'})
    assert str(raised.value) == (
        'no update could be applied from step 12 to 32, because the loss was above the limit for '
        'spikes; checkpoint 12 is set aside; lower the learning rate, or set spikes.policy=warn, '
        'with --allow_change=optimizer, if need be from an earlier step (--resume_step=4); run it '
        'again to resume at step 8'
    )


@pytest.mark.parametrize('log_every', [3, 1])
def test_a_spike_that_rewinds_ends_the_loop_before_it_is_saved(kit, tmp_path, log_every):
    """Whenever the host looked at it, the data goes on after the batch of the spike."""
    policy = STRICT | {'policy': 'rewind'}
    with pytest.raises(Rewind) as raised:
        run(kit, tmp_path, odd(11), steps=20, policy=policy, log_every=log_every)
    assert raised.value.spike.step == 12  # at which a save was due
    assert raised.value.spike.position == {'number': 12}
    assert steps_in(tmp_path) == [4, 8]
    [(step, values)] = events_in(tmp_path)
    assert step == 12 and values['spike/policy'] == 'rewind'


@pytest.mark.parametrize('spike, kept, aside', [(12, [9, 10], [11]), (10, [9], [])])
def test_a_rewind_sets_aside_the_checkpoint_that_no_good_step_followed(
    kit, tmp_path, spike, kept, aside
):
    """The loss of step 12 shows the update of step 11. The first that is left stays."""
    options = dict(steps=20, evaluators={}, policy=STRICT | {'policy': 'rewind'})
    with pytest.raises(Crash):
        run(kit, tmp_path, odd(), before=crash_at(9), saving=dict(every=9), **options)
    with pytest.raises(Rewind):
        run(kit, tmp_path, odd(spike - 1), saving=dict(every=1, keep=3), **options)
    assert steps_in(tmp_path) == kept
    assert [v['checkpoint/set_aside'] for _, v in events_in(tmp_path, 'checkpoint/set')] == aside


def test_too_many_rewinds_end_the_run(kit, tmp_path):
    policy = STRICT | {'policy': 'rewind', 'max_rewinds': 0}
    with pytest.raises(NumericsError) as raised:
        run(kit, tmp_path, odd(12), steps=20, policy=policy)
    assert 'is a spike, and this phase has gone back 0 times ' in str(raised.value)
    assert str(raised.value).endswith(
        '; checkpoint 12 is set aside; lower the learning rate with --allow_change=optimizer, if '
        'need be from an earlier step (--resume_step=4); run it again to resume at step 8'
    )
    assert steps_in(tmp_path) == [4, 8]


# Transfers, and steps in flight


def on_the_host(kit):
    """A source that forgets to put its batches on the devices."""
    return Made(Maker())


class WithAPythonNumber(Rollout):
    """Computes on the device with a number from the host."""

    def next(self, params, step):
        super().next(params, step)
        return self.kit.sample(params, jnp.int32(step) + 1)


@pytest.mark.parametrize('make_source', [on_the_host, WithAPythonNumber])
def test_an_implicit_transfer_in_a_step_raises(make_source, kit, tmp_path):
    with pytest.raises(Exception, match='Disallowed host-to-device transfer'):
        run(kit, tmp_path, make_source, train_step=small_step)


@jax.jit
def small_step(state, batch, limit):
    return state, {'loss': jnp.sum(batch['loss_mask'])}


class Pending:
    """A metric that is computed when somebody waits for it."""

    def __init__(self, flying):
        self.flying = flying
        flying.append(self)

    def block_until_ready(self):
        if self in self.flying:
            self.flying.remove(self)
        return self

    def __array__(self, dtype=None, copy=None):
        self.block_until_ready()
        return np.zeros(())

    def item(self):
        return self.__array__().item()


def test_at_most_two_steps_are_in_flight(kit, tmp_path):
    flying, most = [], []

    def fake_step(state, batch, limit):
        metric = Pending(flying)
        most.append(len(flying))
        return state, dict.fromkeys(('loss', 'grad_norm', 'skipped_steps'), metric)

    run(kit, tmp_path, prefetched, train_step=fake_step, log_every=100, evaluators={})
    # The first step is logged and the fourth is saved, which waits for them.
    assert most == [1, 1, 2, 2, 1, 2, 2, 2]


def test_a_logged_loss_that_is_not_a_number_does_not_stop_the_run(kit, tmp_path):
    def fake_step(state, batch, limit):
        nan = np.float32(np.nan)
        return state, {'loss': nan, 'grad_norm': nan, 'skipped_steps': np.int32(0)}

    run(kit, tmp_path, prefetched, train_step=fake_step, steps=2, evaluators={})
    losses = [record['train/loss'] for record in metrics(tmp_path)]
    assert len(losses) == 2 and all(np.isnan(losses))

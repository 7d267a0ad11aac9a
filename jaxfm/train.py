"""THE loop. Pre-training, SFT, preference learning and RL differ in source and objective, not here.

The order of a step is a decision. Evaluators see the weights of a step before anything moves; a
checkpoint is saved before the source gives its next batch. So a run that resumes at step k sees
exactly what an uninterrupted run saw there, and it does not evaluate step k again. A phase ends as
a run does, evaluated and saved; so the next one begins from what is on storage.
"""

import contextlib
import dataclasses
import logging
from typing import Any, Protocol

import jax

from jaxfm.checkpoint.checkpointer import Checkpointer
from jaxfm.distributed.preemption import Preemption
from jaxfm.errors import NumericsError, Preempted
from jaxfm.metrics.clock import StepClock
from jaxfm.metrics.writers import Recorder
from jaxfm.state import TrainState

log = logging.getLogger('jaxfm')

PATIENCE = 20  # steps that may be skipped in a row


class Source(Protocol):
    """Where batches come from. A dataset ignores params, a rollout samples with them.

    params are lent for the call: the step after it donates them. The state is JSON, and is the
    position after the batch that was delivered last.
    """

    def next(self, params, step: int) -> dict[str, jax.Array]: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...

    def progress(self) -> dict[str, float]:
        """How much has been delivered, such as epochs; for the records."""


class Evaluator(Protocol):
    """Measures weights at a cadence: held-out loss, sampled completions, anything with a name."""

    def is_due(self, step: int, last: int) -> bool: ...

    def run(self, params, step: int) -> dict[str, float]: ...


@dataclasses.dataclass
class Loop:
    """What the loop needs for one phase, built from a config."""

    last: int  # the phase ends at this step of the run
    train_step: Any  # (state, batch) -> (state, metrics), jitted, the state donated
    source: Source
    evaluators: dict[str, Evaluator]
    checkpointer: Checkpointer
    recorder: Recorder
    log_every: int
    clock: StepClock
    preemption: Preemption
    tokens_per_step: int


def train(loop: Loop, state: TrainState, step: int, done: bool) -> TrainState:
    """Runs from `step` to the end of a phase and returns the state there, saved.

    Args:
      done: the weights at this step are evaluated and saved already.

    Raises:
      Preempted: a signal asked to stop; the state is saved.
      NumericsError: loss or gradient have not been finite for PATIENCE steps.
      StorageError, LockedError: the run can no longer be saved.
    """
    first, before = step, None
    progress = (step, -1)
    while True:
        if not done:
            evaluate(loop, state, step)
        stopping = step < loop.last and loop.preemption.should_stop(step)
        leaving = stopping or step >= loop.last
        if not done and (leaving or loop.checkpointer.is_due(step)):
            save(loop, state, step, must=leaving)
        if stopping:
            raise Preempted(f'stopped by a signal and saved at step {step}; run it again to resume')
        if leaving:
            return state

        # Nothing in a step may move data between host and device without saying so.
        with jax.transfer_guard('disallow'):
            with loop.clock.aside('data_wait'):
                batch = loop.source.next(state.params, step)
            with loop.clock.aside('compile') if step == first else contextlib.nullcontext():
                state, metrics = loop.train_step(state, batch)
        if step == first:
            log.info('compiled the step in %.1f s', loop.clock.seconds['compile'])
        step, done = step + 1, False
        loop.clock.step(loop.tokens_per_step)
        # At most two steps in flight: more abort on several CPU devices, and hide a hang.
        jax.block_until_ready(before)
        before = metrics
        if step % loop.log_every == 0 or step in (1, loop.last):
            values = record(loop, metrics, step)
            progress = _check_progress(step, step - values.get('skipped_steps', 0), progress)


def evaluate(loop: Loop, state: TrainState, step: int) -> None:
    """Runs the evaluators that are due on the weights of this step."""
    for name, evaluator in loop.evaluators.items():
        if evaluator.is_due(step, loop.last):
            with loop.clock.aside('eval'):
                values = evaluator.run(state.params, step)
            named = {f'eval/{name}/{key}': value for key, value in values.items()}
            loop.recorder.write(step, 'eval', named)


def save(loop: Loop, state: TrainState, step: int, must: bool) -> None:
    """Starts a checkpoint: weights, optimizer, position in the data, clocks, end of the records.

    must: the loop ends here, so it is waited for and a failure is an error.
    """
    with loop.clock.aside('checkpoint_save'):
        extra = {
            'source': loop.source.get_state(),
            'clock': loop.clock.get_state(),
            'metrics_position': loop.recorder.jsonl.position(),
            'phase': loop.recorder.phase,
        }
        loop.checkpointer.save(step, state.to_tree(), extra, must)
    _record_saves(loop, step)


def record(loop: Loop, metrics: dict[str, jax.Array], step: int) -> dict[str, float]:
    """Waits for the step and writes what it measured; the console shows the pair as one line."""
    values = {name: value.item() for name, value in jax.device_get(metrics).items()}
    progress = {f'data/{name}': value for name, value in loop.source.progress().items()}
    loop.recorder.write(step, 'perf', loop.clock.log(step) | progress)
    loop.recorder.write(step, 'train', {f'train/{name}': v for name, v in values.items()})
    _record_saves(loop, step)
    return values


def _record_saves(loop: Loop, step: int) -> None:
    """What became of earlier saves, which end in the background."""
    for values in loop.checkpointer.events():
        loop.recorder.write(step, 'event', values)


def _check_progress(step: int, updates: int, before: tuple[int, int]) -> tuple[int, int]:
    """(step, updates) when an update was last seen to be applied; none for long ends the run."""
    last_step, last_updates = before
    if updates > last_updates:
        return step, updates
    if step - last_step >= PATIENCE:
        raise NumericsError(
            f'no update could be applied from step {last_step} to {step}: the loss or the gradient '
            'was never finite; checkpoints before that are good'
        )
    return before

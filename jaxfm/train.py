"""The training loop. Pre-training, SFT, preference learning and RL share it.

They differ only in the source of their batches and in their objective. The order within a step is
deliberate: evaluate, then save a checkpoint, then take a batch and update. Evaluators see the
weights of step k before anything changes, and the checkpoint is saved before the source moves on.
So a run that resumes at step k continues exactly as the uninterrupted run did, without evaluating
step k again. Each phase ends like a run, evaluated and saved, so the next phase starts from a state
that is in storage.
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

PATIENCE = 20  # a run stops after at least this many skipped steps in a row, at a logged step


class Source(Protocol):
    """Where batches come from. A dataset ignores `params`; a rollout samples with them."""

    def next(self, params, step: int) -> dict[str, jax.Array]:
        """The next batch, on the devices. `params` must not be kept: the step donates them."""

    def get_state(self) -> dict[str, Any]:
        """The position after the last delivered batch, as JSON values."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at a position that `get_state` returned."""

    def progress(self) -> dict[str, float]:
        """{name: value} of what has been delivered, such as epochs; for the records."""


class Evaluator(Protocol):
    """Measures the weights at a cadence, for example held-out loss or scores of completions."""

    def is_due(self, step: int, last: int) -> bool:
        """Whether to run at this step of a phase that ends at step `last`."""

    def run(self, params, step: int) -> dict[str, float]:
        """Returns {name: value}. `params` must not be kept: the next step donates them."""


@dataclasses.dataclass
class Loop:
    """Everything the loop needs for one phase."""

    last: int  # the step of the run at which the phase ends
    train_step: Any  # jitted (state, batch) -> (state, metrics); donates the state
    source: Source
    evaluators: dict[str, Evaluator]
    checkpointer: Checkpointer
    recorder: Recorder
    log_every: int
    clock: StepClock
    preemption: Preemption
    tokens_per_step: int


def train(loop: Loop, state: TrainState, step: int, done: bool) -> TrainState:
    """Trains from `step` to the end of a phase and returns the state there, already saved.

    Args:
      done: whether the weights at `step` have been evaluated and saved already.

    Raises:
      Preempted: a signal asked the run to stop; the state has been saved.
      NumericsError: at a logged step, no update has been applied for PATIENCE steps or more.
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

        # Implicit transfers between host and device would stall a step, so they are errors here.
        with jax.transfer_guard('disallow'):
            with loop.clock.aside('data_wait'):
                batch = loop.source.next(state.params, step)
            with loop.clock.aside('compile') if step == first else contextlib.nullcontext():
                state, metrics = loop.train_step(state, batch)
        if step == first:
            log.info('compiled the step in %.1f s', loop.clock.seconds['compile'])
        step, done = step + 1, False
        loop.clock.step(loop.tokens_per_step)
        # Keep at most two steps in flight: more can abort on several CPU devices, and hide a hang.
        jax.block_until_ready(before)
        before = metrics
        if step % loop.log_every == 0 or step in (1, loop.last):
            values = record(loop, metrics, step)
            progress = _check_progress(step, step - values.get('skipped_steps', 0), progress)


def evaluate(loop: Loop, state: TrainState, step: int) -> None:
    """Runs the evaluators that are due at this step."""
    for name, evaluator in loop.evaluators.items():
        if evaluator.is_due(step, loop.last):
            with loop.clock.aside('eval'):
                values = evaluator.run(state.params, step)
            named = {f'eval/{name}/{key}': value for key, value in values.items()}
            loop.recorder.write(step, 'eval', named)


def save(loop: Loop, state: TrainState, step: int, must: bool) -> None:
    """Starts saving a checkpoint: train state, data position, clocks, and length of the metrics.

    Args:
      must: the loop ends here, so wait until the checkpoint is committed, and raise if it fails.
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
    """Waits for the step, writes its metrics, and returns them.

    The two records of a step are one line on the console.
    """
    values = {name: value.item() for name, value in jax.device_get(metrics).items()}
    progress = {f'data/{name}': value for name, value in loop.source.progress().items()}
    loop.recorder.write(step, 'perf', loop.clock.log(step) | progress)
    loop.recorder.write(step, 'train', {f'train/{name}': v for name, v in values.items()})
    _record_saves(loop, step)
    return values


def _record_saves(loop: Loop, step: int) -> None:
    """Records the outcome of earlier saves, which finish in the background."""
    for values in loop.checkpointer.events():
        loop.recorder.write(step, 'event', values)


def _check_progress(step: int, updates: int, before: tuple[int, int]) -> tuple[int, int]:
    """Returns (step, updates) as of the last applied update.

    Raises:
      NumericsError: no update has been applied for PATIENCE steps or more.
    """
    last_step, last_updates = before
    if updates > last_updates:
        return step, updates
    if step - last_step >= PATIENCE:
        raise NumericsError(
            f'no update could be applied from step {last_step} to {step}, because the loss or the '
            f'gradient was never finite; checkpoints up to step {last_step} are good'
        )
    return before

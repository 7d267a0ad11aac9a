"""The training loop. Pre-training, SFT, preference learning and RL share it.

They differ only in the source of their batches and in their objective. The order within a step is
deliberate: evaluate, then save a checkpoint, then take a batch and update. Evaluators see the
weights of step k before anything changes, and the checkpoint is saved before the source moves on.
So a run that resumes at step k continues exactly as the uninterrupted run did, without evaluating
step k again. Each phase ends like a run, evaluated and saved, so the next phase starts from a state
that is in storage.

A step whose loss or gradient is not finite applies no update, and nor does one whose loss is a
spike if the policy for spikes is `skip`. While the last step was such a step, nothing is saved,
because the weights may be ruined: a checkpoint that is due waits for the next update. If the policy
is `rewind`, a spike ends the loop with `Rewind` before anything of it is saved.
"""

import dataclasses
import logging
import math
from typing import Any, Protocol

import jax

from jaxfm.checkpoint.checkpointer import Checkpointer
from jaxfm.distributed.preemption import Preemption
from jaxfm.errors import NumericsError, Preempted, RunError
from jaxfm.metrics.clock import StepClock
from jaxfm.metrics.writers import Recorder
from jaxfm.optim.spikes import Rewind, Spike, Spikes
from jaxfm.state import TrainState

log = logging.getLogger('jaxfm')

PATIENCE = 20  # a run stops after this many skipped steps in a row


class Source(Protocol):
    """Where batches come from. A dataset ignores `params`; a rollout samples with them."""

    def prepare(self, params: dict | None) -> None:
        """Called before the first `next` of a process, and when the phase begins.

        params: the weights with which the phase begins, if it begins now; they must not be kept.
        """

    def next(self, params, step: int) -> dict[str, jax.Array]:
        """The next batch, on the devices. `params` must not be kept: the step donates them."""

    def get_state(self) -> dict[str, Any]:
        """The position after the last delivered batch, as JSON values."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at a position that `get_state` returned."""

    def progress(self) -> dict[str, float]:
        """{name of a metric: value} of what has been delivered, such as epochs; for the records."""

    @property
    def bucket(self) -> str:
        """What the time that `next` takes is charged to: data_wait, or generate."""

    @property
    def tokens(self) -> int:
        """Inputs of the last batch, over all hosts."""

    def close(self) -> None:
        """Ends what works ahead; `next` goes on after the last delivered batch."""


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
    train_step: Any  # jitted (state, batch, limit) -> (state, metrics); donates the state
    source: Source
    spikes: Spikes
    evaluators: dict[str, Evaluator]
    checkpointer: Checkpointer
    recorder: Recorder
    log_every: int
    clock: StepClock
    preemption: Preemption
    is_compiled: bool = False  # whether this process has compiled the step


def train(loop: Loop, state: TrainState, step: int, done: bool) -> TrainState:
    """Trains from `step` to the end of a phase and returns the state there, already saved.

    Args:
      done: whether the weights at `step` have been evaluated and saved already.

    Raises:
      Preempted: a signal asked the run to stop; the state has been saved, unless the last step was
        skipped.
      NumericsError: no update has been applied for PATIENCE steps, or at the end of the phase; or
        the loss has spiked after as many rewinds as are allowed.
      Rewind: the loss has spiked, and the caller must go back to before that.
      StorageError, LockedError: the run can no longer be saved.
    """
    metrics = None
    updates = Updates(step, int(state.counters['skipped']))
    due = None  # the step at which the next save was due
    while True:
        if not done:
            evaluate(loop, state, step)
        stopping = step < loop.last and loop.preemption.should_stop(step)
        leaving = stopping or step >= loop.last
        if not done and (leaving or due or loop.checkpointer.is_due(step)):
            due = due or step
            see(loop, updates, step, metrics)
            if updates.is_applied:
                save(loop, state, step, due, must=leaving)
                due = None
            elif leaving:
                raise _stop_unsaved(loop, updates) if stopping else _give_up(loop, updates)
        if stopping:
            raise Preempted(f'stopped by a signal and saved at step {step}; run it again to resume')
        if leaving:
            return state
        if updates.missing >= PATIENCE:
            raise _give_up(loop, updates)

        # Implicit transfers between host and device would stall a step, so they are errors here.
        with jax.transfer_guard('disallow'):
            if loop.source.bucket == 'generate':  # it reads the weights, so their step must end
                jax.block_until_ready(state.params)
            with loop.clock.aside(loop.source.bucket):
                batch = loop.source.next(state.params, step)
            limit = loop.spikes.begin(step + 1, loop.source.get_state())
            before = metrics
            if loop.is_compiled:
                state, metrics = loop.train_step(state, batch, limit)
            else:
                state, metrics = compile_step(loop, state, batch, limit)
        step, done = step + 1, False
        loop.clock.step(loop.source.tokens)
        # Keep at most two steps in flight: more can abort on several CPU devices, and hide a hang.
        jax.block_until_ready(before)
        see(loop, updates, step - 1, before)
        if step % loop.log_every == 0 or step in (1, loop.last):
            see(loop, updates, step, metrics)
            record(loop, metrics, step)


def compile_step(loop: Loop, *arguments):
    """The first step of this process, which compiles it; tells how long that took."""
    before = loop.clock.seconds['compile']  # with that of earlier processes
    with loop.clock.aside('compile'):
        result = loop.train_step(*arguments)
    log.info('compiled the step in %.1f s', loop.clock.seconds['compile'] - before)
    loop.is_compiled = True
    return result


def evaluate(loop: Loop, state: TrainState, step: int) -> None:
    """Runs the evaluators that are due at this step."""
    for name, evaluator in loop.evaluators.items():
        if evaluator.is_due(step, loop.last):
            with loop.clock.aside('eval'):
                values = evaluator.run(state.params, step)
            named = {f'eval/{name}/{key}': value for key, value in values.items()}
            loop.recorder.write(step, 'eval', named)


class Updates:
    """Which steps applied an update, and which were skipped.

    Attributes:
      first: the step at which this process began.
      step: the last step that was seen.
      last: the step after the last applied update, at least `first`.
      is_finite: whether loss and gradient have been finite in every step since `last`.
    """

    def __init__(self, step: int, skipped: int):
        self.first = self.last = self.step = step
        self._skipped, self.is_finite = skipped, True

    def add(self, step: int, skipped: int, is_finite: bool) -> None:
        """Notes the next step. skipped: how many steps of the phase were skipped so far."""
        if skipped == self._skipped:
            self.last, self.is_finite = step, True
        self.step, self._skipped = step, skipped
        self.is_finite &= is_finite

    @property
    def is_applied(self) -> bool:
        """Whether the last step applied an update."""
        return self.last == self.step

    @property
    def missing(self) -> int:
        """How many steps in a row were skipped."""
        return self.step - self.last

    def __str__(self) -> str:
        return f'no update could be applied from step {self.last} to {self.step}'


def see(loop: Loop, updates: Updates, step: int, metrics: dict[str, jax.Array] | None) -> None:
    """Waits for a step, and judges its loss.

    Steps must be seen in order; seeing one twice is harmless. metrics: None before the first step.

    Raises:
      Rewind: its loss is a spike, and the policy is to go back.
    """
    if step <= updates.step:
        return
    names = ('loss', 'grad_norm', 'skipped_steps')
    loss, norm, skipped = (metrics[name].item() for name in names)
    is_finite = math.isfinite(loss) and math.isfinite(norm)
    updates.add(step, skipped, is_finite)
    if spike := loop.spikes.judge(step, loss, is_finite, updates.is_applied):
        loop.recorder.write(step, 'event', spike.values(loop.spikes.config.policy))
        if loop.spikes.config.policy == 'rewind':
            raise _go_back(loop, spike)


def _go_back(loop: Loop, spike: Spike) -> Rewind | NumericsError:
    """The error for a spike from which the run must go back, if it may do so once more."""
    # The update of the step before it may have ruined the weights, which may be saved already.
    told = _set_aside(loop, spike.last_good)
    _record_saves(loop, spike.step)
    if loop.spikes.rewinds < loop.spikes.config.max_rewinds:
        if told:
            log.warning('the loss of step %d is a spike%s', spike.step, told)
        return Rewind(spike)
    return NumericsError(
        f'the loss of step {spike.step}, {spike.loss:.4g}, is a spike, and this phase has gone '
        f'back {loop.spikes.rewinds} times (spikes.max_rewinds of its optimizer){told}; '
        f'{_how_to_go_on(loop)}'
    )


def _stop_unsaved(loop: Loop, updates: Updates) -> Preempted:
    """The error for a run that a signal stops after a skipped step."""
    loop.checkpointer.wait()
    _record_saves(loop, updates.step)
    return Preempted(
        f'stopped by a signal at step {updates.step} and not saved, because {updates}; '
        f'run it again to {_name_next_start(loop)}'
    )


def _give_up(loop: Loop, updates: Updates) -> NumericsError:
    """The error for a run that can apply no update.

    If the last update may have ruined the weights, checkpoints since the last good one are set
    aside, unless no other is left. That is so after PATIENCE steps, or if this process applied no
    update at all, because then the next one would not either.
    """
    reason, change = 'the loss or the gradient was not finite', ''
    if updates.is_finite:
        reason = 'the loss was above the limit for spikes'
        change = ', or set spikes.policy=warn,'
    is_ruined = updates.missing >= PATIENCE or updates.last == updates.first
    # At the beginning of a phase there is no good update yet.
    told = _set_aside(loop, (loop.spikes.last_good or updates.last) if is_ruined else 0)
    _record_saves(loop, updates.step)
    return NumericsError(f'{updates}, because {reason}{told}; {_how_to_go_on(loop, change)}')


def _set_aside(loop: Loop, first: int) -> str:
    """Sets aside the checkpoints from step `first` on, unless no other is left -> what it did.

    Their weights may be ruined: no good update has followed.
    """
    try:
        loop.checkpointer.wait()
        if not any(step < first for step in loop.checkpointer.restorable_steps()):
            return ''
        steps = loop.checkpointer.set_aside(first, are_ruined=True)
    except RunError as error:
        return f'; checkpoints from step {first} on could not be set aside: {error}'
    return ''.join(f'; checkpoint {step} is set aside' for step in steps)


def _how_to_go_on(loop: Loop, change: str = '') -> str:
    """What to change, because the same command comes to the same end.

    change: another remedy than the learning rate.
    """
    try:
        earlier = loop.checkpointer.restorable_steps()[:-1]
    except RunError:
        earlier = []
    further = f', if need be from an earlier step (--resume_step={earlier[-1]})' if earlier else ''
    return (
        f'lower the learning rate{change} with --allow_change=optimizer{further}; '
        f'run it again to {_name_next_start(loop)}'
    )


def _name_next_start(loop: Loop) -> str:
    try:
        newest = loop.checkpointer.latest_step()
    except RunError:
        return 'resume at the newest checkpoint'
    return 'start over' if newest is None else f'resume at step {newest}'


def save(loop: Loop, state: TrainState, step: int, due: int, must: bool) -> None:
    """Starts saving a checkpoint: train state, data position, clocks, and length of the metrics.

    Args:
      due: the step since which it has been due.
      must: the loop ends here, so wait until the checkpoint is committed, and raise if it fails.
    """
    with loop.clock.aside('checkpoint_save'):
        extra = {
            'source': loop.source.get_state(),
            'clock': loop.clock.get_state(),
            'metrics_position': loop.recorder.jsonl.position(),
            'phase': loop.recorder.phase,
            'spikes': loop.spikes.get_state(),
        }
        last_good = loop.spikes.last_good
        loop.checkpointer.save(step, state.to_tree(), extra, must, due, last_good)
    _record_saves(loop, step)


def record(loop: Loop, metrics: dict[str, jax.Array], step: int) -> None:
    """Waits for the step and writes its metrics.

    The two records of a step are one line on the console.
    """
    values = {name: value.item() for name, value in jax.device_get(metrics).items()}
    values['spikes'] = loop.spikes.count
    loop.recorder.write(step, 'perf', loop.clock.log(step) | loop.source.progress())
    loop.recorder.write(step, 'train', {f'train/{name}': v for name, v in values.items()})
    _record_saves(loop, step)


def _record_saves(loop: Loop, step: int) -> None:
    """Records the outcome of earlier saves, which finish in the background."""
    for values in loop.checkpointer.events():
        loop.recorder.write(step, 'event', values)

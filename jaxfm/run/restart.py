"""Resuming a run from a complete checkpoint: train state, data position and clocks.

That is the newest one, unless the user goes back to an earlier one.

Nothing is written until every check has passed.
"""

import dataclasses
import logging

import jax

from jaxfm.checkpoint.checkpointer import Checkpointer
from jaxfm.config.load import make_config
from jaxfm.config.resume import Change, check_resume
from jaxfm.data.loader import Batches
from jaxfm.distributed import agree
from jaxfm.errors import ConfigError, DataError
from jaxfm.metrics.clock import StepClock
from jaxfm.metrics.writers import read_records
from jaxfm.optim.spikes import Spike, Spikes
from jaxfm.run.phase import Phase
from jaxfm.run.run import Run
from jaxfm.run.weights import base_loader
from jaxfm.state import TrainState

log = logging.getLogger('jaxfm')


def find_end(run: Run, allowed: list[str], at: int | None = None) -> tuple[bool, list[Change]]:
    """Returns whether the run is finished, and how its config differs from the checkpoint's.

    It changes nothing. It compares the configs only if the work directory is new, because then only
    the checkpoint holds the earlier config; otherwise the differences are [].

    Args:
      allowed: groups of the config that may differ from the checkpoint's.
      at: the step to resume at; None is the newest.

    Raises:
      ConfigError: the checkpoints belong to a run with another config, or the run ends at `at`.
      DataError: the run has saved checkpoints, but none is left; or that of step `at` is damaged.
      MissingInputError: there is no checkpoint of step `at`.
    """
    checkpoints, changes = run.reader(), []
    newest = checkpoints.newest_whole(lambda step: (step, checkpoints.read_manifest(step)), at)
    if newest is None:
        agree.from_primary(lambda: _check_never_saved(run, checkpoints.root))
        return False, changes
    step, manifest = newest
    if not run.has_begun:
        root = checkpoints.root
        config = make_config(manifest['config'], f'the run in {root}')
        changes = check_resume(config, run.config, allowed, root, '--config.checkpoint.directory')
    if step < run.config.total_steps:
        return False, changes
    if at is not None:
        raise ConfigError(f'--resume_step={at} is the end of the run; {_how_to_go_on(run.config)}')
    log.warning('%s is finished at step %d; %s', run.workdir, step, _how_to_go_on(run.config))
    return True, changes


@dataclasses.dataclass(frozen=True)
class Restart:
    """Brings the parts of a run back to a checkpoint.

    Attributes:
      wanted: the shapes and shardings of each phase's state.
      sources, spikes: those of each phase.
    """

    run: Run
    checkpointer: Checkpointer
    wanted: list[TrainState]
    sources: list[Batches]
    spikes: list[Spikes]
    clock: StepClock

    def restore(
        self, allowed: list[str], at: int | None = None
    ) -> tuple[TrainState, int, int] | None:
        """Restores the newest complete checkpoint: (state, step, length of its metrics) or None.

        Also resets the clock, and the source and the spikes of its phase, to the checkpoint.

        Args:
          allowed: groups of the config that the user allowed to change.
          at: the step to restore instead of the newest.
        """
        may_change = bool({'data', 'phases', 'tokenizer', 'code'} & set(allowed))

        def restore_step(step: int):
            index, state, extra = self._read(step)
            _set_position(self.sources[index], extra['source'], may_change)
            self.spikes[index].set_state(extra.get('spikes'))
            self.clock.set_state(extra['clock'])
            return state, step, extra['metrics_position']

        return self.checkpointer.newest_whole(restore_step, at)

    def rewind(self, spike: Spike) -> tuple[TrainState, int, int] | None:
        """Restores the newest checkpoint before a spike, as `restore` does, but the data goes on.

        None if nothing has been saved: the run must begin anew, with the data after the spike.
        There is no checkpoint after the spike, because the loop judges a step before it saves it,
        and it has set aside those that no good step has followed. Nothing else is written: a run
        that is killed before its next checkpoint comes to the same spike again.
        """
        current = self.run.phases.index(self.run.phase_at(spike.step))

        def restore_step(step: int):
            index, state, extra = self._read(step)
            if index != current:  # the phase before, which has ended
                self.sources[index].set_state(extra['source'])
                self.spikes[index].set_state(extra.get('spikes'))
            losses = extra.get('spikes') if index == current else None
            return (state, step, extra['metrics_position']), losses, extra['clock']

        found = self.checkpointer.newest_whole(restore_step)
        restored, losses, seconds = found or (None, None, None)
        self.spikes[current].go_back(losses)
        self.clock.go_back(seconds)
        self.sources[current].set_state(spike.position)
        return restored

    def _read(self, step: int) -> tuple[int, TrainState, dict]:
        """Reads a checkpoint -> (index of its phase, the state, the values stored with it).

        Raises:
          ConfigError: it belongs to another phase, or the phase began at another step.
        """
        run, checkpointer = self.run, self.checkpointer
        phase = run.phase_at(step)
        index = run.phases.index(phase)
        wanted = self.wanted[index]
        with self.clock.aside('checkpoint_restore'):
            manifest = checkpointer.read_manifest(step)
            if manifest['extra']['phase'] != phase.name:
                raise ConfigError(
                    f'checkpoint {step} is from phase {manifest["extra"]["phase"]}, which ends '
                    'before that step in this config: the steps of phases that have ended cannot '
                    'change'
                )
            tree, extra = checkpointer.restore(step, wanted.to_tree(), base_loader(run))
            if run.base.names and 'base' not in manifest:
                log.info('checkpoints go on holding the frozen weights, as those before do')
                run.base.names = frozenset()
            _check_first(int(jax.device_get(tree['step'])), step, phase)
        return index, wanted.with_tree(tree), extra


def _check_never_saved(run: Run, root: str) -> None:
    """Raises DataError if saved checkpoints are gone, instead of silently starting at step 0."""
    records = read_records(run.workdir / 'metrics.jsonl')
    saved = [record['checkpoint/step'] for record in records if 'checkpoint/step' in record]
    if saved:
        raise DataError(
            f'{root} holds no checkpoint, although this run saved step {saved[-1]} there; '
            f'to start over remove {run.workdir} or give another --workdir'
        )


def _set_position(source: Batches, position: dict, may_change: bool) -> None:
    """Moves the source to a position. If that is of other data, starts at the first row.

    Raises:
      ConfigError: the position is of other data, and `may_change` is false.
    """
    try:
        source.set_state(position)
    except ConfigError:
        if not may_change:
            raise
        log.warning("the data differs from the checkpoint's, so it is read from its first row")


def _check_first(steps: int, step: int, phase: Phase) -> None:
    """Raises ConfigError unless the phase begins at the same step as when `step` was saved.

    steps: how many steps of the phase the checkpoint holds.
    """
    if steps != step - phase.first:
        raise ConfigError(
            f'checkpoint {step} is {steps} steps into phase {phase.name}, which begins at step '
            f'{phase.first} in this config: the steps of phases that have ended cannot change'
        )


def _how_to_go_on(config) -> str:
    name, steps, group = 'steps', config.steps, 'steps'
    if config.phases:
        name, steps = f'phases[{len(config.phases) - 1}].steps', config.phases[-1].steps
        group = 'phases'
    return (
        f'to train longer give --config.{name}={2 * steps} --allow_change={group}; '
        'to start a new run give another --workdir'
    )

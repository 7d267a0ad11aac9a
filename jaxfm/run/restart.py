"""Going on where a run stopped: its newest whole checkpoint, the position in its data, its clocks.

Nothing is written before everything that can be wrong has been looked at.
"""

import logging

import jax

from jaxfm.checkpoint.checkpointer import Checkpointer
from jaxfm.config.load import make_config
from jaxfm.config.resume import Change, check_resume
from jaxfm.distributed import agree
from jaxfm.errors import ConfigError, DataError
from jaxfm.metrics.clock import StepClock
from jaxfm.metrics.writers import read_records
from jaxfm.prefetch import Prefetch
from jaxfm.run.phase import Phase
from jaxfm.run.run import Run
from jaxfm.state import TrainState

log = logging.getLogger('jaxfm')


def find_end(run: Run, allowed: list[str]) -> tuple[bool, list[Change]]:
    """Whether the newest checkpoint is the end of the run, and what differs in its config.

    The second is empty unless the checkpoints alone know which run they are of: the work directory
    is new. A look that changes nothing.

    Args:
      allowed: groups of the config that may differ from those of the checkpoint.

    Raises:
      ConfigError: the checkpoints are of a run of another config.
      DataError: the run has saved something, and nothing is there any more.
    """
    checkpoints, changes = run.reader(), []
    newest = checkpoints.newest_whole(lambda step: (step, checkpoints.read_manifest(step)))
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
    log.warning('%s is finished at step %d; %s', run.workdir, step, _how_to_go_on(run.config))
    return True, changes


def restore_newest(
    run: Run,
    checkpointer: Checkpointer,
    wanted: list[TrainState],
    sources: list[Prefetch],
    clock: StepClock,
    allowed: list[str],
) -> tuple[TrainState, int, int] | None:
    """The state of the newest whole checkpoint, its step and the end of its metrics, if any.

    Source and clock of its phase are set to what they were.

    Args:
      wanted: shapes and shardings of the state, phase by phase, as the sources are.
    """
    may_change = bool({'data', 'phases', 'tokenizer', 'code'} & set(allowed))

    def restore(step: int):
        index = run.phases.index(run.phase_at(step))
        state, extra = _restore(checkpointer, step, run.phases[index], wanted[index], clock)
        _set_position(sources[index], extra['source'], may_change)
        clock.set_state(extra['clock'])
        return state, step, extra['metrics_position']

    return checkpointer.newest_whole(restore)


def _check_never_saved(run: Run, root: str) -> None:
    """Raises DataError when checkpoints are gone: no reason to begin at step 0 without a word."""
    records = read_records(run.workdir / 'metrics.jsonl')
    saved = [record['checkpoint/step'] for record in records if 'checkpoint/step' in record]
    if saved:
        raise DataError(
            f'{root} holds no checkpoint, but this run has saved step {saved[-1]} there; '
            f'to begin anew remove {run.workdir} or give another --workdir'
        )


def _restore(checkpointer, step: int, phase: Phase, wanted: TrainState, clock):
    """The state of a step, which has to be of this phase, and its extra."""
    with clock.aside('checkpoint_restore'):
        extra = checkpointer.read_manifest(step)['extra']
        if extra['phase'] != phase.name:
            raise ConfigError(
                f'checkpoint {step} is of phase {extra["phase"]}, which in this config is over by '
                'then: the steps of phases that have ended cannot change'
            )
        tree, extra = checkpointer.restore(step, wanted.to_tree())
        _check_first(int(jax.device_get(tree['step'])), step, phase)
    return wanted.with_tree(tree), extra


def _set_position(source: Prefetch, position: dict, may_change: bool) -> None:
    """may_change: data that is not that of the checkpoint begins at its first row."""
    try:
        source.set_state(position)
    except ConfigError:
        if not may_change:
            raise
        log.warning('the data is not that of the checkpoint: it is read from its first row on')


def _check_first(steps: int, step: int, phase: Phase) -> None:
    """Raises unless the phase of a checkpoint with so many steps behind it begins where it did."""
    if steps != step - phase.first:
        raise ConfigError(
            f'checkpoint {step} is {steps} steps into {phase.name}, which in this config begins at '
            f'step {phase.first}: the steps of phases that have ended cannot change'
        )


def _how_to_go_on(config) -> str:
    name, steps, group = 'steps', config.steps, 'steps'
    if config.phases:
        name, steps = f'phases[{len(config.phases) - 1}].steps', config.phases[-1].steps
        group = 'phases'
    return (
        f'to train on give --config.{name}={2 * steps} --allow_change={group}, '
        'for a new run another --workdir'
    )

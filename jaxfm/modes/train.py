"""--mode train: phase after phase, from the newest checkpoint if there is one.

Nothing is written before everything that can be wrong has been looked at: config, mesh, data, the
fit of model and mesh, the room for checkpoints.
"""

import contextlib
import logging
from pathlib import Path

import jax

from jaxfm import distributed, sharding
from jaxfm.checkpoint.checkpointer import Checkpointer
from jaxfm.config import load as configs
from jaxfm.config import resume
from jaxfm.config.run import RunConfig
from jaxfm.errors import ConfigError, DataError, RunError
from jaxfm.metrics import goodput
from jaxfm.metrics.clock import StepClock, process_start
from jaxfm.metrics.console import Console
from jaxfm.metrics.devices import peak_flops
from jaxfm.metrics.writers import JsonlWriter, Recorder, read_records
from jaxfm.models.transformer import compute_dtype
from jaxfm.modes.generation import requests_for, write_samples
from jaxfm.modes.output import explained
from jaxfm.plan import plan
from jaxfm.prefetch import Prefetch
from jaxfm.report.page import write_report
from jaxfm.run.phase import Phase
from jaxfm.run.run import Run, started
from jaxfm.sampling.request import Request
from jaxfm.state import TrainState
from jaxfm.storage.base import S3
from jaxfm.train import Loop
from jaxfm.train import train as run_loop

log = logging.getLogger('jaxfm')


def train(flags, config: RunConfig) -> int:
    """Trains to the end, phase after phase, from the newest checkpoint if there is one."""
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(started(flags, config))
        preemption = stack.enter_context(distributed.Preemption())
        console = Console(config.total_steps, enabled=run.primary)
        stack.callback(console.close)
        run.open_data()
        wanted = [phase.abstract_state() for phase in run.phases]
        sharding.check_replication(wanted[0].to_tree(), run.mesh)
        if _is_finished(run, flags):
            return 0
        checkpointer = _open_checkpoints(run, wanted, stack)
        sources = [_prefetch(phase, stack) for phase in run.phases]
        clock = StepClock(config.total_steps, _peak_flops(config), started=process_start())
        sampler = run.sampler(params=None)
        evaluators = run.evaluators(sampler, write=run.primary) | run.exports()
        prompts, requests = _last_samples(config, run.tokenizer)
        for request in requests:
            sampler.check(request)
        restored = _resume(run, checkpointer, wanted, sources, clock, flags)
        state, step, position = restored or (run.initial_state(), None, 0)
        current = run.phases.index(run.phase_at(step or 0))
        # Only now is anything of an earlier run in this directory changed.
        recorder = _open_records(run, console, stack, is_new=step is None)
        if run.primary:
            _cut_records(recorder.jsonl, clock, position, step or 0)
        for change in flags.changes:
            log.warning('config.%s: %s -> %s', *change)
        log.info('work directory: %s', run.workdir)
        if step is not None:
            log.info('resumed at step %d', step)
        console.show_tables(plan.tables(config, run.phases, run.mesh, wanted[0]))
        console.show_parameters(plan.parameter_rows(run.phases, run.mesh))
        loops = [
            Loop(
                last=phase.last,
                train_step=phase.train_step(),
                source=source,
                evaluators=evaluators,
                checkpointer=checkpointer,
                recorder=recorder,
                log_every=config.metrics.log_every,
                clock=clock,
                preemption=preemption,
                tokens_per_step=phase.tokens_per_step,
            )
            for phase, source in zip(run.phases, sources)
        ]
        state = _run_phases(run, loops, current, state, step)
        sampler.params = state.params
        path = run.workdir / 'samples' / 'final.jsonl'
        write_samples(run, sampler, run.tokenizer, prompts, requests, path)
        recorder.write(config.total_steps, 'event', clock.log(config.total_steps))
        _record_contamination(recorder, run, evaluators)
        _report(run)
    return 0


def _run_phases(
    run: Run, loops: list[Loop], current: int, state: TrainState, step: int | None
) -> TrainState:
    """One phase after the other, from step `step` of the current one; None is a new run."""
    for index in range(current, len(run.phases)):
        phase, loop = run.phases[index], loops[index]
        is_resumed = index == current and step is not None
        if index > current:
            state = phase.begin(state.params, before=state)
        loop.recorder.phase = phase.name
        if not is_resumed:
            _record_data(loop.recorder, phase)
        loop.clock.flops_per_step = phase.flops_per_step(run.config.model)
        start = step if is_resumed else phase.first
        # Told at once, or what is wasted would be forgotten when this process dies early, too.
        loop.recorder.write(start, 'perf', loop.clock.log(start))
        with loop.clock.training():
            # The first weights of a later phase were evaluated and saved by the one before it.
            state = run_loop(loop, state, start, done=is_resumed or index > 0)
        loop.source.close()
    return state


def _is_finished(run: Run, flags) -> bool:
    """Whether the checkpoints there are of this run and at its end; a look that changes nothing.

    Raises:
      DataError: the run has saved something, and nothing is there any more.
    """
    checkpoints = run.reader()
    newest = checkpoints.newest_whole(lambda step: (step, checkpoints.read_manifest(step)))
    if newest is None:
        distributed.from_primary(lambda: _check_never_saved(run, checkpoints.root))
        return False
    step, manifest = newest
    if not run.has_begun:
        _check_config(run, manifest['config'], checkpoints.root, flags)
    if step < run.config.total_steps:
        return False
    log.warning('%s is finished at step %d; %s', run.workdir, step, _how_to_go_on(run.config))
    if not (run.workdir / 'report.html').exists():
        _report(run)
    return True


def _check_never_saved(run: Run, root: str) -> None:
    """Checkpoints that are gone are no reason to begin at step 0 without a word."""
    records = read_records(run.workdir / 'metrics.jsonl')
    saved = [record['checkpoint/step'] for record in records if 'checkpoint/step' in record]
    if saved:
        raise DataError(
            f'{root} holds no checkpoint, but this run has saved step {saved[-1]} there; '
            f'to begin anew remove {run.workdir} or give another --workdir'
        )


def _check_config(run: Run, saved: dict, root: str, flags) -> None:
    """In a new work directory the checkpoints alone know which run they are of."""
    config = configs.from_json(saved, f'the run in {root}')
    flags.changes = resume.check_resume(config, run.config, flags.allow_change, root)


def _open_checkpoints(run: Run, wanted: list[TrainState], stack) -> Checkpointer:
    """The run's checkpoints, when there is room for them.

    Of a run that is refused, then or later but before its first file, nothing is left.
    """
    places = [run.workdir]
    if not run.config.checkpoint.directory.startswith(S3):
        places.insert(0, Path(run.config.checkpoint.directory or run.workdir / 'checkpoints'))
    known = dict.fromkeys(one for place in places for one in (place, *place.parents))
    created = [one for one in known if not one.exists()]

    def remove_what_is_empty(kind, error, traceback) -> bool:
        for directory in created if isinstance(error, RunError) else ():
            with contextlib.suppress(OSError):  # another process has removed it, or it is not empty
                directory.rmdir()
        return False

    stack.push(remove_what_is_empty)
    checkpointer = run.checkpointer()
    stack.callback(checkpointer.close)
    checkpointer.check_room(max(map(plan.bytes_total, wanted)))
    return checkpointer


def _open_records(run: Run, console: Console, stack, is_new: bool) -> Recorder:
    """The work directory's files: config, tokenizer, log, metrics."""
    if run.primary:
        with explained(run.workdir):
            run.workdir.mkdir(parents=True, exist_ok=True)
        configs.write_inherited(run.config, run.workdir)
        configs.write(run.config, run.workdir / 'config.json')
        # A checkpoint belongs to the tokenizer it was trained with.
        if is_new or not (run.workdir / 'tokenizer').exists():
            with explained(run.workdir / 'tokenizer') as path:
                run.tokenizer.save(path)
    console.log_to(run.workdir / 'log.txt')
    jsonl = JsonlWriter(run.workdir / 'metrics.jsonl', enabled=run.primary)
    recorder = Recorder(jsonl, console, enabled=run.primary)
    stack.callback(recorder.close)
    stack.push(_log_refusal)
    return recorder


def _cut_records(jsonl: JsonlWriter, clock: StepClock, position: int, step: int) -> None:
    """Cuts the metrics back to the checkpoint of a step; what they tell of after it is lost."""
    end = jsonl.end_of(step, position)
    lost = clock.waste(goodput.last_elapsed(jsonl.path, end))
    if lost > 1:
        log.warning(
            '%.0f s of work after step %d were lost with the process before this one', lost, step
        )
    jsonl.truncate(end)


def _log_refusal(kind, error, traceback) -> bool:
    """The reason of a stop goes to the log; main shows it on the screen."""
    if isinstance(error, RunError):
        log.error('%s', error, extra={'shown': True})
    return False


def _report(run: Run) -> None:
    """The page about a run, which must not fail after all the work."""
    if not run.primary:
        return
    try:
        log.info('report: %s', write_report(run.workdir))
    except OSError as error:
        log.warning('the report could not be written: %s', error)


def _prefetch(phase: Phase, stack) -> Prefetch:
    source = Prefetch(phase.batches(), phase.mesh, phase.config.data.batch_size)
    stack.callback(source.close)
    return source


def _peak_flops(config) -> float | None:
    """Of all devices together, in the dtype that the model computes in; None if it is not known.

    With float8 matmuls too: MFU stays comparable, and shows what they gain.
    """
    peak = peak_flops(jax.devices()[0].device_kind, compute_dtype(config.model).name)
    return peak and peak * jax.device_count()


def _record_data(recorder: Recorder, phase: Phase) -> None:
    """What the phase reads, for the report."""
    statistics = phase.dataset.statistics
    recorder.write(phase.first, 'event', {f'data/{name}': v for name, v in statistics.items()})


def _record_contamination(recorder: Recorder, run: Run, evaluators: dict) -> None:
    """Which share of the prompts of sampling-based evaluations stands in what was trained on."""
    for phase in run.phases if run.primary else ():
        recorder.phase = phase.name
        for name, evaluator in evaluators.items():
            found = evaluator.contamination(phase.dataset)
            values = {f'data/contamination/{name}/{key}': value for key, value in found.items()}
            if values:
                recorder.write(run.config.total_steps, 'event', values)


def _resume(
    run: Run, checkpointer: Checkpointer, wanted, sources, clock, flags
) -> tuple[TrainState, int, int] | None:
    """The state of the newest whole checkpoint, its step and the end of its metrics, if any."""
    may_change = bool({'data', 'phases', 'tokenizer'} & set(flags.allow_change))

    def restore(step: int):
        index = run.phases.index(run.phase_at(step))
        state, extra = _restore(checkpointer, step, run.phases[index], wanted[index], clock)
        _set_position(sources[index], extra['source'], may_change)
        clock.set_state(extra['clock'])
        return state, step, extra['metrics_position']

    return checkpointer.newest_whole(restore)


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


def _set_position(source, position: dict, may_change: bool) -> None:
    """may_change: data that is not that of the checkpoint begins at its first row."""
    try:
        source.set_state(position)
    except ConfigError:
        if not may_change:
            raise
        log.warning('the data is not that of the checkpoint: it is read from its first row on')


def _check_first(steps: int, step: int, phase: Phase) -> None:
    """The phase of a checkpoint with so many steps behind it still begins where it began."""
    if steps != step - phase.first:
        raise ConfigError(
            f'checkpoint {step} is {steps} steps into {phase.name}, which in this config begins at '
            f'step {phase.first}: the steps of phases that have ended cannot change'
        )


def _last_samples(config, tokenizer) -> tuple[list[str], list[Request]]:
    """The samples at the end of a training run: prompts, and requests to continue them."""
    sampling = config.sampling
    known = list(sampling.prompts) or ['']
    prompts = [known[index % len(known)] for index in range(sampling.num_samples)]
    return prompts, requests_for(config, tokenizer, prompts)


def _how_to_go_on(config) -> str:
    name, steps, group = 'steps', config.steps, 'steps'
    if config.phases:
        name, steps = f'phases[{len(config.phases) - 1}].steps', config.phases[-1].steps
        group = 'phases'
    return (
        f'to train on give --config.{name}={2 * steps} --allow_change={group}, '
        'for a new run another --workdir'
    )

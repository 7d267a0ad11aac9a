"""--mode train: trains phase after phase, from the newest checkpoint or that of --resume_step.

Nothing is written until every check has passed: config, mesh, data, whether the model fits the
mesh, and space for checkpoints.
"""

import contextlib
import functools
import logging

import jax

from jaxfm.config.resume import Change
from jaxfm.config.run import RunConfig
from jaxfm.distributed.preemption import Preemption
from jaxfm.errors import Preempted
from jaxfm.evals import TaskEvaluatorConfig, contamination
from jaxfm.metrics.clock import StepClock, process_start
from jaxfm.metrics.console import Console
from jaxfm.metrics.devices import peak_flops
from jaxfm.metrics.writers import Recorder
from jaxfm.models.transformer import compute_dtype
from jaxfm.modes.generation import (
    Completions,
    describe_failures,
    requests_for,
    write_samples,
)
from jaxfm.optim.spikes import Rewind, Spike
from jaxfm.plan.tables import parameter_rows, summary, tables
from jaxfm.run import restart, workdir
from jaxfm.run.data import RunData, open_data
from jaxfm.run.other_model import load_teacher, open_reference, open_teachers
from jaxfm.run.phase import Phase
from jaxfm.run.run import Run, start_run
from jaxfm.run.weights import first_weights, initial_state, periodic_exports
from jaxfm.sampling.complete import complete
from jaxfm.sampling.request import Request
from jaxfm.state import TrainState, check_replication
from jaxfm.train import Loop, Source, train

log = logging.getLogger('jaxfm')


def run_training(flags, config: RunConfig, changes: list[Change]) -> int:
    """Trains to the end, phase after phase, from a checkpoint if there is one.

    changes: how the config differs from that of the work directory's earlier run, for the log.
    """
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(start_run(config, flags.workdir))
        preemption = stack.enter_context(Preemption())
        console = Console(config.total_steps, enabled=run.primary)
        stack.callback(console.close)
        wanted = [phase.abstract_state() for phase in run.phases]
        check_replication(wanted[0], run.parts, run.mesh)
        is_finished, changes_of_saved = restart.find_end(run, flags.allow_change, flags.resume_step)
        if is_finished:
            open_data(config, run.workdir)  # mistakes in it are told all the same
            if not (run.workdir / 'report.html').exists():
                workdir.report(run)
            return 0
        checkpointer = workdir.open_checkpoints(run, wanted, flags.resume_step, stack)
        data = open_data(config, run.workdir)  # tokenises it if need be, which may take hours
        open_teachers(run, data.tokenizer)
        sources = [_open_source(run, phase, data, stack) for phase in run.phases]
        clock = StepClock(config.total_steps, _peak_flops(config), started=process_start())
        sampler = run.sampler(data.tokenizer)
        evaluators = run.evaluators(data, sampler, run.workdir / 'samples' if run.primary else None)
        evaluators |= periodic_exports(run, data.tokenizer)
        prompts, requests = _last_samples(config, data.tokenizer)
        for request in requests:
            sampler.check(request)
        spikes = [phase.spikes() for phase in run.phases]
        back = restart.Restart(run, checkpointer, wanted, sources, spikes, clock)
        restored = back.restore(flags.allow_change, flags.resume_step)
        state, step, position = restored or (initial_state(run), None, 0)
        _prepare(run, sources, state, step)
        # All checks have passed. From here on, files of an earlier run in this directory change.
        recorder = workdir.open_records(run, data.tokenizer, console, stack, is_new=step is None)
        if flags.resume_step is not None:
            workdir.go_back(checkpointer, recorder.jsonl, step)
        if run.primary:
            workdir.cut_records(recorder.jsonl, clock, position, step or 0)
        for change in changes_of_saved or changes:
            log.warning('config.%s: %s -> %s', *change)
        told = data.datasets | {
            phase.name: source for phase, source in zip(run.phases, sources) if phase.is_rollout
        }
        about = (config, run.phases, told, run.mesh, wanted[0])
        console.show_summary(summary(*about, run.workdir))
        console.log_tables(tables(*about))
        console.log_parameters(parameter_rows(run.phases, run.mesh))
        if step is not None:
            log.info('resumed at step %d', step)
        loops = [
            Loop(
                last=phase.last,
                source=source,
                spikes=judge,
                **_programs(phase, source, evaluators),
                checkpointer=checkpointer,
                recorder=recorder,
                log_every=config.metrics.log_every,
                clock=clock,
                preemption=preemption,
            )
            for phase, source, judge in zip(run.phases, sources, spikes)
        ]
        while True:
            try:
                state = _run_phases(run, told, loops, state, step)
                break
            except Rewind as error:
                spike = error.spike
            # Here the loop has let go of its state: there may be no room for two.
            state, step = _go_back(spike, recorder, back)
        if preemption.should_stop(config.total_steps):
            raise Preempted(
                f'stopped by a signal after the last step ({config.total_steps}), which is saved; '
                '--mode sample shows what the model writes'
            )
        preemption.restore()  # everything is saved: Ctrl-C may end what follows
        console.stop_bar()
        completions = complete(sampler, requests, state.params, config.total_steps)
        _show_samples(run, data.tokenizer, prompts, requests, completions)
        recorder.write(config.total_steps, 'event', clock.log(config.total_steps))
        _record_contamination(recorder, run, data, evaluators)
        workdir.report(run)
    return 0


def _programs(phase: Phase, source: Source, evaluators: dict) -> dict:
    """What uses the devices in the loop of a phase, besides its source."""
    programs = {'train_step': phase.train_step(), 'evaluators': evaluators}
    return source.in_turn(**programs) if phase.is_rollout else programs


def _go_back(
    spike: Spike, recorder: Recorder, back: restart.Restart
) -> tuple[TrainState, int | None]:
    """Goes back to before a spike -> (the state, its step), as `_run_phases` takes them."""
    state, step, position = back.rewind(spike) or (initial_state(back.run), None, 0)
    if back.run.primary:
        workdir.undo_records(recorder, position, step or 0, spike)
    return state, step


def _run_phases(
    run: Run,
    told: dict,
    loops: list[Loop],
    state: TrainState,
    step: int | None,
) -> TrainState:
    """Trains the phases from a step on; returns the last state.

    told: {name of a phase: what has statistics of its data}.
    step: the step of the run to resume at; None for a new run.
    """
    current = run.phases.index(run.phase_at(step or 0))
    for index in range(current, len(run.phases)):
        phase, loop = run.phases[index], loops[index]
        is_resumed = index == current and step is not None
        if index > current:
            state = phase.begin(state.params, before=state)
            loop.source.prepare(state.params)
        loop.recorder.phase = phase.name
        if not is_resumed:
            statistics = told[phase.name].statistics  # about the data, for the report
            named = {f'data/{name}': value for name, value in statistics.items()}
            loop.recorder.write(phase.first, 'event', named)
        loop.clock.flops_per_token = phase.flops_per_token(run.config.model)
        with loop.clock.aside('checkpoint_restore'):
            load_teacher(run, phase)
        start = step if is_resumed else phase.first
        # Record now: if this process also dies early, the wasted time would be lost.
        loop.recorder.write(start, 'perf', loop.clock.log(start))
        with loop.clock.training():
            # A later phase starts with weights that the phase before it has evaluated and saved.
            state = train(loop, state, start, done=is_resumed or index > 0)
        loop.source.close()
        phase.teacher_params = None  # the next phase needs the room
    return state


def _prepare(run: Run, sources: list[Source], state: TrainState, step: int | None) -> None:
    """Prepares the source of the first phase to run, before any file of an earlier run changes.

    step: that of the state; None for a new run.
    """
    for phase, source in zip(run.phases, sources):
        if phase.first <= (step or 0) < phase.last:
            source.prepare(state.params if step is None else None)
            is_resumed = step is not None and step > phase.first
            load_teacher(run, phase, run.reader().read_manifest(step) if is_resumed else None)
            return


def _open_source(run: Run, phase: Phase, data: RunData, stack: contextlib.ExitStack) -> Source:
    if phase.is_rollout:
        samples = run.workdir / 'samples' if run.primary else None
        context = run.context(data.tokenizer, run.sampler(data.tokenizer), samples)
        reference = functools.partial(first_weights, run, phase)
        source = phase.rollouts(context, reference, data.datasets.get(phase.name))
    elif phase.is_preference:
        load, parts = open_reference(run, phase, data.tokenizer)
        source = phase.preferences(
            data.datasets[phase.name],
            load,
            lambda: run.origin if phase.first == 0 else None,
            run.workdir / 'reference',
            parts,
        )
    else:
        source = phase.batches(data.datasets[phase.name])
    stack.callback(source.close)
    return source


def _peak_flops(config) -> float | None:
    """Peak FLOP/s of all devices together in the model's compute dtype; None if it is unknown.

    Float8 matmuls do not change it, so MFU stays comparable and shows what they gain.
    """
    peak = peak_flops(jax.devices()[0].device_kind, compute_dtype(config.model).name)
    return peak and peak * jax.device_count()


def _record_contamination(recorder: Recorder, run: Run, data: RunData, evaluators: dict) -> None:
    """Records what share of the prompts of a task occurs in the training text."""
    asking = {
        name: group.contamination_bytes
        for name, group in run.config.evals.items()
        if isinstance(group, TaskEvaluatorConfig)
        and group.contamination_bytes
        and hasattr(evaluators[name], 'prompt_texts')  # an outside class may have none
    }
    for phase in run.phases if run.primary else ():
        if phase.is_rollout and asking:
            log.info(
                'phase %s: which prompts it shares with evaluations is not measured', phase.name
            )
        if phase.is_rollout:
            continue
        recorder.phase = phase.name
        for name, max_bytes in asking.items():
            prompts = evaluators[name].prompt_texts
            found = contamination.measure(data.datasets[phase.name], prompts, max_bytes=max_bytes)
            values = {f'data/contamination/{name}/{key}': value for key, value in found.items()}
            recorder.write(run.config.total_steps, 'event', values)


def _last_samples(config, tokenizer) -> tuple[list[str], list[Request]]:
    """The prompts and requests for the samples that are printed at the end of a training run."""
    sampling = config.sampling
    known = list(sampling.prompts) or ['']
    prompts = [known[index % len(known)] for index in range(sampling.num_samples)]
    return prompts, requests_for(config, tokenizer, prompts)


def _show_samples(run: Run, tokenizer, prompts, requests, completions: Completions) -> None:
    """Prints and stores the samples of the final weights; warns of those that failed."""
    if requests:
        log.info('samples of the final weights:')
    path = run.workdir / 'samples' / 'final.jsonl'
    write_samples(run, tokenizer, prompts, requests, completions, path)
    if failures := describe_failures(prompts, requests, completions):
        log.warning('%s', failures)

"""The work directory of a run: config, tokenizer, log, metrics, report and checkpoints."""

import contextlib
import logging
import time
from pathlib import Path

from jaxfm.checkpoint.checkpointer import Checkpointer
from jaxfm.config.inherit import write_inherited
from jaxfm.config.load import write_config
from jaxfm.errors import RunError
from jaxfm.metrics import SINKS, goodput
from jaxfm.metrics.clock import StepClock
from jaxfm.metrics.console import Console
from jaxfm.metrics.writers import JsonlWriter, Recorder, Sink, read_records
from jaxfm.optim.spikes import Spike
from jaxfm.plan.memory import bytes_total
from jaxfm.report.page import write_report
from jaxfm.run.run import Run
from jaxfm.state import TrainState
from jaxfm.storage import whole
from jaxfm.storage.base import S3
from jaxfm.storage.files import explain_write
from jaxfm.tokenizer.kinds import Tokenizer

log = logging.getLogger('jaxfm')


def open_checkpoints(run: Run, wanted: list[TrainState], at: int | None, stack) -> Checkpointer:
    """Opens the run's checkpoints for writing, after checking that there is space for them.

    If the run then fails before its first file is written, this removes the directories it created.

    at: the step to go back to. Later checkpoints will be set aside, and keep their space.

    Raises:
      StorageError: there is not enough space.
    """
    places = [run.workdir]
    if not run.config.checkpoint.directory.startswith(S3):
        places.insert(0, Path(run.config.checkpoint.directory or run.workdir / 'checkpoints'))
    known = dict.fromkeys(one for place in places for one in (place, *place.parents))
    created = [one for one in known if not one.exists()]

    def remove_what_is_empty(kind, error, traceback) -> bool:
        for directory in created if isinstance(error, RunError) else ():
            with contextlib.suppress(OSError):  # removed by another process, or not empty
                directory.rmdir()
        return False

    stack.push(remove_what_is_empty)
    checkpointer = run.checkpointer()
    stack.callback(checkpointer.close)
    checkpointer.check_room(max(_size(run, state) for state in wanted), at)
    return checkpointer


def _size(run: Run, state: TrainState) -> int:
    """The bytes of a checkpoint of this state."""
    tree = state.to_tree()
    return bytes_total({name: tree[name] for name in tree.keys() - run.base.names})


def open_records(run: Run, tokenizer: Tokenizer, console: Console, stack, is_new: bool) -> Recorder:
    """Writes config and tokenizer into the work directory; opens its log and metrics."""
    if run.primary:
        with explain_write(run.workdir):
            run.workdir.mkdir(parents=True, exist_ok=True)
        write_inherited(run.config, run.workdir)
        write_config(run.config, run.workdir / 'config.json')
        # A checkpoint belongs to the tokenizer it was trained with.
        if is_new or not (run.workdir / 'tokenizer').exists():
            directory = run.workdir / 'tokenizer'
            with explain_write(directory):
                tokenizer.save(directory)
    console.log_to(run.workdir / 'log.txt')
    jsonl = JsonlWriter(run.workdir / 'metrics.jsonl', enabled=run.primary)
    sinks = _open_sinks(run) if run.primary else ()
    recorder = Recorder(jsonl, console, *sinks, enabled=run.primary)
    stack.callback(recorder.close)
    stack.push(_log_refusal)
    return recorder


def _open_sinks(run: Run) -> list[Sink]:
    """Opens the sinks of the config. A sink that fails, now or later, never stops the run."""
    sinks = []
    for name, group in run.config.metrics.sinks.items():
        try:
            sinks.append(SINKS.load(group.name)(group, run.workdir))
        except Exception as error:
            log.warning('config.metrics.sinks.%s is skipped: %s', name, error)
    return sinks


def go_back(checkpointer: Checkpointer, jsonl: JsonlWriter, step: int) -> None:
    """Sets aside the checkpoints after `step`, and copies the metrics, which will be cut."""
    if jsonl.position():
        copy = _unused_name(jsonl.path, f'metrics.set_aside_{time.strftime("%Y%m%d_%H%M%S")}')
        with explain_write(copy), whole.write_file(copy, exclusive=True) as file:
            file.write(jsonl.path.read_bytes())
        log.warning('copied the metrics so far to %s', copy)
    steps = checkpointer.set_aside(step + 1)
    there = ', '.join(map(str, steps)) or '(none)'
    log.warning('back at step %d; checkpoints set aside: %s', step, there)


def undo_records(recorder: Recorder, position: int, step: int, spike: Spike) -> None:
    """Truncates the metrics to those up to the checkpoint before a spike, and records the rewind.

    What is cut off stays in a file of its own, because it shows how the loss came to spike. Records
    of earlier rewinds are kept, at the step to which the run goes back now.
    """
    jsonl = recorder.jsonl
    end = jsonl.end_of(step, position)
    copy = _unused_name(jsonl.path, f'metrics.before_spike_{spike.step}')
    with explain_write(copy), whole.write_file(copy, exclusive=True) as file:
        file.write(jsonl.path.read_bytes()[end:])
    earlier = [record for record in read_records(jsonl.path, end) if 'spike/rewinds' in record]
    jsonl.truncate(end)
    for record in earlier:
        jsonl.write(record | {'step': min(step, record['step'])})
    values = spike.values('rewind') | {'spike/rewinds': spike.rewinds + 1}
    recorder.write(step, 'event', values)
    log.warning(
        'back at step %d; the data goes on after the spike of step %d; %s has the metrics so far',
        step,
        spike.step,
        copy,
    )


def _unused_name(beside: Path, stem: str) -> Path:
    """`stem`.jsonl beside a file; or stem_2.jsonl and so on, if that exists."""
    path, number = beside.with_name(f'{stem}.jsonl'), 1
    while path.exists():
        number += 1
        path = beside.with_name(f'{stem}_{number}.jsonl')
    return path


def cut_records(jsonl: JsonlWriter, clock: StepClock, position: int, step: int) -> None:
    """Truncates the metrics to those up to the checkpoint; counts later work as wasted time.

    position: the length of the metrics file when the checkpoint of `step` was saved.
    """
    end = jsonl.end_of(step, position)
    lost = clock.waste(goodput.last_elapsed(jsonl.path, end))
    if lost > 1:
        log.warning(
            '%.0f s of work after step %d are repeated: no checkpoint that counts has them',
            lost,
            step,
        )
    jsonl.truncate(end)


def report(run: Run) -> None:
    """Writes report.html. A failure is only a warning, so that it does not end a finished run."""
    if not run.primary:
        return
    try:
        log.info('report: %s', write_report(run.workdir))
    except OSError as error:
        log.warning('the report could not be written: %s', error)


def _log_refusal(kind, error, traceback) -> bool:
    """Writes the error that stops the run to the log file; `main` shows it on the screen."""
    if isinstance(error, RunError):
        log.error('%s', error, extra={'shown': True})
    return False

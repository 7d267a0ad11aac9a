"""Runs tasks in separate processes: a kernel that hangs or breaks the device costs one row.

    python -m tools.bench.gpu.stages STAGE --rows FILE      # what a Runner starts

A stage is a module of this package with `tasks(smoke, **options)`. Its process writes one line of
JSON before the first task (`about`, `names`) and one after each task. Peers that use other
libraries follow the same protocol.
"""

import argparse
import contextlib
import dataclasses
import fnmatch
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tools.bench.gpu.record import Record

ROOT = Path(__file__).resolve().parents[3]
# A compilation cache, because every stage runs in new processes.
CACHE = str(Path(tempfile.gettempdir()) / f'jaxfm-bench-{os.getuid()}')
# Also cache programs that compile quickly: there are hundreds of them.
ENVIRONMENT = {
    'JAX_COMPILATION_CACHE_DIR': CACHE,
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
}
PATIENCE = 120.0  # seconds without a row: compilation may take that long, more is a hang


class Refused(Exception):
    """A peer is not installed or does not support the case; not a failure."""


@dataclasses.dataclass(frozen=True)
class Task:
    name: str
    run: Callable[[], dict]  # -> the values of a row besides stage and name


@dataclasses.dataclass
class Runner:
    """Runs stages one after the other until time runs out.

    seconds: limit for the whole part. only: glob patterns of the names to run. in_process: run
    tasks in this process, on a device that cannot break.
    """

    record: Record
    seconds: float
    smoke: bool = False
    only: tuple[str, ...] = ()
    in_process: bool = False

    def __post_init__(self):
        self._end = time.monotonic() + self.seconds

    @property
    def left(self) -> float:
        """Seconds left."""
        return self._end - time.monotonic()

    def run(
        self, stage: str, limit=float('inf'), environment=None, patience=None, **options
    ) -> None:
        """Runs the tasks of a stage that match `only`, for at most `limit` seconds.

        A pattern that matches the stage's name selects all of its tasks.

        patience: seconds without a row after which a process counts as hung.
        """
        options |= {'smoke': self.smoke, 'only': list(self.only)}
        if self.in_process:
            for row in _rows(stage, options, 0):
                self._take(stage, row)
            return
        command = [sys.executable, '-m', 'tools.bench.gpu.stages', stage]
        command += ['--options', json.dumps(options)]
        self.run_command(stage, command, limit, environment, patience)

    def run_command(
        self, stage: str, command, limit=float('inf'), environment=None, patience=None
    ) -> None:
        """Like `run`, for a command with a stage's protocol that takes --first and --rows."""
        patience = patience or PATIENCE
        end = time.monotonic() + min(limit, self.left)
        first, names = 0, None
        while True:
            lines, reason = _watch(
                [*command, '--first', str(first)], end, patience, environment, self._print
            )
            for line in lines:
                if 'names' in line:
                    names = line['names']
                self._take(stage, line)
            if names is None:
                key = 'failed' if time.monotonic() < end else 'not_run'
                self.record.add({'stage': stage, 'name': '*', key: reason or 'no output'})
                return
            rows = sum('names' not in line for line in lines)
            first += rows
            if first >= len(names):
                return
            if time.monotonic() < end:
                if rows and not reason:
                    continue  # its last task broke the device: the rest needs a new process
                self.record.add({'stage': stage, 'name': names[first], 'failed': reason})
                first += 1
                continue
            for name in names[first:]:
                self.record.add({'stage': stage, 'name': name, 'not_run': 'out of time'})
            return

    def _take(self, stage: str, line: dict) -> None:
        if 'names' in line:
            self.record.set_device(line['about'])
        else:
            self.record.add({'stage': stage, **line})

    @staticmethod
    def _print(text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def _watch(command, end: float, patience: float, environment, say) -> tuple[list[dict], str]:
    """Runs a process until it ends, hangs or reaches `end`; returns (its lines, what went wrong).

    Only complete lines count.
    """
    with tempfile.TemporaryDirectory() as directory:
        path, errors = Path(directory) / 'rows', Path(directory) / 'stderr'
        path.touch()
        with errors.open('w', encoding='utf-8') as file:
            process = subprocess.Popen(
                [*map(str, command), '--rows', str(path)],
                cwd=ROOT,
                env={**ENVIRONMENT, **os.environ, **(environment or {})},
                stdout=file,
                stderr=file,
                start_new_session=True,  # so that killpg reaches its children, too
            )
        size, changed, reason = 0, time.monotonic(), ''
        try:
            while process.poll() is None and not reason:
                time.sleep(0.1)
                now = time.monotonic()
                if path.stat().st_size > size:
                    size, changed = path.stat().st_size, now
                if now >= end:
                    reason = 'out of time'
                elif now - changed > patience:
                    reason = f'no result within {patience:.0f} s'
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        written = path.read_text('utf-8').splitlines(True)
        lines = [json.loads(line) for line in written if line[-1] == '\n']
        said = errors.read_text('utf-8', 'replace').strip()
    if process.returncode and not reason:
        last = said.splitlines()[-1] if said else 'no output'
        reason = f'the process ended with {process.returncode}: {last[:300]}'
    if reason:
        say(said[-3000:])
    return lines, reason


def _rows(stage: str, options: dict, first: int) -> Iterator[dict]:
    """Yields the lines of a stage, from task `first` on; stops early if the device is broken."""
    only = options.pop('only')
    module = importlib.import_module(f'tools.bench.gpu.{stage}')
    tasks = [task for task in module.tasks(**options) if passes(only, stage, task.name)]
    yield {'about': _device(), 'names': [task.name for task in tasks]}
    for task in tasks[first:]:
        start = time.monotonic()
        values, broken = attempt(task.run)
        yield {'name': task.name, **values, 'task_seconds': round(time.monotonic() - start, 2)}
        if broken:
            return


def passes(only, *names: str) -> bool:
    """Whether any pattern matches any of the names; without patterns, all names pass."""
    return not only or any(fnmatch.fnmatch(name, pattern) for pattern in only for name in names)


def quick(limit: float) -> float:
    """The patience for tasks that take seconds: a hang leaves two thirds of the limit to others."""
    return min(30.0, limit / 3)


def attempt(function: Callable[[], dict]) -> tuple[dict, bool]:
    """Runs a task; returns (the values of its row, whether the device is broken)."""
    try:
        return function(), False
    except Refused as error:
        return {'refused': str(error)}, False
    except Exception as error:  # any error of a kernel or a compiler is a result
        text = ' '.join(str(error).split())
        if 'RESOURCE_EXHAUSTED' in text or 'out of memory' in text.lower():
            return {'failed': 'out of memory'}, False
        broken = 'CUDA_ERROR' in text or 'cuda error' in text.lower()
        return {'failed': f'{type(error).__name__}: {text[:400]}'}, broken


def _device() -> dict:
    import jax

    devices = jax.devices()
    about = {'device': devices[0].device_kind, 'platform': devices[0].platform}
    about['devices'] = len(devices)
    stats = devices[0].memory_stats() if about['platform'] == 'gpu' else None
    if stats and 'bytes_limit' in stats:
        about['device_memory_limit'] = stats['bytes_limit']
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        query = '--query-gpu=name,driver_version,memory.total,clocks.sm,power.limit'
        command = ['nvidia-smi', query, '--format=csv,noheader']
        said = subprocess.run(command, capture_output=True, check=True, encoding='utf-8')
        about['nvidia_smi'] = said.stdout.strip()
    return about


def main() -> None:
    arguments = parse()
    with arguments.rows.open('a', encoding='utf-8') as file:
        for row in _rows(arguments.stage, arguments.options, arguments.first):
            file.write(json.dumps(row) + '\n')
            file.flush()
    # With a broken device, a normal exit may hang.
    os._exit(0)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line -> flags."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('stage')
    parser.add_argument('--options', type=json.loads, default={})
    parser.add_argument('--first', type=int, default=0)
    parser.add_argument('--rows', type=Path, required=True)
    return parser.parse_args(argv)


if __name__ == '__main__':
    main()

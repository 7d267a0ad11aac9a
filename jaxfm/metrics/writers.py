"""metrics.jsonl, the authoritative record of a run, and other sinks for the same records.

A record is one flat JSON object per line: `step`, `phase`, `time`, `kind` and named values. `time`
is Unix time in seconds, only for display: records are ordered by step. `kind` is train, eval, perf
or event. Values are numbers, strings, booleans or null; floats are written without loss. JSON has
no NaN or infinities, so these are written as the strings "NaN", "Infinity" and "-Infinity", and
`read_records` turns them back into floats.
"""

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from jaxfm.errors import DataError
from jaxfm.storage.files import explain_errors

log = logging.getLogger('jaxfm')

SCHEMA_VERSION = 1
_NOT_JSON = ('NaN', 'Infinity', '-Infinity')


class Sink(Protocol):
    """Receives every record: a console, an experiment tracker."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Recorder:
    """Builds records and passes them to metrics.jsonl and to the sinks.

    A sink that raises is dropped; it cannot stop the run.

    enabled: False on every process but the first: nothing is written there.
    """

    def __init__(self, jsonl: 'JsonlWriter', *sinks: Sink, enabled: bool = True):
        self.jsonl = jsonl
        self._sinks = list(sinks) if enabled else []
        self._enabled = enabled
        self.phase = ''  # of the following records

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Writes one record. values: Python or numpy scalars, not arrays on a device."""
        if not self._enabled:
            return
        head = {'step': step, 'phase': self.phase, 'time': round(time.time(), 3), 'kind': kind}
        record = head | {name: _scalar(value) for name, value in values.items()}
        self.jsonl.write(record)
        for sink in tuple(self._sinks):
            self._call(sink, sink.write, record)

    def close(self) -> None:
        """Closes the file and the sinks."""
        self.jsonl.close()
        for sink in tuple(self._sinks):
            self._call(sink, sink.close)

    def _call(self, sink: Sink, method, *arguments) -> None:
        try:
            method(*arguments)
        except Exception as error:
            self._sinks.remove(sink)
            log.warning('%s failed and gets no more records: %s', type(sink).__name__, error)


class JsonlWriter:
    """Appends records to a file, always whole lines, so that a resumed run can cut it back.

    On a full disk, records are lost and one warning is logged, but the run goes on. With
    enabled=False (every process but the first) it touches no file, and the position is 0.
    """

    def __init__(self, path: str | Path, enabled: bool = True):
        self.path = Path(path)
        self._file = None
        self._position = 0
        self._warned = False
        if enabled:
            self._open()

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line; on return the operating system has it (it is not fsynced)."""
        if self._file is None:
            return
        fields = {name: _to_json(value) for name, value in record.items()}
        line = json.dumps(fields, allow_nan=False, ensure_ascii=False).encode() + b'\n'
        try:
            self._append(line)
        except OSError as error:
            if not self._warned:
                log.warning('%s cannot be written, records are lost: %s', self.path, error)
            self._warned = True

    def position(self) -> int:
        """Bytes of whole lines so far; checkpoints store it for `end_of`."""
        return self._position

    def end_of(self, step: int, position: int) -> int:
        """Where to cut the file on resume: after the last record up to `step` and `position`.

        step, position: of the checkpoint. The position is only valid for the work directory in
        which the checkpoint was saved. A run may resume it in another directory and be killed
        before its own first checkpoint; then only the steps of the records show where to cut.
        """
        if position > self._position:
            log.warning(
                '%s is shorter than when the checkpoint was saved: some records are missing',
                self.path,
            )
        end = 0
        with open(self.path, 'rb') as file:
            for line in file:
                if end + len(line) > position or not _is_up_to(step, line):
                    break
                end += len(line)
        return end

    def truncate(self, position: int) -> None:
        """Cuts the file back to an earlier position."""
        if self._file is None:
            return
        self._cut(position)
        self._begin()

    def close(self) -> None:
        """Closes the file; later records are dropped."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> None:
        failure = f'{self.path} cannot be written'
        with explain_errors(failure, denied=failure):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, 'ab', buffering=0)
        self._cut(_end_of_last_line(self.path))
        self._begin()

    def _begin(self) -> None:
        if self._position == 0:
            head = {'step': 0, 'phase': '', 'time': round(time.time(), 3), 'kind': 'event'}
            self.write(head | {'schema_version': SCHEMA_VERSION})

    def _append(self, line: bytes) -> None:
        """Appends a line; removes a partly written one, or the next would be joined to it."""
        try:
            if self._file.write(line) != len(line):
                raise OSError('no space left for the whole line')
        except OSError:
            self._cut(self._position)
            raise
        self._position += len(line)

    def _cut(self, position: int) -> None:
        os.ftruncate(self._file.fileno(), position)
        self._position = position


def read_records(path: str | Path, position: int = 0) -> Iterator[dict[str, Any]]:
    """Yields the records of a file from a byte position on, ignoring an incomplete last line.

    Yields nothing if the file does not exist. Raises DataError on a line that is not JSON.
    """
    path = Path(path)
    if not path.exists():
        return
    with open(path, 'rb') as file:
        file.seek(position)
        for number, line in enumerate(file, start=1):
            if not line.endswith(b'\n'):
                return
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f'{path}, line {number}, is not a record: {error}') from error
            yield {name: float(v) if v in _NOT_JSON else v for name, v in record.items()}


def _is_up_to(step: int, line: bytes) -> bool:
    """Whether a line is a record of this step or an earlier one."""
    try:
        return json.loads(line)['step'] <= step
    except (ValueError, KeyError, TypeError):
        return False


def _end_of_last_line(path: Path) -> int:
    """The position after the last line break, found from the end because files can be large."""
    with open(path, 'rb') as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 2**16)
            file.seek(start)
            found = file.read(end - start).rfind(b'\n')
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def _scalar(value: Any) -> Any:
    """Converts a numpy scalar to a Python number; float32 to float is exact."""
    return value.item() if hasattr(value, 'item') else value


def _to_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return 'NaN' if math.isnan(value) else 'Infinity' if value > 0 else '-Infinity'
    return value

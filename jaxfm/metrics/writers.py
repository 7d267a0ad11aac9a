"""metrics.jsonl, the truth about a run, and the smaller sinks that hear the same records.

A record is flat: `step phase time kind` and named values, one JSON object a line. `time` is seconds
since 1970, for people alone: order goes by step. `kind` is train, eval, perf or event. Values are
numbers, strings, booleans or null; a float keeps every bit. NaN and infinities, which JSON lacks,
are the strings "NaN", "Infinity" and "-Infinity", and `read_records` gives them back as floats.
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
    """Anything that wants to hear the records: a console, a tracker."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Recorder:
    """Makes records and gives each to metrics.jsonl and the sinks. No sink can stop a run.

    enabled: False on all processes but the first, where nothing is written.
    """

    def __init__(self, jsonl: 'JsonlWriter', *sinks: Sink, enabled: bool = True):
        self.jsonl = jsonl
        self._sinks = list(sinks) if enabled else []
        self._enabled = enabled
        self.phase = ''  # of the records to come

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """One record; `values` may hold Python or numpy scalars, not arrays still on a device."""
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
            log.warning('%s gets no more metrics: %s', type(sink).__name__, error)


class JsonlWriter:
    """Appends records to a file, a whole line at a time, so that it can be cut back on resume.

    A full disk costs records and one warning, never the run. With enabled=False (all processes but
    the first) nothing is touched and the position is 0.
    """

    def __init__(self, path: str | Path, enabled: bool = True):
        self.path = Path(path)
        self._file = None
        self._position = 0
        self._warned = False
        if enabled:
            self._open()

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line; it is in the hands of the operating system on return."""
        if self._file is None:
            return
        fields = {name: _to_json(value) for name, value in record.items()}
        line = json.dumps(fields, allow_nan=False, ensure_ascii=False).encode() + b'\n'
        try:
            self._append(line)
        except OSError as error:
            if not self._warned:
                log.warning('%s loses records: %s', self.path, error)
            self._warned = True

    def position(self) -> int:
        """Bytes of whole lines so far; a checkpoint keeps it for `end_of`."""
        return self._position

    def end_of(self, step: int, position: int) -> int:
        """Bytes of the records up to a step that are before the position in its checkpoint.

        That position is of the work directory where the checkpoint was made. In another one, where
        a run went on from it and was killed before its own first checkpoint, steps alone tell.
        """
        if position > self._position:
            log.warning('%s is shorter than at the checkpoint: records are missing', self.path)
        end = 0
        with open(self.path, 'rb') as file:
            for line in file:
                if end + len(line) > position or not _is_up_to(step, line):
                    break
                end += len(line)
        return end

    def truncate(self, position: int) -> None:
        """Cuts back to an earlier position, that of a checkpoint."""
        if self._file is None:
            return
        self._cut(position)
        self._begin()

    def close(self) -> None:
        """Further records are dropped."""
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
        """A line that fits in part only is taken back, or the next one would be glued to it."""
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
    """The records of a file from a position on, without a torn last line; no file, no records."""
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
                raise DataError(f'{path}, line {number}, is no record: {error}') from error
            yield {name: float(v) if v in _NOT_JSON else v for name, v in record.items()}


def _is_up_to(step: int, line: bytes) -> bool:
    """Whether a line is a record, of this step or an earlier one."""
    try:
        return json.loads(line)['step'] <= step
    except (ValueError, KeyError, TypeError):
        return False


def _end_of_last_line(path: Path) -> int:
    """Bytes up to the last line break, read backwards: the file of a long run is large."""
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
    """Python's own number for a numpy scalar; float32 to float is exact."""
    return value.item() if hasattr(value, 'item') else value


def _to_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return 'NaN' if math.isnan(value) else 'Infinity' if value > 0 else '-Infinity'
    return value

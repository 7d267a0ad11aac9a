"""Append-only files of samples: a header line, then one line for each sample that has ended.

    {"header": {"task": {...}, "options": {...}, "weights": {...}, ...}}
    {"id": "test:17", "sample_index": 0, "score": 1.0, ...}

Each line is flushed at once, so a kill loses only the samples that were running; a torn last line
is dropped when the file is read. An evaluation with the same header goes on with the file and keeps
its samples. A file with another header is refused and never changed: its samples belong to another
evaluation.

In the training loop, which repeats a step with the same weights and noise, a repeated step replaces
its file.
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxfm.distributed import agree
from jaxfm.errors import DataError, RunError, StorageError
from jaxfm.storage.files import explain_errors, explain_write

log = logging.getLogger('jaxfm')

Key = tuple[str, int]  # id of a prompt, sample index


def key_of(record: dict) -> Key:
    """What identifies a sample in its file."""
    return record['id'], record['sample_index']


class Samples:
    """The samples of one evaluation: those kept from an earlier start, and those added now.

    Args:
      path: of the file; None on processes that write none.
      header: what the samples belong to, as JSON.
      goes_on: keep what the file has, rather than replace it. A file that cannot be written is then
        an error; otherwise it is a warning, because training goes on.

    Raises:
      DataError: the file belongs to another evaluation, or is no file of samples.
      StorageError, PermissionDeniedError: it cannot be written.
    """

    def __init__(self, path: Path | None, header: dict, goes_on: bool = False):
        self.path, self.records, self._file = path, [], None
        header = json.loads(json.dumps(header))  # tuples and numbers as keys, as in the file
        self.kept: frozenset[Key] = frozenset()  # the same on every process
        if goes_on:
            kept = agree.from_primary(lambda: self._open_kept(header) if path else [])
            self.kept = frozenset((id, index) for id, index in kept)
        elif path:
            with self._told():
                with explain_write(path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    self._file = open(path, 'w', encoding='utf-8')
                self._append({'header': header})

    def _open_kept(self, header: dict) -> list[Key]:
        with explain_write(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        end = 0
        if self.path.exists():
            theirs, self.records, end = _read(self.path)
            if end:
                _check_same(self.path, theirs, header)
        with explain_write(self.path):
            self._file = open(self.path, 'a', encoding='utf-8')
            self._file.truncate(end)
        if not end:
            self._append({'header': header})
        return [key_of(record) for record in self.records]

    def add(self, record: dict) -> None:
        """Adds a sample that has ended; it is in the file when this returns."""
        self.records.append(record)
        with self._told():
            self._append(record)

    def _append(self, line: dict) -> None:
        if self._file is not None:
            with explain_write(self.path):
                self._file.write(json.dumps(line) + '\n')
                self._file.flush()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """If writing fails, warns once and writes no more: the scores matter more."""
        try:
            yield
        except RunError as error:
            log.warning('the samples could not be written: %s', error)
            file, self._file = self._file, None
            with contextlib.suppress(OSError):
                if file:
                    file.close()

    def close(self) -> None:
        """Closes the file."""
        with self._told(), explain_write(self.path):
            if self._file is not None:
                self._file.close()
        self._file = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def read_samples(path: Path) -> tuple[dict, list[dict]]:
    """-> the header and the samples of a file; a torn last line is left out.

    Raises:
      MissingInputError: there is no such file.
      DataError: it is no file of samples, or a line before the last is damaged.
    """
    missing = f'{path}: there is no such file'
    with explain_errors(f'{path}: cannot be read', StorageError, missing=missing):
        header, records, end = _read(path)
    if not end:
        raise DataError(f'{path}: holds no header of samples, so nothing was evaluated')
    return header, records


def _read(path: Path) -> tuple[dict, list[dict], int]:
    """-> header, samples, and the bytes of the sound lines; 0 bytes if even the header is torn."""
    lines = path.read_bytes().splitlines(keepends=True)
    found, end = [], 0
    for number, line in enumerate(lines, 1):
        value = _parse(line)
        if value is None and number == len(lines):
            log.warning('%s: the last line is torn, because a process was killed: left out', path)
            break
        if value is None or ('header' in value) != (number == 1):
            wanted = '{"header": ...}' if number == 1 else 'a sample as a JSON object'
            raise DataError(f'{path}:{number}: want {wanted}, got {line[:60]!r}')
        found.append(value)
        end += len(line)
    return (found[0]['header'] if found else {}), found[1:], end


def _parse(line: bytes) -> dict | None:
    if not line.endswith(b'\n'):
        return None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _check_same(path: Path, theirs: dict, ours: dict) -> None:
    differ = differences(theirs, ours)
    if differ:
        name, there, here = differ[0]
        raise DataError(
            f'{path} holds samples of another evaluation: {name} is {there!r} there, but {here!r} '
            f'now ({len(differ)} differences); name another --output, or move the file away'
        )


def differences(first: Any, second: Any, name: str = '') -> list[tuple[str, Any, Any]]:
    """(dotted key, value in the first, value in the second) of every difference of two headers."""
    if isinstance(first, dict) and isinstance(second, dict):
        found = []
        for key in [*first, *(key for key in second if key not in first)]:
            inner = f'{name}.{key}'.lstrip('.')
            found += differences(first.get(key), second.get(key), inner)
        return found
    return [] if first == second else [(name, first, second)]

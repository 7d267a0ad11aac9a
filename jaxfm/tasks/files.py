"""Reads the records of a task's files: .jsonl and .json, compressed or not, one or a directory.

A directory has the files of a benchmark under their published names, such as test.jsonl. A record
that cannot be used is counted and told with its file and line, and the others go on.
"""

import dataclasses
import difflib
import glob
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxfm.errors import ConfigError, DataError, MissingInputError, listed
from jaxfm.storage import find
from jaxfm.storage.find import File

log = logging.getLogger('jaxfm')

SUFFIXES = ('.jsonl', '.jsonl.gz', '.json', '.json.gz')
# {our name: the record's keys, of which the first that is there counts; dots lead inside}
Fields = dict[str, tuple[str, ...]]


class BadRow(ValueError):
    """Why a record cannot be used; the caller knows where it is."""


@dataclasses.dataclass(frozen=True)
class Row:
    """The values of one record under our names."""

    id: str
    path: str  # of its file
    file: str  # the name of its file without suffixes
    number: int  # its line, or its place in a list, from 1
    values: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def get(self, name: str, default: Any = None) -> Any:
        """An optional value; the default if it is absent or null."""
        value = self.values.get(name)
        return default if value is None else value

    def text(self, name: str) -> str:
        """A value that must be a text and not empty. Raises BadRow."""
        value = self.values.get(name)
        if not isinstance(value, str) or not value.strip():
            raise BadRow(f'{name} must be a text, and not empty, but is {value!r:.40}')
        return value


def merge_fields(task: str, defaults: Fields, given: dict[str, str]) -> Fields:
    """The benchmark's fields with those of the config in their place.

    Raises:
      ConfigError: the config names a field that the benchmark does not have.
    """
    for name in given:
        if name not in defaults:
            close = difflib.get_close_matches(name, defaults, 1)
            hint = f'; did you mean {close[0]}?' if close else ''
            raise ConfigError(
                f'task {task}: fields has {name!r}, which it does not read{hint} '
                f'(it reads: {", ".join(defaults)})'
            )
    return defaults | {name: (key,) for name, key in given.items()}


def find_files(task: str, path: str, names: Iterable[str]) -> list[File]:
    """The file or files at a path or glob; in a directory, the first of the published names.

    Raises:
      MissingInputError: there is none.
    """
    directory = Path(path).expanduser()
    if not directory.is_dir():
        return find.find(path, f'task {task}: path')
    if found := _in_directory(directory, names):
        return find.find(glob.escape(str(found)), f'task {task}: path')
    has = listed(sorted(os.listdir(directory))) or 'nothing'
    wanted = ' or '.join(f'{name}.jsonl' for name in names)
    raise MissingInputError(
        f'task {task}: {path} has no {wanted} (nor .jsonl.gz or .json); it has: {has}; '
        'name the file itself in path'
    )


def find_beside(path: str, names: Iterable[str], suffixes: tuple[str, ...] = SUFFIXES) -> str:
    """The path of another file in the same directory; '' if there is none."""
    directory = Path(path).expanduser()
    directory = directory if directory.is_dir() else directory.parent
    return str(_in_directory(directory, names, suffixes) or '')


def _in_directory(directory: Path, names, suffixes=SUFFIXES) -> Path | None:
    paths = (directory / (name + suffix) for name in names for suffix in suffixes)
    return next((path for path in paths if path.is_file()), None)


def read_rows(
    task: str, files: list[File], fields: Fields, optional: Iterable[str], parse: Callable
) -> list:
    """[parse(row)] of all records, without the bad ones, of which a warning tells.

    Raises:
      DataError: no record can be used.
    """
    parsed, bad, ids = [], [], set()
    for file in files:
        for place, number, record in _records(file):
            try:
                row = _row(file, number, record, fields, optional)
                if row.id in ids:
                    raise BadRow(f'its id {row.id!r} is taken by a record before it')
                parsed.append(parse(row))
                ids.add(row.id)
            except BadRow as error:
                bad.append(f'{place}: {error}')
    total = len(parsed) + len(bad)
    if not parsed:
        why = f': {bad[0]}' if bad else f': {listed([file.path for file in files])} is empty'
        raise DataError(f'task {task}: none of {total} records can be used{why}')
    if bad:
        log.warning(
            'task %s: %d of %d records are bad and left out: %s',
            *(task, len(bad), total, '; '.join(bad[:3]) + ('; ...' if len(bad) > 3 else '')),
        )
    return parsed


def _records(file: File) -> Iterator[tuple[str, int, Any]]:
    """Yields (file:line for messages, number from 1, record); a bad line as a BadRow."""
    with file.open() as stream:
        content = stream.read()
    if file.suffix == '.json' and (whole := _parse(content)) is not None:
        # A list, or an object around one, as BIG-Bench Hard is published.
        inside = whole.values() if isinstance(whole, dict) else [whole]
        lists = [value for value in inside if isinstance(value, list)]
        if len(lists) == 1:
            for number, record in enumerate(lists[0], 1):
                yield f'{file.path}: record {number}', number, record
            return
    for number, line in enumerate(content.split(b'\n'), 1):
        if line.strip():
            yield f'{file.path}:{number}', number, line


def _parse(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _row(file: File, number: int, record: Any, fields: Fields, optional: Iterable[str]) -> Row:
    if isinstance(record, bytes):
        try:
            record = json.loads(record.decode('utf-8-sig'))
        except (ValueError, RecursionError) as error:
            raise BadRow(f'not JSON: {error}') from error
    if not isinstance(record, dict):
        raise BadRow(f'the record is no object, but {record!r:.40}')
    values = {}
    for name, keys in fields.items():
        found = [value for key in keys if (value := _find(record, key)) is not None]
        if found:
            values[name] = found[0]
        elif name not in optional:
            raise BadRow(_explain_missing(name, keys, record))
    stem = file.name
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        stem = stem.removesuffix(suffix)
    id = str(values.get('id', f'{stem}:{number}'))
    return Row(id, file.path, Path(stem).name, number, values)


def _find(record: Any, path: str) -> Any:
    """The value at a dotted path; None if it is not there."""
    if path in record:
        return record[path]
    for key in path.split('.'):
        record = record.get(key) if isinstance(record, dict) else None
    return record


def _explain_missing(name: str, keys: tuple[str, ...], record: dict) -> str:
    close = difflib.get_close_matches(keys[-1].lower(), {key.lower(): key for key in record}, 1)
    nearest = [key for key in record if close and key.lower() == close[0]]
    hint = f'; did you mean {nearest[0]}?' if nearest else ''
    return (
        f'no field {" or ".join(keys)}{hint} (it has: {", ".join(map(str, record)) or "nothing"}); '
        f"set fields={{{name!r}: '...'}}"
    )

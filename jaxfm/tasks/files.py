"""Reads the records of a task's files: .jsonl, .json, .csv and .txt, compressed or not.

A directory has the files of a benchmark under their published names, such as test.jsonl. A record
that cannot be used is counted and told with its file and line, and the others go on.
"""

import csv
import dataclasses
import difflib
import glob
import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxfm.errors import ConfigError, DataError, MissingInputError, RunError, listed
from jaxfm.storage import find
from jaxfm.storage.find import File

log = logging.getLogger('jaxfm')

# What follows a published name that has no suffix of its own.
SUFFIXES = ('.jsonl', '.jsonl.gz', '.json', '.json.gz')
_FORMATS = ('.jsonl', '.json', '.csv', '.txt')
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

    names: without suffix, or globs with one, such as '*_test.csv'.

    Raises:
      MissingInputError: there is none.
    """
    directory = Path(path).expanduser()
    if not directory.is_dir():
        return find.find(path, f'task {task}: path')
    if found := _in_directory(directory, names):
        return find.find(found, f'task {task}: path')
    has = listed(sorted(os.listdir(directory))) or 'nothing'
    wanted = ' or '.join(_with_suffixes(name)[0] for name in names)
    raise MissingInputError(
        f'task {task}: {path} has no {wanted} (nor .jsonl.gz or .json); it has: {has}; '
        'name the file itself in path'
    )


def find_beside(path: str, names: Iterable[str]) -> str:
    """A glob of other files in the same directory, by their names; '' if there are none."""
    directory = Path(path).expanduser()
    return _in_directory(directory if directory.is_dir() else directory.parent, names)


def _in_directory(directory: Path, names: Iterable[str]) -> str:
    escaped = glob.escape(str(directory))
    patterns = (os.path.join(escaped, each) for name in names for each in _with_suffixes(name))
    return next((one for one in patterns if any(map(os.path.isfile, glob.iglob(one)))), '')


def _with_suffixes(name: str) -> list[str]:
    has_suffix = name.endswith(_FORMATS)
    return [name] if has_suffix else [name + suffix for suffix in SUFFIXES]


def read_rows(
    task: str,
    files: list[File],
    fields: Fields,
    optional: Iterable[str],
    parse: Callable,
    columns: tuple[str, ...] = (),
) -> list:
    """[parse(row)] of all records, without the bad ones, of which a warning tells.

    A record is bad if `parse` raises on it: BadRow, or what a value of a type that nobody expected
    makes it raise. Errors of the run, such as a missing package, are not about a record.

    columns: of a .csv that has no header; () if the first line has their names.

    Raises:
      DataError: no record can be used.
    """
    parsed, bad, ids, cause = [], [], set(), None
    for file in files:
        for place, number, record in _records(file, columns):
            try:
                row = _row(file, number, record, fields, optional)
                if row.id in ids:
                    raise BadRow(f'its id {row.id!r} is taken by a record before it')
                parsed.append(parse(row))
                ids.add(row.id)
            except RunError:
                raise
            except Exception as error:
                kind = '' if isinstance(error, BadRow) else f'{type(error).__name__}: '
                bad.append(f'{place}: {kind}{error}')
                cause = cause or error
    total = len(parsed) + len(bad)
    if not parsed:
        why = f': {bad[0]}' if bad else f': {listed([file.path for file in files])} is empty'
        raise DataError(f'task {task}: none of {total} records can be used{why}') from cause
    if bad:
        log.warning(
            'task %s: %d of %d records are bad and left out: %s',
            *(task, len(bad), total, '; '.join(bad[:3]) + ('; ...' if len(bad) > 3 else '')),
        )
    return parsed


def _records(file: File, columns: tuple[str, ...]) -> Iterator[tuple[str, int, Any]]:
    """Yields (file:line for messages, number from 1, record); a line of JSON is not parsed yet."""
    with file.open() as stream:
        content = stream.read()
    if file.suffix == '.csv':
        yield from _records_of_csv(file, _decode(file, content), columns)
        return
    # The whole text is one record, unless it has lines of JSON under the wrong name.
    if file.suffix == '.txt' and not content.lstrip().startswith(b'{'):
        yield file.path, 1, {'text': _decode(file, content)}
        return
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


def _records_of_csv(file: File, text: str, columns: tuple[str, ...]):
    reader = csv.reader(io.StringIO(text, newline=''))
    try:
        columns = columns or tuple(next(reader, ()))
        for number, values in enumerate(filter(None, reader), 1):
            same = len(values) == len(columns)
            record = dict(zip(columns, values)) if same else _not_of_columns(values, columns)
            yield f'{file.path}:{reader.line_num}', number, record
    except csv.Error as error:
        raise DataError(f'{file.path}:{reader.line_num}: {error}') from error


def _not_of_columns(values: list[str], columns: tuple[str, ...]) -> BadRow:
    return BadRow(f'want {len(columns)} columns ({", ".join(columns)}), got {len(values)}')


def _decode(file: File, content: bytes) -> str:
    try:
        return content.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise DataError(f'{file.path}: not UTF-8: {error}') from error


def _parse(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _row(file: File, number: int, record: Any, fields: Fields, optional: Iterable[str]) -> Row:
    if isinstance(record, BadRow):
        raise record
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
    stem = file.name.removesuffix('.gz')
    stem = stem[: -len(file.suffix)] if file.suffix in _FORMATS else file.name
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

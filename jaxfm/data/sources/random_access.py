"""Documents of a class from outside with random access, such as any grain.RandomAccessDataSource.

The elements are read once, in order, when their tokens are cached.
"""

import dataclasses
import errno
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

from jaxfm.code import import_module, locate_error
from jaxfm.data import RandomAccessConfig
from jaxfm.data.documents import Document
from jaxfm.data.sources import raise_fraction, records
from jaxfm.data.sources.files import check_bad_records
from jaxfm.errors import DataError, MissingInputError, RunError
from jaxfm.registry import find_class

# Elements in a shard; a killed build goes on at the first shard that is not done.
SHARD_ELEMENTS = 1 << 14
# At most so many elements may all be on one side of a hash.
FEW = 1000
# Elements that are part of the fingerprint: the first, the last and some between them.
SAMPLED = 16


@dataclasses.dataclass(frozen=True)
class Shard:
    """Elements [start, stop)."""

    start: int
    stop: int


class RandomAccess:
    """A source of the elements of an outside class."""

    def __init__(self, config: RandomAccessConfig):
        self.config = config
        self.bad_records: dict[str, str] = {}

    def files(self) -> None:
        """Opens the outside source, which raises if it cannot be."""
        _ = self._length

    @functools.cached_property
    def _length(self) -> int:
        number = self._call('len()', lambda: len(self._elements))
        if not number:
            raise DataError(f'{self.config.name} has no elements')
        return number

    def fingerprint(self) -> str:
        """Hash of path, arguments, contents, and the places, sizes and times of files named."""
        files = [_stamp(text) for text in _texts_in(self.config.arguments)]
        known = [self.config.name, self.config.arguments, self.contents(), files]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    def contents(self) -> str:
        """Hash of length, some elements and the class's own `fingerprint`, if it has one."""
        own = getattr(self._elements, 'fingerprint', None)
        own = self._call('fingerprint()', own) if callable(own) else own
        last = self._length - 1
        chosen = sorted({number * last // (SAMPLED - 1) for number in range(SAMPLED)})
        known = [self._length, str(own or ''), [self._describe(index) for index in chosen]]
        return hashlib.sha256(json.dumps(known, default=repr).encode()).hexdigest()

    def _describe(self, index: int) -> dict | str:
        try:
            return dataclasses.asdict(self._document(index))
        except records.BadRecord as error:  # counted when `read` meets it
            return str(error)

    def shards(self) -> list[Shard]:
        count = self._length
        return [
            Shard(start, min(start + SHARD_ELEMENTS, count))
            for start in range(0, count, SHARD_ELEMENTS)
        ]

    def read(self, shard: Shard) -> Iterator[tuple[bool, Document]]:
        """Yields (is_heldout, document). Raises DataError at a bad one more than may be."""
        for index in range(shard.start, shard.stop):
            try:
                document = self._document(index)
                place = records.place_of_document(document)
            except records.BadRecord as error:
                self._leave_out(index, str(error))
            else:
                yield place < self._fraction, document

    def leave_out(self, shard: Shard, document: Document, reason: str) -> None:
        """Counts a document as bad that its chat template has refused."""
        self._leave_out(int(document.name), reason)

    def _leave_out(self, index: int, reason: str) -> None:
        self.bad_records[str(index)] = f'{self.config.name}: element {index}: {reason}'
        check_bad_records(list(self.bad_records.values()), self.config.max_bad_records)

    @functools.cached_property
    def _elements(self):
        outside = find_class(self.config.name)
        return self._call('', lambda: outside(**self.config.arguments))

    @functools.cached_property
    def _fraction(self) -> float:
        fraction, places = self.config.heldout_fraction, []
        if self._length > FEW:
            return fraction
        for index in range(self._length):
            try:
                places.append(records.place_of_document(self._document(index)))
            except records.BadRecord:  # counted when `read` meets it
                continue
        return raise_fraction(fraction, places)

    def _document(self, index: int) -> Document:
        element = self._call(f'element {index}', lambda: self._elements[index])
        return _to_document(element, self.config.fields, str(index))

    def _call(self, what: str, call) -> Any:
        """Calls outside code; its errors become one line that says where in its file."""
        try:
            return call()
        except RunError:
            raise
        except Exception as error:
            where = f'{self.config.name}: {what}'.removesuffix(': ')
            is_missing = isinstance(error, FileNotFoundError) or _NO_FILE in str(error)
            for path in _texts_in(self.config.arguments) if is_missing else ():
                if path and path in str(error) and not os.path.exists(path):
                    raise MissingInputError(f'{where}: {path} does not exist') from error
            module = import_module(self.config.name)
            kind = MissingInputError if is_missing else DataError
            raise kind(f'{where}: {locate_error(error, module.__file__)}') from error


# What libraries written in C++ say in place of a FileNotFoundError.
_NO_FILE = os.strerror(errno.ENOENT)


def _texts_in(value: Any) -> list[str]:
    """Every text in a JSON value, at any depth."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in parts for text in _texts_in(part)]


def _stamp(text: str) -> list:
    """If it is a path: where it leads to; of a file, also its size and modification time."""
    path = os.path.abspath(os.path.expanduser(text))
    if os.path.isfile(path):
        status = os.stat(path)
        return [path, status.st_size, status.st_mtime_ns]
    return [path] if os.path.isdir(path) else []


def _to_document(element: Any, fields, name: str) -> Document:
    """The document of an element. Raises BadRecord if it is none."""
    if isinstance(element, bytes):
        try:
            element = element.decode()
        except UnicodeDecodeError as error:
            raise records.BadRecord(f'its bytes are not UTF-8: {error.reason}') from error
    if isinstance(element, str):
        if not element.strip():
            raise records.BadRecord('it is empty')
        return Document(name, text=element)
    if not isinstance(element, dict):
        raise records.BadRecord(
            f'a {type(element).__name__} is not a document: it must be a str, bytes of UTF-8, '
            'or a dict with text, messages, or prompt and completion'
        )
    return records.to_document(element, fields, name)

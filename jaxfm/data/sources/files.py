"""Documents in files: a plain text file is a document, other files have records.

Records are named by the line or the number they have in their file ('chats.jsonl:17'). A big .jsonl
is read in pieces; a name inside a later piece counts from where the piece starts
('web.jsonl@33554432:17'), errors give the line of the file all the same.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence

from jaxfm.data import FilesConfig
from jaxfm.data.documents import Document
from jaxfm.data.sources import formats, is_heldout, place_of, records
from jaxfm.data.sources.formats import (
    READERS,
    SHARDS,
    Shard,
    count_lines,
    make_text_shards,
    parse_line,
    read_text,
)
from jaxfm.errors import DataError
from jaxfm.storage import find
from jaxfm.storage.find import File

log = logging.getLogger('jaxfm')

SUFFIXES = {
    '.jsonl': 'jsonl',
    '.ndjson': 'jsonl',
    '.parquet': 'parquet',
    '.array_record': 'array_record',
    '.arrayrecord': 'array_record',
}
# Records of so many bytes are few: they may all be on one side.
FEW_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """A record that was left out. `line` counts from 1 at byte `start` of the file."""

    file: File
    start: int
    line: int
    reason: str

    def pack(self) -> str | list:
        """JSON: the text, or what `unpack` needs where the text would take long to make."""
        return [self.start, self.line, self.reason] if self.start else str(self)

    def __str__(self):
        """With the line of the file, for which what stands before has to be read."""
        line = self.line + (count_lines(self.file, self.start) if self.start else 0)
        where = f'{self.file.path}:{line}: ' if line else f'{self.file.path} '
        return f'{where}{self.reason}'


class TooManyBadRecords(DataError):
    """More records were bad than `max_bad_records` allows."""


class Files:
    """Text files, or records of texts or chats."""

    def __init__(self, config: FilesConfig):
        self.config = config
        # {document name: what was wrong with it}
        self.bad_records: dict[str, BadRecord] = {}

    def files(self) -> list[tuple[File, str]]:
        """(file, side) in the order of their names; MissingInputError for an empty glob."""
        return self._files

    def fingerprint(self) -> str:
        """Of names, sizes, times of modification and sides; contents are not read."""
        lines = [f'{file.name}\t{file.size}\t{file.stamp}\t{side}\n' for file, side in self._files]
        lines.append(json.dumps([formats.SHARD_BYTES, self.config.heldout_fraction]))
        return hashlib.sha256(''.join(lines).encode()).hexdigest()

    def shards(self) -> list[Shard]:
        """Files in order, big ones in pieces, small text files together."""
        shards, texts = [], []
        for file, side in self._files:
            kind = self._format(file)
            if kind == 'text':
                texts.append((file, side))
            else:
                shards += list(SHARDS[kind](file, side))
        return make_text_shards(texts) + shards

    def read(self, shard: Shard) -> Iterator[tuple[bool, Document]]:
        """DataError as soon as more records were bad than may be, this shard and those before."""
        if shard.format == 'text':
            yield from self._read_texts(shard)
            return
        ((_, side),) = shard.files
        for place, document in self._read_records(shard):
            yield place < self._fraction if side == 'hash' else side == 'heldout', document

    def _read_records(self, shard: Shard) -> Iterator[tuple[float, Document]]:
        """(place among all that there could be, document)."""
        ((file, _),) = shard.files
        for start, line, record in READERS[shard.format](file, shard):
            name = f'{file.name}@{start}:{line}' if start else f'{file.name}:{line}'
            try:
                if isinstance(record, bytes):
                    record = parse_line(record)
                document = records.to_document(record, self.config.fields, name)
                place = _place(document)
            except records.BadRecord as error:
                self._leave_out(name, BadRecord(file, start, line, str(error)))
            else:
                yield place, document

    @functools.cached_property
    def _fraction(self) -> float:
        """The share of records that is held out; of few records, what holds out one at least."""
        fraction = self.config.heldout_fraction
        shards = [shard for shard in self.shards() if shard.files[0][1] == 'hash']
        if sum(shard.num_bytes for shard in shards) > FEW_BYTES:
            return fraction
        # What is bad is told where it is read as a document.
        reader = Files(self.config.model_copy(update={'max_bad_records': 1 << 62}))
        places = [place for shard in shards for place, _ in reader._read_records(shard)]
        if len(places) < 2 or min(places) < fraction:
            return fraction
        log.info('held-out: the share of %.3g picks no record, so one is held out', fraction)
        return math.nextafter(min(places), 1)

    def _read_texts(self, shard: Shard) -> Iterator[tuple[bool, Document]]:
        for file, side in shard.files:
            try:
                yield from read_text(file, side, self.config.heldout_fraction)
            except records.BadRecord as error:
                self._leave_out(file.name, BadRecord(file, 0, 0, str(error)))

    def leave_out(self, shard: Shard, document: Document, reason: str) -> None:
        """Counts a document as bad that only its tokenizer or template could refuse."""
        file, start, line = shard.files[0][0], 0, 0
        if shard.format != 'text':
            start, _, line = document.name.removeprefix(file.name).lstrip('@').rpartition(':')
        else:
            file = next(file for file, _ in shard.files if file.name == document.name)
        self._leave_out(document.name, BadRecord(file, int(start or 0), int(line), reason))

    def unpack(self, shard: Shard, packed: str | list) -> str | BadRecord:
        """The bad record of a shard that `packed` stands for."""
        return packed if isinstance(packed, str) else BadRecord(shard.files[0][0], *packed)

    def _leave_out(self, name: str, bad: BadRecord) -> None:
        self.bad_records[name] = bad
        check_bad_records(list(self.bad_records.values()), self.config.max_bad_records)

    def _format(self, file: File) -> str:
        if self.config.format != 'auto':
            return self.config.format
        if file.suffix == '.json':
            raise DataError(
                f'{file.path}: is this one text, or a record a line? '
                'Set config.data.format to text or jsonl'
            )
        return SUFFIXES.get(file.suffix, 'text')

    @functools.cached_property
    def _files(self) -> list[tuple[File, str]]:
        config = self.config
        files = find.find(config.path, 'config.data.path')
        if not config.heldout_path:
            return self._with_sides(files)
        heldout = find.find(config.heldout_path, 'config.data.heldout_path')
        paths = {file.path for file in heldout}
        train = [file for file in files if file.path not in paths]
        if not train:
            raise DataError('config.data.heldout_path has all files: none is left to train on')
        return [(file, 'train') for file in train] + [(file, 'heldout') for file in heldout]

    def _with_sides(self, files: list[File]) -> list[tuple[File, str]]:
        sides = {}
        for file in files:
            if self._format(file) != 'text':
                sides[file] = 'hash'
            else:
                chosen = is_heldout(file.name, self.config.heldout_fraction)
                sides[file] = 'heldout' if chosen else 'train'
        if len(set(sides.values())) == 1 and 'hash' not in sides.values():
            log.info(
                'held-out: too few files to choose from, so the last %.3g of each is held out',
                self.config.heldout_fraction,
            )
            sides = dict.fromkeys(sides, 'tail')
        return list(sides.items())


def _place(document: Document) -> float:
    """By content: equal records are on the same side."""
    key = document.text
    if document.messages:
        key = [document.messages, document.tools]
        key = json.dumps(key, sort_keys=True, ensure_ascii=False)
    try:
        return place_of(key.encode())
    except UnicodeEncodeError as error:
        raise records.BadRecord('a lone surrogate in it has no UTF-8 form') from error


def check_bad_records(bad: Sequence[BadRecord | str], allowed: int) -> None:
    """Raises TooManyBadRecords, naming the first one beyond, unless at most `allowed` are bad."""
    if len(bad) > allowed:
        before = f' ({allowed} bad ones before it are left out)' if allowed else ''
        raise TooManyBadRecords(f'{bad[allowed]}{before}; config.data.max_bad_records is {allowed}')

"""Documents in files: a plain text file is one document, other files contain records.

Records are named by their line or number in their file ('chats.jsonl:17'). A big .jsonl is read in
shards, and names in a later shard count lines from its start ('web.jsonl@33554432:17'). Errors
still give the line in the file.
"""

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence

from jaxfm.data import FilesConfig
from jaxfm.data.documents import Document
from jaxfm.data.sources import formats, is_heldout, raise_fraction, records
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
# Files of at most this size may have so few records that a hash puts them all on one side.
FEW_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """A record that was left out. `line` counts from 1 at byte `start` of the file."""

    file: File
    start: int
    line: int
    reason: str

    def pack(self) -> str | list:
        """As JSON: the message, or what `unpack` needs if the message would take long to make."""
        return [self.start, self.line, self.reason] if self.start else str(self)

    def __str__(self):
        """The message with the line in the file; to count lines, the file is read up to there."""
        line = self.line + (count_lines(self.file, self.start) if self.start else 0)
        where = f'{self.file.path}:{line}: ' if line else f'{self.file.path} '
        return f'{where}{self.reason}'


class TooManyBadRecords(DataError):
    """More records are bad than `max_bad_records` allows."""


class Files:
    """Text files, or records of texts or chats."""

    def __init__(self, config: FilesConfig):
        self.config = config
        # {document name: what was wrong with it}
        self.bad_records: dict[str, BadRecord] = {}

    def files(self) -> list[tuple[File, str]]:
        """(file, side) by name. Raises MissingInputError if a path or glob matches nothing."""
        return self._files

    def fingerprint(self) -> str:
        """Hash of names, sizes, modification times and sides; does not read contents."""
        lines = [f'{file.name}\t{file.size}\t{file.stamp}\t{side}\n' for file, side in self._files]
        lines.append(json.dumps([formats.SHARD_BYTES, self.config.heldout_fraction]))
        return hashlib.sha256(''.join(lines).encode()).hexdigest()

    def shards(self) -> list[Shard]:
        """Files in order, with big ones split and small text files grouped."""
        shards, texts = [], []
        for file, side in self._files:
            kind = self._format(file)
            if kind == 'text':
                texts.append((file, side))
            else:
                shards += list(SHARDS[kind](file, side))
        return make_text_shards(texts) + shards

    def read(self, shard: Shard) -> Iterator[tuple[bool, Document]]:
        """Yields (is_heldout, document) of a shard.

        Raises DataError once this and earlier calls found more than `max_bad_records` bad records.
        """
        if shard.format == 'text':
            yield from self._read_texts(shard)
            return
        ((_, side),) = shard.files
        for place, document in self._read_records(shard):
            yield place < self._fraction if side == 'hash' else side == 'heldout', document

    def _read_records(self, shard: Shard) -> Iterator[tuple[float, Document]]:
        """Yields (place, document); see `place_of`."""
        ((file, _),) = shard.files
        for start, line, record in READERS[shard.format](file, shard):
            name = f'{file.name}@{start}:{line}' if start else f'{file.name}:{line}'
            try:
                if isinstance(record, bytes):
                    record = parse_line(record)
                document = records.to_document(record, self.config.fields, name)
                place = records.place_of_document(document)
            except records.BadRecord as error:
                self._leave_out(name, BadRecord(file, start, line, str(error)))
            else:
                yield place, document

    @functools.cached_property
    def _fraction(self) -> float:
        """The fraction of records to hold out; for few records, raised to hold out at least one."""
        fraction = self.config.heldout_fraction
        shards = [shard for shard in self.shards() if shard.files[0][1] == 'hash']
        if sum(shard.num_bytes for shard in shards) > FEW_BYTES:
            return fraction
        # Ignore bad records here: they are counted when `read` meets them.
        reader = Files(self.config.model_copy(update={'max_bad_records': 1 << 62}))
        places = [place for shard in shards for place, _ in reader._read_records(shard)]
        return raise_fraction(fraction, places)

    def _read_texts(self, shard: Shard) -> Iterator[tuple[bool, Document]]:
        for file, side in shard.files:
            try:
                yield from read_text(file, side, self.config.heldout_fraction)
            except records.BadRecord as error:
                self._leave_out(file.name, BadRecord(file, 0, 0, str(error)))

    def leave_out(self, shard: Shard, document: Document, reason: str) -> None:
        """Counts a document as bad that its tokenizer or chat template has refused."""
        file, start, line = shard.files[0][0], 0, 0
        if shard.format != 'text':
            start, _, line = document.name.removeprefix(file.name).lstrip('@').rpartition(':')
        else:
            file = next(file for file, _ in shard.files if file.name == document.name)
        self._leave_out(document.name, BadRecord(file, int(start or 0), int(line), reason))

    def unpack(self, shard: Shard, packed: str | list) -> str | BadRecord:
        """The bad record of a shard, from what `BadRecord.pack` made of it."""
        return packed if isinstance(packed, str) else BadRecord(shard.files[0][0], *packed)

    def _leave_out(self, name: str, bad: BadRecord) -> None:
        self.bad_records[name] = bad
        check_bad_records(list(self.bad_records.values()), self.config.max_bad_records)

    def _format(self, file: File) -> str:
        if self.config.format != 'auto':
            return self.config.format
        if file.suffix == '.json':
            raise DataError(
                f'{file.path}: is this one text, or one record per line? '
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
            raise DataError(
                'config.data.heldout_path includes all files of config.data.path: '
                'none is left to train on'
            )
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


def check_bad_records(bad: Sequence[BadRecord | str], allowed: int) -> None:
    """Raises TooManyBadRecords, naming the first one too many, unless at most `allowed` are bad."""
    if len(bad) > allowed:
        before = f' ({allowed} bad records before it were left out)' if allowed else ''
        raise TooManyBadRecords(
            f'{bad[allowed]}{before}; fix it, or raise config.data.max_bad_records from {allowed}'
        )

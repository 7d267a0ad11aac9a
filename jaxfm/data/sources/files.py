"""Documents in files: a plain text file is a document, other files have records.

Records are named by the line or the number they have in their file ('chats.jsonl:17'). A big .jsonl
is read in pieces; a name inside a later piece counts from where the piece starts
('web.jsonl@33554432:17'), errors give the line of the file all the same.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence

from jaxfm.data import FilesConfig
from jaxfm.data.documents import Document
from jaxfm.data.sources import is_heldout, place_of, records
from jaxfm.errors import DataError
from jaxfm.storage import find
from jaxfm.storage.base import S3
from jaxfm.storage.find import File

log = logging.getLogger('jaxfm')

SUFFIXES = {
    '.jsonl': 'jsonl',
    '.ndjson': 'jsonl',
    '.parquet': 'parquet',
    '.array_record': 'array_record',
    '.arrayrecord': 'array_record',
}
# Bytes that are read as one piece of work. Part of the names of documents.
SHARD_BYTES = 32 << 20
# Records of so many bytes are few: they may all be on one side.
FEW_BYTES = 1 << 20
# Rows that are in memory at a time.
PARQUET_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Shard:
    """A piece of work: some text files, or part of one file of records."""

    format: str
    # (file, side); a side is train, heldout, hash (of each record) or tail (of each text).
    files: tuple[tuple[File, str], ...]
    num_bytes: int
    # Part of the file, half-open: bytes of jsonl, row groups of parquet, else record numbers.
    start: int = 0
    stop: int = 0
    # Number of the first row of a row group.
    first_row: int = 0

    @property
    def has_whole_files(self) -> bool:
        """Whether its documents are whole files, of which only one of equal ones is kept."""
        return self.format == 'text'


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
        line = self.line + (_count_lines(self.file, self.start) if self.start else 0)
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
        lines.append(json.dumps([SHARD_BYTES, self.config.heldout_fraction]))
        return hashlib.sha256(''.join(lines).encode()).hexdigest()

    def shards(self) -> list[Shard]:
        """Files in order, big ones in pieces, small text files together."""
        shards, texts = [], []
        for file, side in self._files:
            kind = self._format(file)
            if kind == 'text':
                texts.append((file, side))
            else:
                shards += list(_SHARDS[kind](file, side))
        return text_shards(texts) + shards

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
        for start, line, record in _READERS[shard.format](file, shard):
            name = f'{file.name}@{start}:{line}' if start else f'{file.name}:{line}'
            try:
                if isinstance(record, bytes):
                    record = _parse(record)
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
    """TooManyBadRecords that names the first bad record beyond the allowed number."""
    if len(bad) > allowed:
        before = f' ({allowed} bad ones before it are left out)' if allowed else ''
        raise TooManyBadRecords(f'{bad[allowed]}{before}; config.data.max_bad_records is {allowed}')


def text_shards(files: list[tuple[File, str]]) -> list[Shard]:
    """Text files in their order, so many together that they are a piece of work."""
    shards, group, size = [], [], 0
    for file, side in files:
        group.append((file, side))
        size += file.size
        if size >= SHARD_BYTES:
            shards.append(Shard('text', tuple(group), size))
            group, size = [], 0
    return shards + ([Shard('text', tuple(group), size)] if group else [])


def read_text(file: File, side: str, fraction: float) -> Iterator[tuple[bool, Document]]:
    """The document of a file, or its two parts; BadRecord when it is empty or not UTF-8."""
    with file.open() as stream:
        content = stream.read()
    if not content.strip():
        raise records.BadRecord('is empty')
    _decode(content)
    cut = len(content) if side == 'train' else 0
    if side == 'tail':
        cut = _cut(content, int(len(content) * (1 - fraction)))
    for heldout, part in ((False, content[:cut]), (True, content[cut:])):
        if part:
            yield heldout, Document(file.name, text=part.decode())


def _cut(content: bytes, near: int) -> int:
    """The last line start at or before `near`; in a text of one line, a start of a character."""
    cut = content.rfind(b'\n', 0, near) + 1
    if cut:
        return cut
    while near > 0 and content[near] & 0xC0 == 0x80:
        near -= 1
    return near


def _decode(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise records.BadRecord(
            f'is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}'
        ) from error


def _parse(line: bytes):
    try:
        return json.loads(_decode(line.removeprefix(b'\xef\xbb\xbf')))
    except (ValueError, RecursionError) as error:
        if isinstance(error, records.BadRecord):
            raise
        raise records.BadRecord(f'not JSON: {error}') from error


def _jsonl_shards(file: File, side: str) -> Iterator[Shard]:
    if not file.size:
        raise DataError(f'{file.path} is empty')
    if file.is_compressed:
        yield Shard('jsonl', ((file, side),), file.size)
        return
    for start in range(0, file.size, SHARD_BYTES):
        stop = min(start + SHARD_BYTES, file.size)
        yield Shard('jsonl', ((file, side),), stop - start, start, stop)


def _read_jsonl(file: File, shard: Shard) -> Iterator[tuple[int, int, bytes]]:
    """(start of the piece, line in the piece, line) of the lines that start inside the piece."""
    start, stop = shard.start, shard.stop or float('inf')
    position, line, is_empty = start, 0, True
    with file.open(max(start - 1, 0)) as stream:
        if start:
            position += len(stream.readline()) - 1
        while position < stop and (content := stream.readline()):
            position += len(content)
            line += 1
            if content.strip():
                is_empty = False
                yield start, line, content
    if is_empty and not start and position >= stop:
        raise DataError(f'{file.path} is empty')
    if is_empty and file.is_compressed:
        raise DataError(f'{file.path} is empty')


def _count_lines(file: File, stop: int) -> int:
    """Lines that start before byte `stop`, which is where a piece starts."""
    lines = left = 0
    with file.open() as stream:
        left = stop
        while left and (block := stream.read(min(left, 1 << 20))):
            lines += block.count(b'\n')
            left -= len(block)
    # A line that begins before the piece and goes on inside it belongs to the piece before.
    return lines + (block[-1:] != b'\n')


def _parquet_shards(file: File, side: str) -> Iterator[Shard]:
    """Neighbouring row groups, so many that they are a piece of work."""
    with _parquet(file) as parquet:
        groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
    if not sum(group.num_rows for group in groups):
        raise DataError(f'{file.path} is empty')
    start = size = row = rows = 0
    for i, group in enumerate(groups):
        size += group.total_byte_size
        rows += group.num_rows
        if size >= SHARD_BYTES or i == len(groups) - 1:
            yield Shard('parquet', ((file, side),), size, start, i + 1, row)
            start, size, row = i + 1, 0, rows


def _read_parquet(file: File, shard: Shard) -> Iterator[tuple[int, int, dict]]:
    number = shard.first_row
    with _parquet(file) as parquet:
        groups = list(range(shard.start, shard.stop))
        for batch in parquet.iter_batches(PARQUET_ROWS, row_groups=groups, use_threads=False):
            for record in batch.to_pylist():
                number += 1
                yield 0, number, record


@contextlib.contextmanager
def _parquet(file: File) -> Iterator:
    """A parquet file, open; what its library raises meanwhile names the file."""
    if file.is_compressed:
        raise DataError(f'{file.path}: a parquet file is not compressed as a whole')
    with file.seekable() as stream:
        try:
            yield find.extra('pyarrow.parquet').ParquetFile(stream)
        except OSError as error:
            # What is no error of the system is pyarrow's way to say that a page makes no sense.
            if type(error) is not OSError or error.errno is not None:
                raise
            raise DataError(f'{file.path} is damaged or cut off: {error}') from error


def _array_record_shards(file: File, side: str) -> Iterator[Shard]:
    with _array_record(file) as reader:
        count = reader.num_records()
    if not count:
        raise DataError(f'{file.path} is empty')
    # A file in a bucket is copied to be read, so it is not read in pieces.
    pieces = 1 if file.path.startswith(S3) else -(-file.size // SHARD_BYTES)
    size = -(-count // pieces)
    for start in range(0, count, size):
        stop = min(start + size, count)
        num_bytes = file.size * (stop - start) // count
        yield Shard('array_record', ((file, side),), num_bytes, start, stop)


def _read_array_record(file: File, shard: Shard) -> Iterator[tuple[int, int, bytes]]:
    with _array_record(file) as reader:
        for start in range(shard.start, shard.stop, PARQUET_ROWS):
            stop = min(start + PARQUET_ROWS, shard.stop)
            for number, record in enumerate(_records(file, reader, start, stop), start + 1):
                yield 0, number, record


def _records(file: File, reader, start: int, stop: int) -> list[bytes]:
    try:
        records = reader.read(start, stop)
    except (RuntimeError, IndexError) as error:
        raise DataError(f'{file.path} is damaged or cut off: {error}') from error
    if len(records) != stop - start:
        raise DataError(f'{file.path} is damaged or cut off: records {start} to {stop}')
    return records


@contextlib.contextmanager
def _array_record(file: File) -> Iterator:
    module = find.extra('array_record.python.array_record_module')
    with file.on_disk() as path:
        reader = module.ArrayRecordReader(path)
        if not reader.ok():
            raise DataError(f'{file.path} is damaged or cut off')
        yield reader


_SHARDS = {
    'jsonl': _jsonl_shards,
    'parquet': _parquet_shards,
    'array_record': _array_record_shards,
}
_READERS = {'jsonl': _read_jsonl, 'parquet': _read_parquet, 'array_record': _read_array_record}

"""File formats: how text, .jsonl, .parquet and .array_record are split into shards and read.

A `Shard` is a piece of work. Readers yield (start, number, record): records are numbered from 1 at
byte `start` of the file, which is 0 for all formats but .jsonl.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator

from jaxfm.data.documents import Document
from jaxfm.data.sources import records
from jaxfm.errors import DataError
from jaxfm.storage import find
from jaxfm.storage.find import File

# Bytes in a shard. The names of documents depend on it.
SHARD_BYTES = 32 << 20
# Rows in memory at a time.
PARQUET_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Shard:
    """A piece of work: some text files, or part of one file of records."""

    format: str
    # (file, side); a side is train, heldout, hash (of each record) or tail (of each text).
    files: tuple[tuple[File, str], ...]
    num_bytes: int
    # [start, stop) of the file: bytes of jsonl, row groups of parquet, else record numbers.
    start: int = 0
    stop: int = 0
    # Rows of a parquet file before `start`.
    first_row: int = 0

    @property
    def has_whole_files(self) -> bool:
        """Whether documents are whole files, of which duplicates are dropped."""
        return self.format == 'text'


def make_text_shards(files: list[tuple[File, str]]) -> list[Shard]:
    """Groups text files, in order, into shards."""
    shards, group, size = [], [], 0
    for file, side in files:
        group.append((file, side))
        size += file.size
        if size >= SHARD_BYTES:
            shards.append(Shard('text', tuple(group), size))
            group, size = [], 0
    return shards + ([Shard('text', tuple(group), size)] if group else [])


def read_text(file: File, side: str, fraction: float) -> Iterator[tuple[bool, Document]]:
    """Yields a file's document, or its two parts. Raises BadRecord if it is empty or not UTF-8."""
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
    """The last line start at or before `near`, or a character's start if there is only one line."""
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


def parse_line(line: bytes):
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
    """(start of the shard, line number in it, line) of the lines that start inside the shard."""
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


def count_lines(file: File, stop: int) -> int:
    """The number of lines that start before byte `stop`, where a shard starts."""
    lines = left = 0
    with file.open() as stream:
        left = stop
        while left and (block := stream.read(min(left, 1 << 20))):
            lines += block.count(b'\n')
            left -= len(block)
    # A line that continues into the shard belongs to the shard before.
    return lines + (block[-1:] != b'\n')


def _parquet_shards(file: File, side: str) -> Iterator[Shard]:
    """Groups neighbouring row groups into shards."""
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
    """Opens a parquet file; errors of its library become a DataError with the file's name."""
    if file.is_compressed:
        raise DataError(f'{file.path}: a compressed parquet file cannot be read; decompress it')
    with file.seekable() as stream:
        try:
            yield find.extra('pyarrow.parquet').ParquetFile(stream)
        except OSError as error:
            # For a damaged page pyarrow raises a plain OSError without an errno.
            if type(error) is not OSError or error.errno is not None:
                raise
            raise DataError(f'{file.path} is damaged or cut off: {error}') from error


def _array_record_shards(file: File, side: str) -> Iterator[Shard]:
    with _array_record(file) as reader:
        count = reader.num_records()
    if not count:
        raise DataError(f'{file.path} is empty')
    # A remote file is copied to disk before it is read, so it must stay one shard.
    pieces = 1 if file.is_remote else -(-file.size // SHARD_BYTES)
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
        raise DataError(
            f'{file.path} is damaged or cut off: some of records {start} to {stop} are missing'
        )
    return records


@contextlib.contextmanager
def _array_record(file: File) -> Iterator:
    module = find.extra('array_record.python.array_record_module')
    with file.on_disk() as path:
        reader = module.ArrayRecordReader(path)
        if not reader.ok():
            raise DataError(f'{file.path} is damaged or cut off')
        yield reader


SHARDS = {
    'jsonl': _jsonl_shards,
    'parquet': _parquet_shards,
    'array_record': _array_record_shards,
}
READERS = {'jsonl': _read_jsonl, 'parquet': _read_parquet, 'array_record': _read_array_record}

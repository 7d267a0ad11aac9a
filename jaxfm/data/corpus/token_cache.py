"""The token cache: the ids of many documents in one memory-mapped file.

One side (train, heldout) of a corpus consists of these files:

- `<side>.tokens`: all documents one after another, uint16 or uint32. A text is [bos] ids eos, a
  chat is what its template makes of it;
- `<side>.offsets.npy`: int64 [D + 1], where in the stream each document starts, then its end;
- `<side>.bytes.npy`: int64 [D], UTF-8 bytes of each document;
- `<side>.mask`: uint8, chats only: which tokens the assistant must produce, in bits.

The held-out side also has `heldout.documents`, its documents as JSON lines. A corpus is built in
parts; `join` makes these files from those of all parts.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxfm.data.documents import Document, Kind
from jaxfm.errors import DataError
from jaxfm.storage import whole
from jaxfm.storage.files import explain_errors

SIDES = ('train', 'heldout')
# Bits of a mask: the token counts; it is of a chat that is not wanted, or the worse of two; it is
# the first of a chat that is not the first one of its document.
COUNTS, WORSE, BEGINS = 1, 2, 4
# At most this much text of the held-out documents is kept, for evaluators that need it.
HELDOUT_TEXT_BYTES = 1 << 28


class TokenCache:
    """Token ids of one side of a corpus, read from disk on demand."""

    def __init__(
        self, directory: Path, side: str, vocab_size: int, fingerprint: str, kind: Kind = 'text'
    ):
        directory = Path(directory)
        self.path = directory / f'{side}.tokens'
        self.vocab_size = vocab_size
        # Changes with any token of the corpus, the other side included.
        self.fingerprint = fingerprint
        self.kind, self.is_chat = kind, kind != 'text'
        # [D + 1]: document d is tokens[offsets[d]:offsets[d + 1]].
        self.offsets = np.load(directory / f'{side}.offsets.npy', mmap_mode='r')
        # [D]: UTF-8 bytes of each document.
        self.document_bytes = np.load(directory / f'{side}.bytes.npy', mmap_mode='r')
        # [N].
        self.tokens = np.memmap(self.path, token_dtype(vocab_size), 'r')
        # [N]: which tokens count, and how; None: every token but the first of a document.
        self.mask = np.memmap(directory / f'{side}.mask', np.uint8, 'r') if self.is_chat else None

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def num_documents(self) -> int:
        return len(self.document_bytes)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all documents: the denominator of bits per byte."""
        return int(self.document_bytes.sum())


class Writer:
    """Writes one side of a part, one document at a time.

    Use it in a `with` block: everything is on disk once the block ends without an error.
    """

    def __init__(self, directory: Path, side: str, vocab_size: int):
        self._directory, self._side, self._vocab_size = Path(directory), side, vocab_size
        self._files = {}
        self._rows, self._digests = [], []

    def add(
        self, document: Document, ids: np.ndarray, mask: np.ndarray | None, has_digest: bool
    ) -> None:
        """Adds a document: all its ids [n] and, for a chat, the mask [n] of those that count.

        Raises DataError unless all ids are in [0, vocab_size).
        """
        if not 0 <= ids.min() <= ids.max() < self._vocab_size:
            raise DataError(f'{document.name}: a token id is outside [0, {self._vocab_size})')
        self._file('tokens').write(ids.astype(token_dtype(self._vocab_size)).tobytes())
        if mask is not None:
            self._file('mask').write(mask.astype(np.uint8).tobytes())
        if self._side == 'heldout':
            self._file('documents').write(_to_line(document))
        if has_digest:
            self._digests.append(hashlib.sha256(document.text.encode()).digest()[:16])
        counted = 0 if mask is None else int((mask & COUNTS).sum())
        self._rows.append((len(ids), document.num_bytes, counted))

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self._finish()
        finally:
            for file in self._files.values():
                file.close()

    def _finish(self) -> None:
        for file in self._files.values():
            whole.sync(file)
        rows = np.array(self._rows, np.int64).reshape(-1, 3)
        _save(self._directory / f'{self._side}.rows.npy', rows)
        if self._digests:
            digests = np.frombuffer(b''.join(self._digests), np.uint8).reshape(-1, 16)
            _save(self._directory / f'{self._side}.digests.npy', digests)

    def _file(self, suffix: str):
        if suffix not in self._files:
            self._files[suffix] = open(self._directory / f'{self._side}.{suffix}', 'wb')
        return self._files[suffix]


def join(parts: Sequence[Path], directory: Path, vocab_size: int) -> dict[str, int | dict]:
    """Joins parts into the files of both sides; keeps one of equal whole files, held-out first.

    Returns statistics of each side: documents, bytes, tokens, and the distribution of lengths.
    """
    seen: set[bytes] = set()
    statistics, duplicates = {}, 0
    for side in ('heldout', 'train'):
        kept = [_choose_kept(part, side, seen) for part in parts]
        rows = [np.load(part / f'{side}.rows.npy') for part in parts]
        duplicates += sum(len(one) - int(keep.sum()) for one, keep in zip(rows, kept))
        for suffix, dtype in (('tokens', token_dtype(vocab_size)), ('mask', np.dtype(np.uint8))):
            _join_arrays(parts, directory / f'{side}.{suffix}', dtype, rows, kept)
        if side == 'heldout':
            _join_documents(parts, directory, kept)
        rows = np.concatenate([one[keep] for one, keep in zip(rows, kept)])
        _save(directory / f'{side}.offsets.npy', np.concatenate([[0], np.cumsum(rows[:, 0])]))
        _save(directory / f'{side}.bytes.npy', np.ascontiguousarray(rows[:, 1]))
        statistics[side] = _statistics(side, rows)
    flat = statistics['train'] | statistics['heldout']
    return flat | {'duplicates_dropped': duplicates}


def read_documents(directory: Path) -> list[Document]:
    """The held-out documents that fit into HELDOUT_TEXT_BYTES."""
    with open(Path(directory) / 'heldout.documents', encoding='utf-8') as file:
        return [_from_line(line) for line in file]


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of the two dtypes that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _choose_kept(part: Path, side: str, seen: set[bytes]) -> np.ndarray:
    """Which documents of a part were not seen before, bool [D]."""
    digests = part / f'{side}.digests.npy'
    if not digests.exists():
        return np.ones(len(np.load(part / f'{side}.rows.npy')), bool)
    keep = []
    for digest in np.load(digests):
        keep.append(digest.tobytes() not in seen)
        seen.add(digest.tobytes())
    return np.array(keep, bool)


def _join_arrays(parts, path: Path, dtype: np.dtype, rows, kept) -> None:
    sources = [part / path.name for part in parts]
    if not any(source.exists() for source in sources):
        return
    with open(path, 'wb') as file:
        for source, lengths, keep in zip(sources, rows, kept):
            if not source.exists():
                continue
            expected = int(lengths[:, 0].sum()) * dtype.itemsize
            if source.stat().st_size != expected:
                size = source.stat().st_size
                raise DataError(f'{source} has {size} bytes instead of {expected}; remove it')
            for start, stop in _ranges(lengths[:, 0] * dtype.itemsize, keep):
                _copy(source, start, stop, file)
        whole.sync(file)


def _ranges(sizes: np.ndarray, keep: np.ndarray) -> Iterator[tuple[int, int]]:
    """[start, stop) of each run of kept documents, in the unit of `sizes`."""
    ends = np.concatenate([[0], np.cumsum(sizes)])
    edges = np.flatnonzero(np.diff(np.concatenate([[0], keep.astype(np.int8), [0]])))
    for first, last in edges.reshape(-1, 2):
        yield int(ends[first]), int(ends[last])


def _copy(source: Path, start: int, stop: int, out) -> None:
    with open(source, 'rb') as file:
        file.seek(start)
        if stop == os.fstat(file.fileno()).st_size:
            shutil.copyfileobj(file, out, 1 << 22)
            return
        while start < stop:
            block = file.read(min(stop - start, 1 << 22))
            out.write(block)
            start += len(block)


def _join_documents(parts, directory: Path, kept) -> None:
    left = HELDOUT_TEXT_BYTES
    with open(directory / 'heldout.documents', 'wb') as out:
        for part, keep in zip(parts, kept):
            path = part / 'heldout.documents'
            if not path.exists() or left <= 0:
                continue
            with open(path, 'rb') as file:
                for line, is_kept in zip(file, keep):
                    left -= len(line) * bool(is_kept)
                    if is_kept and left >= 0:
                        out.write(line)
        whole.sync(out)


def _statistics(side: str, rows: np.ndarray) -> dict[str, int]:
    lengths = rows[:, 0]
    statistics = {
        'documents': len(rows),
        'bytes': int(rows[:, 1].sum()),
        'tokens': int(lengths.sum()),
    }
    if rows[:, 2].any():
        statistics['supervised_tokens'] = int(rows[:, 2].sum())
    if len(rows):
        quantiles = np.quantile(lengths, [0.5, 0.9, 0.99], method='nearest')
        statistics['longest_document'] = int(lengths.max())
        for name, value in zip(('p50', 'p90', 'p99'), quantiles):
            statistics[f'length_{name}'] = int(value)
        statistics |= {f'length_histogram/{to}': n for to, n in _histogram(lengths).items()}
    return {f'{side}_{name}': value for name, value in statistics.items()}


def _histogram(lengths: np.ndarray) -> dict[str, int]:
    """{'64': documents of 33 to 64 tokens, ...}, in powers of two."""
    buckets = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    counts = np.bincount(buckets)
    return {str(1 << i): int(count) for i, count in enumerate(counts) if count}


def _to_line(document: Document) -> bytes:
    fields = {'name': document.name, 'text': document.text, 'messages': document.messages}
    fields |= {'tools': document.tools, 'group': document.group, 'rejected': document.rejected}
    fields |= {'is_wanted': document.is_wanted, 'num_given': document.num_given}
    usual = {field.name: field.default for field in dataclasses.fields(Document)}
    fields = {key: value for key, value in fields.items() if value != usual[key]}
    return json.dumps(fields, ensure_ascii=False).encode() + b'\n'


def _from_line(line: str) -> Document:
    fields = json.loads(line)
    for key in ('messages', 'tools', 'rejected'):
        fields[key] = tuple(fields.get(key, ()))
    return Document(**fields)


def _save(path: Path, array: np.ndarray) -> None:
    with open(path, 'wb') as file:
        np.save(file, array)
        whole.sync(file)


def explain_cache_errors(directory: Path) -> contextlib.AbstractContextManager[None]:
    """Turns an OSError in a `with` block into an error that says where caches are kept."""
    denied = f'{directory.parent} cannot be written: permission denied'
    return explain_errors(f'the token cache in {directory.parent}', denied=denied)

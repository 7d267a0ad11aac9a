"""The GGUF container: metadata by key and tensors by name, in one memory-mapped file.

Format: ggml's docs/gguf.md, versions 2 and 3, little-endian. We parse the header ourselves, because
the package `gguf` takes three seconds for a vocabulary of 49k tokens (0.1 s here) and trusts
corrupt lengths. The package only dequantises blocks.
"""

import dataclasses
import functools
import math
import mmap
import struct
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxfm.errors import DataError, MissingInputError, listed
from jaxfm.storage.files import explain_errors

MAGIC, VERSIONS = b'GGUF', (2, 3)

_STRING, _ARRAY, _FLOAT32 = 8, 9, 6
# {number of a metadata type: its format character in `struct`}.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, _FLOAT32, 7, 10, 11, 12), 'BbHhIif?Qqd'))
_MOST_DIMENSIONS = 4  # ggml's limit
# Tensor types that are not quantised, by their number in ggml.
_PLAIN = {0: np.dtype('<f4'), 1: np.dtype('<f2'), 30: np.dtype(ml_dtypes.bfloat16)}
# Values dequantised at once, so that temporary arrays stay in the CPU cache.
_CHUNK = 1 << 16


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor as stored, in blocks along the last axis; the bytes stay in the mapped file.

    Attributes:
        kind: the number of its type in ggml.
        blocks: [..., blocks per row, bytes per block], uint8.
    """

    shape: tuple[int, ...]
    kind: int
    blocks: np.ndarray

    @property
    def dtype(self) -> np.dtype:
        """The file's dtype, or float32 if the tensor is quantised."""
        return _PLAIN.get(self.kind, np.dtype(np.float32))

    def read(self, index: tuple = ()) -> np.ndarray:
        """A slice of the tensor.

        Args:
            index: a slice or an array for each leading axis, a slice with a positive step for the
                last one. Missing entries mean all.
        """
        index = (*index, *[slice(None)] * (len(self.shape) - len(index)))
        leading, last = index[:-1], index[-1]
        if self.kind in _PLAIN:
            return self.blocks.view(self.dtype)[..., 0][leading][..., last]
        size = _block_sizes()[self.kind][0]
        start, stop, step = last.indices(self.shape[-1])
        first = start // size
        blocks = self.blocks[leading][..., first : -(-stop // size), :]
        values = _dequantize(blocks, self.kind, size)
        return values[..., start - first * size : stop - first * size : step]


class Header:
    """Reads values one after another; raises DataError if the file ends within a value."""

    def __init__(self, path: Path, content: mmap.mmap):
        self.path, self.at = path, 0
        self._content = content

    def error(self, what: str) -> DataError:
        return DataError(f'{self.path} is damaged: {what}')

    def numbers(self, letter: str, count: int = 1) -> tuple:
        """`count` numbers of the `struct` format character `letter`."""
        self._check(count * struct.calcsize(f'<{letter}'))
        values = struct.unpack_from(f'<{count}{letter}', self._content, self.at)
        self.at += count * struct.calcsize(f'<{letter}')
        return values

    def number(self, letter: str):
        return self.numbers(letter)[0]

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        self._check(8 * count)
        content, at, end = self._content, self.at, len(self._content)
        length_of, found = struct.Struct('<Q').unpack_from, []
        for _ in range(count):
            if at + 8 > end or (stop := at + 8 + length_of(content, at)[0]) > end:
                raise self.error(f'the string at byte {at} runs past the end of the file')
            found.append(content[at + 8 : stop])
            at = stop
        self.at = at
        try:
            return [text.decode() for text in found]
        except UnicodeDecodeError as error:
            raise self.error(f'a string in the header is not UTF-8: {error}') from error

    def value(self):
        """A metadata value, which is preceded by its type."""
        kind = self.number('I')
        if kind != _ARRAY:
            value = self.values(kind, 1)[0]
            return shortest_decimal(value) if kind == _FLOAT32 else value
        kind, count = self.number('I'), self.number('Q')
        return self.values(kind, count)

    def values(self, kind: int, count: int) -> list:
        if kind == _STRING:
            return self.strings(count)
        if kind not in _SCALARS:
            raise self.error(f'unknown metadata type {kind} at byte {self.at}')
        return list(self.numbers(_SCALARS[kind], count))

    def _check(self, size: int) -> None:
        if self.at + size > len(self._content):
            raise self.error(
                f'the header runs past the end of the file at {len(self._content)} bytes'
            )


def shortest_decimal(value: float) -> float:
    """The shortest decimal that rounds to this float32: 1e-5 instead of 9.99999975e-06."""
    return float(str(np.float32(value)))


def read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Metadata and tensors of a file.

    Raises:
        MissingInputError, PermissionDeniedError: the file does not exist or is not readable.
        DataError: it is not a GGUF file, has an unsupported version, is damaged or truncated, is
            one of several parts, or has tensors of an unsupported type.
    """
    content = _map_file(path)
    header = Header(path, content)
    _check_version(header)
    tensor_count, key_count = header.numbers('Q', 2)
    metadata = {}
    for _ in range(key_count):
        key = header.string()
        if key in metadata:
            raise header.error(f'the key {key} occurs twice')
        metadata[key] = header.value()
    if (parts := metadata.get('split.count', 1)) != 1:
        raise DataError(f'{path} is one of {parts} parts: join them with llama-gguf-split --merge')
    infos = [_tensor_info(header) for _ in range(tensor_count)]
    alignment = metadata.get('general.alignment', 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise header.error(f'general.alignment is {alignment!r}, not a whole number above 0')
    return metadata, _tensors(header, content, alignment, infos)


def _map_file(path: Path) -> mmap.mmap:
    failure, denied = f'{path} cannot be read', f'{path} may not be read'
    with explain_errors(failure, MissingInputError, denied=denied), open(path, 'rb') as file:
        if not file.read(1):
            raise DataError(f'{path} is not a GGUF file: it is empty')
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _check_version(header: Header) -> None:
    magic = bytes(header.numbers('B', 4))
    if magic != MAGIC:
        raise DataError(
            f'{header.path} is not a GGUF file: it starts with {magic!r}, not {MAGIC!r}'
        )
    version = header.number('I')
    if version in VERSIONS:
        return
    if int.from_bytes(version.to_bytes(4, 'big'), 'little') in VERSIONS:
        raise DataError(f'{header.path} is big-endian; only little-endian files are supported')
    raise DataError(f'{header.path} is GGUF version {version}; versions 2 and 3 are supported')


def _tensor_info(header: Header) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset of a tensor."""
    name, dimensions = header.string(), header.number('I')
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise header.error(f'{name} has {dimensions} dimensions, not 1 to {_MOST_DIMENSIONS}')
    shape = header.numbers('Q', dimensions)[::-1]  # the file lists the fastest axis first
    return name, shape, header.number('I'), header.number('Q')


def _tensors(header: Header, content: mmap.mmap, alignment: int, infos: list) -> dict[str, Tensor]:
    """The tensors, which follow the header; raises DataError with the names of bad ones."""
    data = np.frombuffer(content, np.uint8)
    start = next_at = _round_up(header.at, alignment)
    tensors, twice, unread, ragged, misplaced, beyond = {}, [], {}, [], [], []
    for name, shape, kind, offset in infos:
        if name in tensors:
            twice.append(name)
        elif not _is_read(kind):
            unread.setdefault(_kind_name(kind), []).append(name)
        else:
            size, block_bytes = _block_sizes()[kind]
            rows, begin = math.prod(shape[:-1]), start + offset
            blocks = (*shape[:-1], shape[-1] // size, block_bytes)
            end = begin + math.prod(blocks)
            if begin != next_at:
                misplaced.append(name)
            next_at = _round_up(end, alignment)
            if shape[-1] % size or not rows:
                ragged.append(f'{name} {list(shape)}')
            elif end > len(data):
                beyond.append(name)
            else:
                tensors[name] = Tensor(shape, kind, data[begin:end].reshape(blocks))
    if unread:
        found = ', '.join(f'{kind} ({listed(names)})' for kind, names in unread.items())
        raise DataError(
            f'{header.path} has tensors of unsupported types: {found}; supported: '
            f'{", ".join(readable_kinds())}'
        )
    for names, what in (
        (twice, 'is damaged: tensors occur twice'),
        (ragged, 'is damaged: tensor shapes do not fit the block size of their types'),
        (misplaced, 'is damaged: tensors do not start where the previous one ends'),
        (beyond, f'is truncated: tensors run past its end at {len(data)} bytes'),
    ):
        if names:
            raise DataError(f'{header.path} {what}: {listed(names)}')
    return tensors


def _round_up(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment


def readable_kinds() -> list[str]:
    """The names of all supported tensor types."""
    return [_kind_name(int(kind)) for kind in _block_sizes() if _is_read(int(kind))]


def _dequantize(blocks: np.ndarray, kind: int, size: int) -> np.ndarray:
    """The float32 values of blocks [..., blocks, bytes], computed chunk by chunk."""
    import gguf

    type_of_blocks = gguf.GGMLQuantizationType(kind)
    flat = blocks.reshape(-1, blocks.shape[-1])
    values = np.empty((len(flat), size), np.float32)
    step = max(_CHUNK // size, 1)
    for i in range(0, len(flat), step):
        chunk = flat[i : i + step]
        row = chunk.reshape(1, -1)  # one row: the package loops over rows, sixteen at a time
        values[i : i + step] = gguf.dequantize(row, type_of_blocks).reshape(-1, size)
    return values.reshape(*blocks.shape[:-2], blocks.shape[-2] * size)


@functools.cache
def _is_read(kind: int) -> bool:
    if kind in _PLAIN:
        return True
    if kind not in _block_sizes():
        return False
    size, block_bytes = _block_sizes()[kind]
    try:
        _dequantize(np.zeros((1, block_bytes), np.uint8), kind, size)
    except NotImplementedError:
        return False
    return True


@functools.cache
def _block_sizes() -> dict[int, tuple[int, int]]:
    """{type: (values per block, bytes per block)}."""
    import gguf  # imported late: it takes 0.1 s, and only .gguf files need it

    return gguf.GGML_QUANT_SIZES


def _kind_name(kind: int) -> str:
    import gguf

    return gguf.GGMLQuantizationType(kind).name if kind in _block_sizes() else f'number {kind}'

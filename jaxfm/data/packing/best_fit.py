"""Best-fit decreasing: assigns pieces to rows, and keeps the result in an index file.

The index is an array file next to the token cache. It is memory-mapped, so opening it costs nothing
and the processes of a machine share it.
"""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxfm.errors import DataError
from jaxfm.storage.whole import write_file

log = logging.getLogger('jaxfm')

# Pieces are packed in groups of this many. This bounds time and memory and keeps the pieces of a
# row close together on disk, at no measurable loss of packing efficiency.
GROUP = 1 << 20
# Raise this when the layout of the file or the algorithm changes.
FORMAT = 2
# An index file is int64: this header, then row_offsets, starts and sizes.
_COUNTS = ('tokens', 'cut_documents', 'truncated_documents', 'truncated_tokens')
_COUNTS += ('dropped_documents',)
_HEADER = ('format', 'identity', 'num_rows', 'num_pieces', *_COUNTS)


class Rooms:
    """Rows that are not full, grouped by how much room they have."""

    def __init__(self, capacity: int):
        self._rows = [[] for _ in range(capacity + 1)]  # arrays of rows, by room
        self._present = 0  # bit r: some row has room r

    def put(self, room: int, rows: np.ndarray) -> None:
        """Adds rows that have this much room; full rows are not kept."""
        if room and len(rows):
            self._rows[room].append(rows)
            self._present |= 1 << room

    def take(self, length: int) -> tuple[int, np.ndarray]:
        """Removes and returns (room, rows): the least room that fits `length`; 0 if none does."""
        fitting = self._present >> length
        if not fitting:
            return 0, np.zeros(0, np.int64)
        room = length + (fitting & -fitting).bit_length() - 1
        rows, self._rows[room] = np.concatenate(self._rows[room]), []
        self._present ^= 1 << room
        return room, rows


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Packs items, the longest first, each into the fullest row that has room for it.

    Returns the row of every item [P] and the number of rows.

    Items of the same length are placed together: after the fullest row that fits has taken one, it
    is still the fullest that fits, until it has no room. So a row takes `room // length` at once.
    """
    order, counts = np.argsort(-lengths, kind='stable'), np.bincount(lengths)
    row_of, done, num_rows = np.empty(len(lengths), np.int64), 0, 0
    rooms = Rooms(capacity)
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            room, rows = rooms.take(length)
            if not room:
                room, opened = capacity, -(-left // (capacity // length))
                rows = np.arange(num_rows, num_rows + opened)
                num_rows += opened
            each = room // length
            taken = min(left, len(rows) * each)
            row_of[order[done : done + taken]] = np.repeat(rows, each)[:taken]
            full, rest = divmod(taken, each)
            rooms.put(room - each * length, rows[:full])
            rooms.put(room - rest * length, rows[full : full + 1])
            rooms.put(room, rows[full + 1 :])
            left, done = left - taken, done + taken
    return row_of, num_rows


def pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Packs pieces into rows; row r gets order[row_offsets[r] : row_offsets[r + 1]].

    Returns (order [P], row_offsets [R + 1]).
    """
    order, per_row = [np.zeros(0, np.int64)], [np.zeros(1, np.int64)]
    for first in range(0, len(lengths), GROUP):
        row_of, num_rows = best_fit_decreasing(lengths[first : first + GROUP], capacity)
        order.append(first + np.argsort(row_of, kind='stable'))
        per_row.append(np.bincount(row_of, minlength=num_rows))
    return np.concatenate(order), np.cumsum(np.concatenate(per_row))


def ranges(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Concatenates np.arange(first[i], first[i] + counts[i]) over all i."""
    before = np.cumsum(counts) - counts
    return np.repeat(first - before, counts) + np.arange(counts.sum())


@dataclasses.dataclass(frozen=True)
class Index:
    """Which pieces each row has: row r has [row_offsets[r], row_offsets[r + 1])."""

    row_offsets: np.ndarray  # int64 [R + 1]
    starts: np.ndarray  # int64 [P]: where in the stream a piece begins
    sizes: np.ndarray  # int64 [P]: twice the length, plus one if the document continues after it
    counts: dict[str, int]  # statistics
    path: Path | None = None

    @property
    def num_rows(self) -> int:
        return len(self.row_offsets) - 1

    def pieces(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(number of pieces of each of these rows, indices of all these pieces)."""
        first, stop = self.row_offsets[rows], self.row_offsets[rows + 1]
        if first.min(initial=0) < 0 or (stop < first).any() or (stop > len(self.sizes)).any():
            raise DataError(f'{self.path} is damaged; remove it to have it built again')
        return stop - first, ranges(first, stop - first)


def open_index(path: Path, identity: int, build: Callable[[], Index]) -> Index:
    """Opens an index file; builds it if it is missing, damaged, or of other tokens (`identity`).

    If the file cannot be written, the index is kept in memory only.
    """
    if (index := _read(path, identity)) is not None:
        return index
    index = build()
    try:
        _write(path, identity, index)
    except OSError as error:
        log.warning(
            '%s cannot be written (%s); rows are packed again at every start', path, error.strerror
        )
        return index
    return _read(path, identity) or index


def _write(path: Path, identity: int, index: Index) -> None:
    known = {'format': FORMAT, 'identity': identity, 'num_rows': index.num_rows}
    known |= {'num_pieces': len(index.starts)} | index.counts
    header = np.array([known.get(name, 0) for name in _HEADER], np.int64)
    with write_file(path) as file:
        np.save(file, np.concatenate([header, index.row_offsets, index.starts, index.sizes]))


def _read(path: Path, identity: int) -> Index | None:
    try:
        content = np.load(path, mmap_mode='r')
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        log.warning('%s is damaged (%s); packing the rows again', path, error)
        return None
    header = content[: len(_HEADER)].tolist() if content.ndim == 1 else []
    known = dict(zip(_HEADER, header))
    if (known.get('format'), known.get('identity')) != (FORMAT, identity):
        return None
    num_rows, num_pieces = known['num_rows'], known['num_pieces']
    ends = np.cumsum([len(_HEADER), num_rows + 1, num_pieces, num_pieces])
    if ends[-1] != len(content) or content[ends[1] - 1] != num_pieces:
        log.warning('%s is damaged (its sizes do not agree); packing the rows again', path)
        return None
    _, row_offsets, starts, sizes, _ = np.split(np.asarray(content), ends)
    return Index(row_offsets, starts, sizes, {name: known.get(name, 0) for name in _COUNTS}, path)

"""The Grain pipeline: from the number of a step to its batch, made ahead by a thread.

Grain selects and shuffles the numbers of rows; packed rows are made a batch at a time from their
numbers, because a Python object for every row of tokens would take several times as long. This
module imports Grain, which takes a third of a second, so it is imported for the first batch.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from jaxfm.data.mixture import Mixture
from jaxfm.data.order import shuffle
from jaxfm.data.packing.rows import Packing

# The batches that may wait on the devices for their step.
AHEAD = 2
# Steps after which the data would end; far more than a run has.
ENDLESS = 1 << 40


class Share(grain.transforms.DatasetSelectionMap):
    """Which source, and which of its rows, each row of this process is.

    Element i is row `rows[i % len(rows)]` of the global batch of step `i // len(rows)`. The batch
    of step 0 begins at global row `first`.
    """

    def __init__(self, mixture: Mixture, first: int, batch_size: int, rows: np.ndarray):
        self._mixture, self._first, self._batch_size = mixture, first, batch_size
        self._rows, self._num_rows = rows, len(rows)
        # A step is asked for row by row, but located at once.
        self._step = functools.lru_cache(maxsize=2)(self._locate)

    def __len__(self) -> int:
        return ENDLESS * self._num_rows

    def __getitem__(self, index: int) -> tuple[int, int]:
        step, place = divmod(index, self._num_rows)
        return self._step(step)[place]

    def _locate(self, step: int) -> list[tuple[int, int]]:
        return self._mixture.locate_all(self._first + step * self._batch_size + self._rows)


class PackedRows:
    """Makes batches of rows that are numbered through the packings, one after another."""

    def __init__(self, packings: Sequence[Packing]):
        self._packings = packings
        self._ends = np.cumsum([packing.num_rows for packing in packings])

    def ranges(self) -> list[range]:
        """The numbers of the rows of each packing."""
        return [range(end - p.num_rows, end) for p, end in zip(self._packings, self._ends.tolist())]

    def make(self, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        """The batch of these rows, each array [len(numbers), T]."""
        numbers = np.array(numbers, np.int64)
        which = np.searchsorted(self._ends, numbers, side='right')
        parts = []
        for source, (packing, own) in enumerate(zip(self._packings, self.ranges())):
            if len(chosen := np.flatnonzero(which == source)):
                parts.append((chosen, packing.rows(numbers[chosen] - own.start)))
        return _merge(parts, len(numbers))


def _merge(parts: list[tuple[np.ndarray, dict]], num_rows: int) -> dict[str, np.ndarray]:
    """Merges [(rows of the batch, arrays of these rows)] into one batch."""
    if len(parts) == 1:
        return parts[0][1]
    batch = {}
    for name, array in parts[0][1].items():
        batch[name] = np.empty((num_rows, *array.shape[1:]), array.dtype)
        for chosen, part in parts:
            batch[name][chosen] = part[name]
    return batch


def packed_batches(
    packings: Sequence[Packing], seeds: Sequence[int], share: Share, num_rows: int
) -> grain.IterDataset:
    """The batches of `num_rows` rows of this process; the state is {'next_index': step}."""
    packed = PackedRows(packings)
    orders = [shuffle(rows, seed) for rows, seed in zip(packed.ranges(), seeds)]
    batches = grain.MapDataset.select_from_datasets(orders, share).batch(
        num_rows, batch_fn=packed.make
    )
    # Without threads of its own: the one that puts batches on the devices makes them, too.
    return batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))


class Streamed(grain.IterDataset):
    """The batches of a maker: it has `make()`, and `get_state` and `set_state` as an iterator."""

    def __init__(self, maker):
        super().__init__()
        self._maker = maker

    def __iter__(self) -> grain.DatasetIterator:
        return _StreamedIterator(self._maker)


class _StreamedIterator(grain.DatasetIterator):
    def __init__(self, maker):
        super().__init__()
        self._maker = maker

    def __next__(self):
        return self._maker.make()

    def get_state(self) -> dict[str, Any]:
        return self._maker.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._maker.set_state(state)


class _Guarded(grain.IterDataset):
    """The same elements, for a thread: whatever is raised while they are made is an Exception.

    After a panic of a library or sys.exit in a source, Grain's thread would end without a word, and
    the run would wait for its batch for ever.
    """

    def __init__(self, inner: grain.IterDataset):
        super().__init__(inner)
        self._inner = inner

    def __iter__(self) -> grain.DatasetIterator:
        return _GuardedIterator(iter(self._inner))


class _GuardedIterator(grain.DatasetIterator):
    def __init__(self, inner: grain.DatasetIterator):
        super().__init__(inner)
        self._inner = inner

    def __next__(self):
        try:
            return next(self._inner)
        except Exception:
            raise
        except BaseException as error:
            raise RuntimeError(f'{type(error).__name__}: {error}') from error

    def get_state(self) -> dict[str, Any]:
        return self._inner.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._inner.set_state(state)


def open_batches(
    batches: grain.IterDataset,
    state: Mapping[str, Any],
    put: Callable[[dict], dict] | None,
) -> grain.DatasetIterator:
    """An iterator from a state on, which must be closed.

    put: puts a batch on the devices. If it is given, a thread does that for the next AHEAD
    batches, and makes one more; the state of the iterator is still that of the last delivered one.
    """
    if put is not None:
        batches = _Guarded(batches.map(put))
        batches = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=AHEAD)
    iterator = iter(batches)
    iterator.set_state(state)
    return iterator

"""The order of a source's rows: every epoch has all of them, shuffled anew.

The n-th row is computed from (seed, n) alone, so seeking is O(1). This module imports Grain, which
takes a third of a second, so it is imported when the first row is needed.
"""

import functools
import sys

import grain
import numpy as np

# Grain finds a row by walking the cycles of a 16-bit cipher until it meets a number in range. That
# takes 5 ms per row for 5 rows, 10 us per row for 4096. Fewer rows than this are sorted by a hash.
FEW_ROWS = 1 << 12


def shuffle(rows: range, seed: int) -> grain.MapDataset:
    """Element n is the n-th of `rows` in the order of training, also after the first epoch."""
    seed %= 2**32  # Grain takes 32 bits
    if len(rows) < FEW_ROWS:
        return _ShuffledByHash(rows, seed)
    return grain.MapDataset.range(rows.start, rows.stop).seed(seed).shuffle()


class _ShuffledByHash(grain.MapDataset):
    """Every epoch has the rows sorted by a hash of (seed, epoch, row)."""

    def __init__(self, rows: range, seed: int):
        super().__init__()
        self._rows, self._hash_seed = rows, seed
        self._epoch = functools.lru_cache(maxsize=2)(self._permutation)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, n: int) -> int:
        epoch, within = divmod(n, len(self._rows))
        return self._epoch(epoch)[within]

    def _permutation(self, epoch: int) -> list[int]:
        numbers = np.arange(len(self._rows), dtype=np.uint64)
        for word in (self._hash_seed, epoch):
            # Start the sequence elsewhere for every seed, and for every epoch of a seed.
            numbers = numbers + _mix(np.array([word], np.uint64))
            numbers = _mix(numbers)
        return (self._rows.start + np.argsort(numbers)).tolist()


def _mix(numbers: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele et al. 2014): a bijection on 64 bits, so no two rows tie."""
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))

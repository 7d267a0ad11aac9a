"""The order of a source's rows: every epoch has all of them, shuffled anew.

The n-th row is computed from (seed, n) alone, so seeking is O(1).
"""

import functools

import numpy as np

# Grain finds a row by walking the cycles of a 16-bit cipher until it meets a number in range. That
# takes 5 ms per row for 5 rows, 10 us per row for 4096. Fewer rows than this are sorted by a hash.
FEW_ROWS = 1 << 12


class Order:
    """order[n] is the number of the n-th row of training."""

    def __init__(self, num_rows: int, seed: int):
        self._num_rows, self._seed = num_rows, seed % 2**32  # Grain takes 32 bits
        self._epoch = functools.lru_cache(maxsize=2)(self._permutation)

    def __getitem__(self, n: int) -> int:
        if self._num_rows >= FEW_ROWS:
            return self._shuffled[n]
        epoch, within = divmod(n, self._num_rows)
        return int(self._epoch(epoch)[within])

    @functools.cached_property
    def _shuffled(self):
        import grain  # here, because it imports Orbax and takes a third of a second

        dataset = grain.MapDataset.range(self._num_rows)
        return dataset.seed(self._seed).shuffle().repeat()

    def _permutation(self, epoch: int) -> np.ndarray:
        """All rows, sorted by a hash of (seed, epoch, row)."""
        numbers = np.arange(self._num_rows, dtype=np.uint64)
        for word in (self._seed, epoch):
            # Start the sequence elsewhere for every seed, and for every epoch of a seed.
            numbers = numbers + _mix(np.array([word], np.uint64))
            numbers = _mix(numbers)
        return np.argsort(numbers)


def _mix(numbers: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele et al. 2014): a bijection on 64 bits, so no two rows tie."""
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))

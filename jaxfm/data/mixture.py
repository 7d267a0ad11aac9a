"""A mixture: which source each row of the run comes from, and which row of that source it is.

Sources are interleaved evenly: after any number of rows, every source has had its share of them to
within one row (one and a half, for four to thirty sources), so shares are exact in the long run. A
row's origin is computed from its number alone. `grain.MapDataset.mix` interleaves similarly, but
rounds proportions to hundredths of the smallest, which is too coarse for 0.7 and 0.3.
"""

import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np


class Mixture:
    """Shares of rows by source name; weights need not sum to one."""

    def __init__(self, weights: Mapping[str, float]):
        self.names = tuple(weights)
        # Exactly as written: 0.1 is a tenth.
        shares = [Fraction(str(weight)) for weight in weights.values()]
        scale = math.lcm(*(share.denominator for share in shares))
        # Largest first: the error of rounding its count is small for the sources after it.
        order = sorted(range(len(shares)), key=lambda i: -shares[i])
        self._shares = [(i, int(shares[i] * scale)) for i in order]
        self._total = sum(share for _, share in self._shares)

    def locate(self, row: int) -> tuple[int, int]:
        """(source number, row of that source) of a global row."""
        return self.locate_all(np.array([row], object))[0]

    def locate_all(self, rows: np.ndarray) -> list[tuple[int, int]]:
        """`locate` of every row [n]; for many at once it takes a tenth of the time a row."""
        if len(self.names) == 1:
            return [(0, row) for row in rows.tolist()]
        # 64 bits are enough for most weights; numbers of any size are exact, but slower.
        is_small = 2 * (int(rows.max()) + 1) * self._total + self._total < 2**63
        rows = rows.astype(np.int64 if is_small else object)
        before, after = np.array(self.counts(rows)), np.array(self.counts(rows + 1))
        which = np.argmax(after > before, axis=0)
        return list(zip(which.tolist(), before[which, np.arange(len(rows))].tolist()))

    def counts(self, num_rows: int | np.ndarray) -> list:
        """How many of the first `num_rows` rows each source has; of an array, arrays."""
        counts, rest = [0] * len(self._shares), self._total
        for i, share in self._shares:
            # How many of the remaining rows go to the remaining sources, rounded to nearest.
            others = (2 * num_rows * (rest - share) + rest) // (2 * rest)
            counts[i] = num_rows - others
            num_rows, rest = others, rest - share
        return counts

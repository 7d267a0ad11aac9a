"""A mixture: which source each row of the run comes from, and which row of that source it is.

Sources are interleaved evenly: after any number of rows, every source has had its share of them to
within one row (one and a half, for four to thirty sources), so shares are exact in the long run. A
row's origin is computed from its number alone. `grain.MapDataset.mix` interleaves similarly, but
rounds proportions to hundredths of the smallest, which is too coarse for 0.7 and 0.3.
"""

import math
from collections.abc import Mapping
from fractions import Fraction


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

    def counts(self, num_rows: int) -> list[int]:
        """How many of the first `num_rows` rows each source has."""
        counts, rest = [0] * len(self._shares), self._total
        for i, share in self._shares:
            # How many of the remaining rows go to the remaining sources, rounded to nearest.
            others = (2 * num_rows * (rest - share) + rest) // (2 * rest)
            counts[i] = num_rows - others
            num_rows, rest = others, rest - share
        return counts

    def locate(self, row: int) -> tuple[int, int]:
        """(source number, row of that source) of a global row."""
        if len(self.names) == 1:
            return 0, row
        before, after = self.counts(row), self.counts(row + 1)
        which = next(i for i, count in enumerate(after) if count > before[i])
        return which, before[which]

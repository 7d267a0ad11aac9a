"""A mixture: which source, and which row of it, stands at each row of the run.

The sources are interleaved evenly: after any number of rows every source has had its share of them
to within one row (one and a half, from four sources to thirty), so exactly in the long run. Where
a row comes from is arithmetic on its number alone. `grain.MapDataset.mix` interleaves alike, but
rounds proportions to hundredths of the smallest, which is too coarse for 0.7 and 0.3.
"""

import math
from collections.abc import Mapping
from fractions import Fraction


class Mixture:
    """Shares of rows, by name of the source; weights need not sum to one."""

    def __init__(self, weights: Mapping[str, float]):
        self.names = tuple(weights)
        # As they were written: 0.1 is a tenth.
        shares = [Fraction(str(weight)) for weight in weights.values()]
        scale = math.lcm(*(share.denominator for share in shares))
        # The largest first: what its count is rounded by is little to those that come after it.
        order = sorted(range(len(shares)), key=lambda i: -shares[i])
        self._shares = [(i, int(shares[i] * scale)) for i in order]
        self._total = sum(share for _, share in self._shares)

    def counts(self, num_rows: int) -> list[int]:
        """How many of the first `num_rows` rows each source has."""
        counts, rest = [0] * len(self._shares), self._total
        for i, share in self._shares:
            # Of the rows that are left, those of the sources that are left, to the nearest.
            others = (2 * num_rows * (rest - share) + rest) // (2 * rest)
            counts[i] = num_rows - others
            num_rows, rest = others, rest - share
        return counts

    def locate(self, row: int) -> tuple[int, int]:
        """(number of the source, row of that source) of a global row."""
        if len(self.names) == 1:
            return 0, row
        before, after = self.counts(row), self.counts(row + 1)
        which = next(i for i, count in enumerate(after) if count > before[i])
        return which, before[which]

"""Batches of packed rows: endless and shuffled for training, each target once for evaluation.

A training row is a pure function of (seed, global row number), so the state of the source is one
number, resume takes no time, and any number of processes makes the same global batches.
"""

from collections.abc import Iterator

import grain
import numpy as np

from jaxfm.data import packing
from jaxfm.data.token_cache import TokenCache
from jaxfm.errors import ConfigError


class PackedBatches:
    """A source of [len(rows), T] batches; every epoch has all rows of the cache in a new order."""

    def __init__(
        self,
        cache: TokenCache,
        sequence_length: int,
        batch_size: int,
        seed: int,
        rows: np.ndarray | None = None,
    ):
        self.cache = cache
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        # The rows of the global batch that this process makes.
        self.rows = np.arange(batch_size) if rows is None else np.asarray(rows)
        self.next_row = 0
        self.order = (
            grain.MapDataset.range(packing.num_rows(cache, sequence_length))
            # Grain takes 32 bits.
            .seed(seed % 2**32)
            .shuffle()
            .repeat()
        )

    def next(self, params, step) -> dict[str, np.ndarray]:
        """The next batch; depends on neither argument."""
        del params, step
        row_numbers = [self.order[int(row)] for row in self.next_row + self.rows]
        self.next_row += self.batch_size
        starts = np.array(row_numbers, np.int64) * self.sequence_length
        return packing.rows(self.cache, starts, self.sequence_length)

    def get_state(self) -> dict[str, int | str]:
        """The position after the last batch that `next` gave, and what it is a position in."""
        return {'next_row': self.next_row} | self._identity()

    def set_state(self, state: dict[str, int | str]) -> None:
        """Goes on from a state; ConfigError when it is a position in other data."""
        for key, here in self._identity().items():
            if state.get(key) != here:
                saved = state.get(key)
                raise ConfigError(
                    f'the data changed since the checkpoint: {key} is {here}, was {saved}'
                )
        self.next_row = state['next_row']

    def _identity(self) -> dict[str, int | str]:
        return {
            'fingerprint': self.cache.fingerprint,
            'sequence_length': self.sequence_length,
            'seed': self.seed,
        }


def evaluation_batches(
    cache: TokenCache, sequence_length: int, batch_size: int, stride: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """[batch_size, T] batches in which every target of the cache counts once; the last is padded.

    With stride < T rows overlap, and of every row but the first only the last `stride` inputs
    count: their targets are predicted from at least T - stride tokens of context, where the
    document has them. No stride means T.
    """
    stride = stride or sequence_length
    if not 0 < stride <= sequence_length:
        raise ConfigError(f'an evaluation stride of {stride} is not in 1 .. {sequence_length}')
    rest = max(0, cache.num_tokens - sequence_length)
    starts = stride * np.arange(1 + -(-rest // stride))
    # Rows that begin beyond the stream are all padding.
    padding = np.full(-len(starts) % batch_size, cache.num_tokens)
    for group in np.concatenate([starts, padding]).reshape(-1, batch_size):
        batch = packing.rows(cache, group, sequence_length)
        batch['loss_mask'][group > 0, : sequence_length - stride] = 0
        yield batch

"""Batches of packed rows: endless and shuffled for training, each target once for evaluation.

A training row is a pure function of (seed, global row number), so the state of the source is one
number, seeking is O(1), and any number of processes makes the same global batches.
"""

import zlib
from collections.abc import Iterator, Mapping

import numpy as np

from jaxfm.data.corpus.token_cache import TokenCache
from jaxfm.data.mixture import Mixture
from jaxfm.data.order import Order
from jaxfm.data.packing.rows import BestFit, Concat, Packing
from jaxfm.errors import ConfigError, DataError


class Batches:
    """Base class of batch sources: the position, and the identity of the data it is valid for.

    `rows` are the rows of the global batch that this process makes; None is all.
    """

    def __init__(self, weights: Mapping[str, float], batch_size: int, rows: np.ndarray | None):
        self.mixture = Mixture(weights)
        self.weights = dict(weights)
        self.batch_size = batch_size
        self.rows = np.arange(batch_size) if rows is None else np.asarray(rows)
        self.next_row = 0

    def get_state(self) -> dict:
        """The position after the last batch from `next`, and the identity of the data, as JSON.

        It is the same on every process.
        """
        return {'next_row': self.next_row} | self._identity()

    def set_state(self, state: dict) -> None:
        """Continues from a state. Raises ConfigError if it is a position in other data."""
        here = self._identity()
        for key in sorted(here.keys() | state.keys() - self._position_keys):
            if state.get(key) != here.get(key):
                raise ConfigError(
                    f'the data changed since the checkpoint: {key} is {here.get(key)}, '
                    f'was {state.get(key)}; restore the old data, or start a new run in another '
                    '--workdir from these weights with --config.init_from'
                )
        self.next_row = state['next_row']

    _position_keys = frozenset(['next_row'])

    def _identity(self) -> dict[str, int | float | str]:
        raise NotImplementedError

    def identities(self, packings: Mapping[str, str], fingerprints: Mapping[str, str]) -> dict:
        """What the rows of every source depend on."""
        each = {n: {'fingerprint': fingerprints[n], 'packing': packings[n]} for n in packings}
        if len(each) > 1:
            each = {name: values | {'weight': self.weights[name]} for name, values in each.items()}
        return self.by_source(each)

    def by_source(self, values: Mapping[str, Mapping]) -> dict:
        """{source: {name: value}} -> {source/name: value}, or {name: value} of a single source."""
        if len(self.weights) == 1:
            return dict(*values.values())
        return {f'{s}/{name}': v for s, named in values.items() for name, v in named.items()}


class PackedBatches(Batches):
    """A source of [len(rows), T] batches from token caches.

    An epoch of a source is all of its rows; each epoch has a new order.

    Args:
      packings: the rows of each source, all of the same length.
      weights: {source: share of the rows}.

    Raises:
      DataError: a source has no rows.
    """

    def __init__(
        self,
        packings: Mapping[str, Packing],
        weights: Mapping[str, float],
        batch_size: int,
        seed: int,
        rows: np.ndarray | None = None,
    ):
        super().__init__({name: weights[name] for name in packings}, batch_size, rows)
        self.packings, self.seed = dict(packings), seed
        self._orders = [self._order(name) for name in packings]

    def next(self, params, step) -> dict[str, np.ndarray]:
        """The next batch; both arguments are ignored."""
        del params, step
        located = [self.mixture.locate(int(row)) for row in self.next_row + self.rows]
        which = np.array([source for source, _ in located], np.int64)
        numbers = np.array([self._orders[source][row] for source, row in located], np.int64)
        self.next_row += self.batch_size
        parts = {}
        for source, packing in enumerate(self.packings.values()):
            if len(chosen := np.flatnonzero(which == source)):
                parts[source] = chosen, packing.rows(numbers[chosen])
        return _merge(list(parts.values()), len(which))

    def progress(self, state: dict | None = None) -> dict[str, float]:
        """Rows and epochs of each source up to `state`, by default up to now."""
        rows = self.next_row if state is None else state['next_row']
        return self.by_source(
            {
                name: {'rows': count, 'epochs': count / packing.num_rows}
                for (name, packing), count in zip(self.packings.items(), self.mixture.counts(rows))
            }
        )

    def _order(self, name: str) -> Order:
        packing, seed = self.packings[name], self.seed
        if not packing.num_rows:
            raise DataError(
                f'{packing.cache.path}: no row of {name} can be made, because no document fits; '
                'raise config.data.sequence_length'
            )
        # Sources with the same number of rows must not share an order.
        seed += zlib.crc32(name.encode()) if len(self.packings) > 1 else 0
        return Order(packing.num_rows, seed)

    def _identity(self) -> dict[str, int | float | str]:
        names = {name: packing.name for name, packing in self.packings.items()}
        fingerprints = {name: packing.fingerprint for name, packing in self.packings.items()}
        length = next(iter(self.packings.values())).sequence_length
        identity = {'sequence_length': length, 'seed': self.seed}
        return identity | self.identities(names, fingerprints)


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


def evaluation_batches(
    cache: TokenCache, sequence_length: int, batch_size: int, stride: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """[batch_size, T] batches in which every target of the cache counts once; the last is padded.

    If stride < T, rows of texts overlap. Only the targets of a row's last `stride` inputs count,
    except in the first row, so each is predicted from at least T - stride tokens of context if its
    document has that many. stride None means T. Chats are packed side by side, and the stride does
    not apply to them; a chat longer than a row is cut into pieces that do not see each other.

    Raises:
      ConfigError: the stride is not between 1 and T.
    """
    stride = stride or sequence_length
    if not 0 < stride <= sequence_length:
        raise ConfigError(
            f'the evaluation stride must be between 1 and {sequence_length}, not {stride}'
        )
    if cache.is_chat:
        packing = BestFit(cache, sequence_length, too_long='cut')
        for first in range(0, packing.num_rows, batch_size):
            numbers = np.arange(first, min(first + batch_size, packing.num_rows))
            yield _pad(packing.rows(numbers), batch_size)
        return
    packing = Concat(cache, sequence_length)
    rest = max(0, cache.num_tokens - sequence_length)
    starts = stride * np.arange(1 + -(-rest // stride))
    for first in range(0, len(starts), batch_size):
        some = starts[first : first + batch_size]
        batch = packing.rows_from(some)
        batch['loss_mask'][some > 0, : sequence_length - stride] = 0
        yield _pad(batch, batch_size)


def _pad(batch: dict[str, np.ndarray], num_rows: int) -> dict[str, np.ndarray]:
    return {
        name: np.pad(array, ((0, num_rows - len(array)), (0, 0))) for name, array in batch.items()
    }

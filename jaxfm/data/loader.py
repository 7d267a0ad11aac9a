"""Batches of packed rows: endless and shuffled for training, each target once for evaluation.

A training row is a pure function of (seed, global row number), so the state of the source is one
number, seeking is O(1), and any number of processes makes the same global batches.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from jaxfm.data.corpus.token_cache import TokenCache
from jaxfm.data.mixture import Mixture
from jaxfm.data.packing.rows import BestFit, Concat, Packing
from jaxfm.errors import ConfigError, DataError

Put = Callable[[dict[str, np.ndarray]], dict]


class Batches:
    """Base class of batch sources: the position, and the identity of the data it is valid for.

    Close it, at the latest when an error ends the run; `next` goes on where it was closed.

    Args:
      rows: the rows of the global batch that this process makes; None is all.
      put: puts a batch on the devices. If it is given, Grain's thread makes batches and puts them
        there ahead of `next`; otherwise `next` makes them.
    """

    bucket = 'data_wait'
    sequence_length: int  # tokens in a row

    def __init__(
        self,
        weights: Mapping[str, float],
        batch_size: int,
        rows: np.ndarray | None,
        put: Put | None,
    ):
        self.mixture = Mixture(weights)
        self.weights = dict(weights)
        self.batch_size = batch_size
        self.rows = np.arange(batch_size) if rows is None else np.asarray(rows)
        self._put, self._iterator = put, None
        self._position = {'next_row': 0}  # after the last delivered batch

    def prepare(self, params) -> None:
        """Does nothing: batches depend on the data alone."""

    def next(self, params, step) -> dict:
        """The next batch; both arguments are ignored."""
        del params, step
        try:
            self._iterator = self._iterator or self._open(self._position)
            batch = next(self._iterator)
        except BaseException:
            self.close()  # the next call begins with the batch that failed
            raise
        self._position = self._to_position(self._iterator.get_state())
        return batch

    @property
    def tokens(self) -> int:
        """Tokens in the rows of a batch, over all hosts."""
        return self.batch_size * self.sequence_length

    def progress(self) -> dict[str, float]:
        """{name of a metric: value} of what has been delivered."""
        return {f'data/{name}': value for name, value in self.delivered().items()}

    def delivered(self) -> dict[str, float]:
        """{name: value} of what has been delivered."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends the thread."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _open(self, position: dict):
        """Grain's iterator from a position on."""
        raise NotImplementedError

    def _to_position(self, state: dict) -> dict:
        """The position of a state of Grain's iterator."""
        raise NotImplementedError

    @property
    def next_row(self) -> int:
        """The global row with which the next batch begins."""
        return self._position['next_row']

    def get_state(self) -> dict:
        """The position after the last batch from `next`, and the identity of the data, as JSON.

        It is the same on every process.
        """
        return self._position | self.identity()

    def set_state(self, state: dict) -> None:
        """Continues from a state. Raises ConfigError if it is a position in other data."""
        here = self.identity()
        for key in sorted(here.keys() | state.keys() - self._position_keys):
            if state.get(key) != here.get(key):
                raise ConfigError(
                    f'the data changed since the checkpoint: {key} is {here.get(key)}, '
                    f'was {state.get(key)}; restore the old data, or start a new run in another '
                    '--workdir from these weights with --config.init_from'
                )
        self.close()
        self._position = {key: state[key] for key in self._position_keys}

    _position_keys = frozenset(['next_row'])

    def identity(self) -> dict[str, int | float | str]:
        """What a position is a position in, as JSON."""
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
        put: Put | None = None,
    ):
        super().__init__({name: weights[name] for name in packings}, batch_size, rows, put)
        self.packings, self.seed = dict(packings), seed
        self.sequence_length = next(iter(self.packings.values())).sequence_length
        for name, packing in packings.items():
            if not packing.num_rows:
                raise DataError(
                    f'{packing.cache.path}: no row of {name} can be made, because no document '
                    'fits; raise config.data.sequence_length'
                )

    def _open(self, position: dict):
        from jaxfm.data import pipeline

        # The first row is not 0 if the batch size has changed and a batch began elsewhere.
        step, first = divmod(position['next_row'], self.batch_size)
        share = pipeline.Share(self.mixture, first, self.batch_size, self.rows)
        seeds = [self._seed(name) for name in self.packings]
        packings = [*self.packings.values()]
        batches = pipeline.packed_batches(packings, seeds, share, len(self.rows))
        return pipeline.open_batches(batches, {'next_index': step}, self._put)

    def _to_position(self, state: dict) -> dict:
        first = self.next_row % self.batch_size
        return {'next_row': first + state['next_index'] * self.batch_size}

    def delivered(self) -> dict[str, float]:
        """Rows and epochs of each source up to now."""
        counts = self.mixture.counts(self.next_row)
        return self.by_source(
            {
                name: {'rows': count, 'epochs': count / packing.num_rows}
                for (name, packing), count in zip(self.packings.items(), counts)
            }
        )

    def rows_of(self, num_rows: int) -> dict[str, np.ndarray]:
        """{source: the numbers of its rows, ascending, among the first `num_rows` of all}."""
        from jaxfm.data.order import shuffle

        found = {}
        for (name, packing), count in zip(self.packings.items(), self.mixture.counts(num_rows)):
            numbers = range(packing.num_rows)
            if count < packing.num_rows:
                order = shuffle(numbers, self._seed(name))
                numbers = sorted(order[n] for n in range(count))
            found[name] = np.array(numbers, np.int64)
        return found

    def _seed(self, name: str) -> int:
        # Sources with the same number of rows must not share an order.
        return self.seed + (zlib.crc32(name.encode()) if len(self.packings) > 1 else 0)

    def identity(self) -> dict[str, int | float | str]:
        """The packing and the tokens of each source, the length of rows, and the seed."""
        names = {name: packing.name for name, packing in self.packings.items()}
        fingerprints = {name: packing.fingerprint for name, packing in self.packings.items()}
        identity = {'sequence_length': self.sequence_length, 'seed': self.seed}
        return identity | self.identities(names, fingerprints)


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
            yield pad_rows(packing.rows(numbers), batch_size)
        return
    packing = Concat(cache, sequence_length)
    rest = max(0, cache.num_tokens - sequence_length)
    starts = stride * np.arange(1 + -(-rest // stride))
    for first in range(0, len(starts), batch_size):
        some = starts[first : first + batch_size]
        batch = packing.rows_from(some)
        batch['loss_mask'][some > 0, : sequence_length - stride] = 0
        yield pad_rows(batch, batch_size)


def pad_rows(batch: dict[str, np.ndarray], num_rows: int) -> dict[str, np.ndarray]:
    """The batch with empty rows at its end, so that it has so many."""
    return {
        name: np.pad(array, ((0, num_rows - len(array)), (0, 0))) for name, array in batch.items()
    }

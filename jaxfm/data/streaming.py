"""Batches without a cache: documents are read, tokenised and packed while the run trains.

Every process reads every document in file order, makes all rows and keeps its own. So the global
batches are the same for any number of processes, but nothing is shuffled. A position is the place
in the files where the next row begins. To resume, its shard is read again from the start, but the
documents before the position are not tokenised again.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from jaxfm.data import BatchConfig
from jaxfm.data.documents import KIND_NAMES, Document
from jaxfm.data.loader import Batches, Put
from jaxfm.data.packing.rows import Pieces, choose_packing, fill_rows
from jaxfm.errors import ConfigError, DataError

# Bytes tokenised at a time, ahead of need: few at first, so that the first batch comes soon, then
# enough for all cores.
FIRST_CHUNK_BYTES, CHUNK_BYTES = 1 << 12, 1 << 20

Place = tuple[int, int, int]  # epoch, shard, document in the shard
# Yields (place, document, ids, mask) in the order of the documents, and may leave out some. With
# mask None every token but the first counts.
Encode = Callable[[list[tuple[Place, Document]]], Iterable[tuple]]


@dataclasses.dataclass
class _Current:
    """The document now being put into rows; its tokens [begin, stop) are left."""

    place: Place
    name: str
    ids: np.ndarray
    mask: np.ndarray | None
    begin: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a document, and the token after it if the document continues."""

    ids: np.ndarray
    mask: np.ndarray | None
    length: int


class Stream:
    """The rows of one source, one after another, epoch after epoch.

    Texts are concatenated and cut into rows. Chats are put side by side into a row until the next
    one does not fit; they are never cut.

    `position` is [epoch, shard, document in the shard, token in the document] where the next row
    begins; set it to continue from there.

    Raises:
      ConfigError: the packing needs a cache.
      DataError: there is no document to train on, or a chat is longer than a row.
    """

    def __init__(self, make_source: Callable, encode: Encode, config: BatchConfig):
        self._make_source, self._encode, self._config = make_source, encode, config
        self._shards = make_source().shards()
        self.kind = next(self._documents(0, 0, 0))[1].kind
        if self.kind in ('pair', 'labelled'):
            raise ConfigError(
                "config.data.tokenize='on_the_fly' reads texts and chats, but a document is "
                f"{KIND_NAMES[self.kind]}: set config.data.tokenize='cached'"
            )
        self.is_chat = self.kind == 'chat'
        self.packing = choose_packing(config, self.is_chat)
        if not self.is_chat and self.packing != 'concat':
            raise ConfigError(
                f"config.data.packing='{self.packing}' needs to know the lengths of all texts in "
                "advance: set config.data.tokenize='cached'"
            )
        self.position = [0, 0, 0, 0]

    @property
    def position(self) -> list[int]:
        if self._current is None:
            return [*self._next]
        return [*self._current.place, self._current.begin]

    @position.setter
    def position(self, position: list[int]) -> None:
        *place, token = position
        self._current, self._next = None, (*place, token)
        self._encoded = self._encode_ahead(self._documents(*place))

    def epochs(self, position: list[int]) -> float:
        """Epochs up to a position, rounded down to a whole shard."""
        return position[0] + position[1] / len(self._shards)

    def next_row(self) -> list[Piece]:
        """The pieces of the next row."""
        pieces, room = [], self._config.sequence_length
        while room:
            current = self._peek()
            left = current.stop - current.begin
            if pieces and self.is_chat and (left > room or self.packing == 'none'):
                break
            pieces.append(self._take(min(left, room)))
            room -= pieces[-1].length
        return pieces

    def _take(self, length: int) -> Piece:
        current = self._current
        begin, current.begin = current.begin, current.begin + length
        ids = current.ids[begin : begin + length + 1]
        mask = None if current.mask is None else current.mask[begin : begin + length + 1]
        if current.begin == current.stop:
            epoch, shard, document = current.place
            self._current, self._next = None, (epoch, shard, document + 1, 0)
        return Piece(ids, mask, length)

    def _peek(self) -> _Current:
        """The current document, or the next one that `_fit` keeps."""
        epoch = self._next[0]
        while self._current is None:
            place, name, ids, mask = next(self._encoded)
            if place[0] > epoch + 1:
                raise DataError(
                    f'no chat fits a row of {self._config.sequence_length} tokens; '
                    'raise config.data.sequence_length'
                )
            begin = self._next[3] if place == self._next[:3] else 0
            if begin and begin >= len(ids):
                raise DataError(
                    f'{name} has changed since the checkpoint: it has {len(ids)} tokens, '
                    f'but the next row begins at token {begin}'
                )
            self._current = self._fit(_Current(place, name, ids, mask, begin, len(ids)))
        return self._current

    def _fit(self, current: _Current) -> _Current | None:
        """The document as `too_long` changes it; None if it is left out."""
        length, longest = len(current.ids), self._config.sequence_length
        if not length:
            return None
        if not self.is_chat or length <= longest:
            return current
        if self._config.too_long == 'error':
            raise DataError(
                f'{current.name} has {length:,} tokens, but a row has {longest}, and chats are '
                f'never cut: set config.data.sequence_length={length} or more, '
                "or config.data.too_long='drop' or 'truncate'"
            )
        current.stop = longest
        has_answer = current.mask is None or current.mask[1 : longest + 1].any()
        return current if self._config.too_long == 'truncate' and has_answer else None

    def _documents(self, epoch: int, shard: int, document: int) -> Iterator[tuple]:
        """Yields (place, train document) from a place on, without end."""
        while True:
            source, found = self._make_source(), shard + document > 0
            for number in range(shard, len(self._shards)):
                first = document if number == shard else 0
                for index, (is_heldout, one) in enumerate(source.read(self._shards[number])):
                    if index >= first and not is_heldout:
                        found = True
                        yield (epoch, number, index), one
            if not found:
                raise DataError('config.data: the source has no document to train on')
            epoch, shard, document = epoch + 1, 0, 0

    def _encode_ahead(self, documents: Iterator[tuple]) -> Iterator[tuple]:
        """Yields (place, name, ids, mask) of documents, tokenised many at a time."""
        chunk, size, enough, found, first = [], 0, FIRST_CHUNK_BYTES, False, None
        for place, document in documents:
            chunk.append((place, document))
            size += 1 + document.num_bytes
            if size >= enough:
                for encoded in self._encode_chunk(chunk):
                    found = True
                    yield encoded
                first = place[0] if first is None else first
                if not found and place[0] > first + 1:
                    raise DataError('the chat template refuses every chat')
                chunk, size, enough = [], 0, min(2 * enough, CHUNK_BYTES)

    def _encode_chunk(self, chunk: list[tuple]) -> Iterator[tuple]:
        for place, document, ids, mask in self._encode(chunk):
            if document.kind != self.kind:
                raise DataError(
                    f'{document.name} is {KIND_NAMES[document.kind]}, others are '
                    f'{KIND_NAMES[self.kind]}: all documents of a source are of one kind; split it '
                    'into sources of a mixture'
                )
            yield place, document.name, ids, mask


class _Maker:
    """Makes batches of the streams' rows, one after another; used by Grain's thread alone."""

    def __init__(self, streams: Mapping[str, Stream], batch_size: int, make: Callable):
        self._streams, self._batch_size, self._make = streams, batch_size, make
        self._next_row = 0

    def make(self) -> dict[str, np.ndarray]:
        batch = self._make(self._next_row)
        self._next_row += self._batch_size
        return batch

    def get_state(self) -> dict:
        positions = {name: stream.position for name, stream in self._streams.items()}
        return {'next_row': self._next_row, 'positions': positions}

    def set_state(self, state: dict) -> None:
        self._next_row = state['next_row']
        for name, position in state['positions'].items():
            self._streams[name].position = position


class OnTheFly(Batches):
    """A source of [len(rows), T] batches from streams; see the top of this file.

    Args:
      streams: {source: its rows}.
      fingerprints: {source: a hash that changes with its documents or their tokens}.
      weights: {source: share of the rows}.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        fingerprints: Mapping[str, str],
        weights: Mapping[str, float],
        config: BatchConfig,
        vocab_size: int,
        rows: np.ndarray | None = None,
        put: Put | None = None,
    ):
        super().__init__({name: weights[name] for name in streams}, config.batch_size, rows, put)
        self.streams, self.fingerprints = dict(streams), fingerprints
        self.sequence_length, self._vocab_size = config.sequence_length, vocab_size
        self._maker = _Maker(self.streams, self.batch_size, self._make)
        self._position = self._maker.get_state()

    def _make(self, first: int) -> dict[str, np.ndarray]:
        streams = [*self.streams.values()]
        located = self.mixture.locate_all(first + np.arange(self.batch_size))
        rows = [streams[source].next_row() for source, _ in located]
        return _to_batch([rows[row] for row in self.rows], self.sequence_length, self._vocab_size)

    def _open(self, position: dict):
        from jaxfm.data import pipeline

        return pipeline.open_batches(pipeline.Streamed(self._maker), position, self._put)

    def _to_position(self, state: dict) -> dict:
        return state

    def delivered(self) -> dict[str, float]:
        """Rows and epochs of each source up to now."""
        counts, positions = self.mixture.counts(self.next_row), self._position['positions']
        return self.by_source(
            {
                name: {'rows': count, 'epochs': stream.epochs(positions[name])}
                for (name, stream), count in zip(self.streams.items(), counts)
            }
        )

    _position_keys = frozenset(['next_row', 'positions'])

    def identity(self) -> dict[str, int | float | str]:
        """The packing and the documents of each source, and the length of rows."""
        names = {name: f'on_the_fly {stream.packing}' for name, stream in self.streams.items()}
        return {'sequence_length': self.sequence_length} | self.identities(names, self.fingerprints)


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """The tokens of one batch, in place of a TokenCache, for `fill_rows`."""

    tokens: np.ndarray
    mask: np.ndarray
    vocab_size: int
    path: str = 'the tokenizer'
    kind: str = 'chat'

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


def _to_batch(rows: list[list[Piece]], length: int, vocab_size: int) -> dict[str, np.ndarray]:
    pieces = [piece for row in rows for piece in row]
    masks = [
        np.ones(len(piece.ids), bool) if piece.mask is None else piece.mask for piece in pieces
    ]
    cache = _Tokens(
        np.concatenate([piece.ids for piece in pieces]), np.concatenate(masks), vocab_size
    )
    stored = np.array([len(piece.ids) for piece in pieces], np.int64)
    lengths = np.array([piece.length for piece in pieces], np.int64)
    found = Pieces(np.cumsum(stored) - stored, lengths, stored > lengths)
    return fill_rows(cache, np.array([len(row) for row in rows]), found, length)

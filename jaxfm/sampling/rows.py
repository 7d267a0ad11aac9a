"""Host arrays for the engine's programs: which sizes there are, and which sequence is in which row.

The rows of a call are split over the shards of the batch like its pages: `count` rows for each.
"""

import weakref
from collections.abc import Iterable
from collections.abc import Sequence as Sequences
from typing import NamedTuple

import numpy as np

from jaxfm.sampling import SamplingConfig, options
from jaxfm.sampling.options import Extras
from jaxfm.sampling.scheduler import Copy, Sequence

_RATIO = 4  # between one size of a program and the next
_LEAST_CHUNK, _CHUNK = 16, 64
_CALL_COST = 64  # tokens that could be stored in the time that a call takes apart from its rows

Placed = list[tuple[int, Sequence]]  # (row, sequence)


class Piece(NamedTuple):
    """A part of a sequence to store, in one row."""

    row: int
    sequence: Sequence
    start: int  # the position of its first token
    length: int


class Rows:
    """Builds the rows of calls.

    Args:
      num_shards: of the batch.
      slots: most sequences of a shard.
      vocab_size: padded.
    """

    def __init__(self, config: SamplingConfig, *, num_shards: int, slots: int, vocab_size: int):
        self._config, self._num_shards, self._slots = config, num_shards, slots
        self._vocab_size = vocab_size
        self._table_length = -(-config.max_length // config.page_size)
        # Compiling takes longer than a small call on large rows, so at first there are few sizes.
        budget = config.prefill_tokens // num_shards
        self.chunks = {(_LEAST_CHUNK, max(1, min(_RATIO * slots, budget // _LEAST_CHUNK)))}
        if budget >= _RATIO * _CHUNK:
            self.chunks |= {(_RATIO * _CHUNK, budget // (_RATIO * _CHUNK))}
        self.counts = [slots]
        self._biases = weakref.WeakKeyDictionary()  # made once for each sequence

    def use_all_sizes(self) -> None:
        """From now on calls come in all sizes that leave few rows empty; they get compiled."""
        self.use_all_chunks()
        while self.counts[0] > 1:
            self.counts.insert(0, -(-self.counts[0] // _RATIO))

    def use_all_chunks(self) -> None:
        """The same for calls that store prompts alone."""
        self.chunks |= self._more_chunks()

    def _more_chunks(self) -> set[tuple[int, int]]:
        """(tokens of a chunk, rows of a shard) of the programs that store prompts.

        A few rows for one short prompt; then rows for `prefill_tokens`, in few long chunks or in
        many short ones, which leave less padding but read the keys before them once for each.
        """
        budget = self._config.prefill_tokens // self._num_shards
        sizes = {(_LEAST_CHUNK, max(1, min(_CHUNK, budget) // _LEAST_CHUNK))}
        chunk = _LEAST_CHUNK
        while chunk <= budget and chunk < _RATIO * self._config.max_length:
            sizes.add((chunk, budget // chunk))
            chunk *= _RATIO
        return sizes

    def copies(self, copies: Iterable[Copy] = ()) -> dict[str, np.ndarray]:
        """`source` and `target` [shards, slots]: page 0 to page 0 where there is nothing to do."""
        shape = self._num_shards, self._slots
        rows = {name: np.zeros(shape, np.int32) for name in ('source', 'target')}
        used = [0] * self._num_shards
        for copy in copies:
            at = copy.shard, used[copy.shard]
            rows['source'][at], rows['target'][at] = copy.source, copy.target
            used[copy.shard] += 1
        return rows

    def best_chunk(self, sequences: Sequences[Sequence]) -> tuple[int, int]:
        """The size of `chunks` that stores most tokens for what it costs; in doubt the longer."""

        def worth(size: tuple[int, int]) -> float:
            chunk, count = size
            useful = sum(piece.length for piece in self._pieces(size, sequences))
            return useful / (chunk * count * self._num_shards + _CALL_COST)

        most = max(map(worth, self.chunks))
        return max(size for size in self.chunks if worth(size) >= 0.9 * most)

    def store(self, size: tuple[int, int], sequences: Sequences[Sequence] = ()):
        """The next chunks of sequences, as far as there are rows -> (rows, list of Pieces).

        A sequence may have several rows: each layer stores all keys before any query reads them.
        """
        chunk, count = size
        num_rows, pieces = count * self._num_shards, self._pieces(size, sequences)
        rows = self._tables(num_rows, [(piece.row, piece.sequence) for piece in pieces])
        for name in ('tokens', 'targets'):
            rows[name] = np.zeros((num_rows, chunk), np.int32)
        rows['positions'] = np.full((num_rows, chunk), -1, np.int32)
        rows['num_top'] = np.full(num_rows, -1, np.int32)
        for row, sequence, start, length in pieces:
            rows['tokens'][row, :length] = sequence.tokens[start : start + length]
            rows['targets'][row, :length] = sequence.tokens[start + 1 : start + length + 1]
            rows['positions'][row, :length] = range(start, start + length)
            if sequence.score_from is not None and start + length >= sequence.score_from:
                rows['num_top'][row] = sequence.request.top_logprobs
        return rows, pieces

    def _pieces(self, size: tuple[int, int], sequences: Iterable[Sequence]) -> list[Piece]:
        (chunk, count), pieces = size, []
        for shard, found in enumerate(self._by_shard(sequences)):
            rows = iter(range(shard * count, (shard + 1) * count))
            for row, (sequence, start) in zip(rows, _in_turn(found, chunk, count)):
                length = min(chunk, len(sequence.tokens) - 1 - start)
                pieces.append(Piece(row, sequence, start, length))
        return pieces

    def decode(self, sequences: Sequences[Sequence], is_crowded: bool):
        """The last token of each sequence and its options -> (rows, Placed).

        is_crowded: others need the rows that become free, so the call returns as soon as some are.
        """
        widest = max(map(len, self._by_shard(sequences)))
        count = next(count for count in self.counts if count >= widest)
        extras = max(options.extras(sequence.request) for sequence in sequences)
        return self.decode_rows(count, extras, sequences, is_crowded)

    def decode_rows(
        self,
        count: int,
        extras: Extras,
        sequences: Sequences[Sequence] = (),
        is_crowded: bool = False,
    ):
        """`decode` of a certain size.

        count: rows of a shard.
        extras: what there is beside the options; each makes another program.
        """
        num_rows, placed = count * self._num_shards, self._place(sequences, count)
        rows = self._tables(num_rows, placed)
        rows['last'], rows['limits'] = (np.zeros(num_rows, np.int32) for _ in range(2))
        rows['positions'] = np.full(num_rows, -1, np.int32)
        rows['options'] = options.rows({row: s.request for row, s in placed}, num_rows)
        patience = max(1, num_rows // 8) if is_crowded else num_rows
        rows['patience'] = np.full(num_rows, patience, np.int32)
        if extras >= Extras.HISTORY:
            rows['history'] = np.full((num_rows, self._config.max_length), -1, np.int32)
        if extras >= Extras.BIAS:
            rows['bias'] = np.zeros((num_rows, self._vocab_size), np.float32)
        for row, sequence in placed:
            length = len(sequence.tokens)
            rows['last'][row], rows['positions'][row] = sequence.tokens[-1], length - 1
            rows['limits'][row] = length + sequence.max_tokens
            rows['options']['prompt_length'][row] = sequence.num_prompt
            rows['options']['first_end'][row] = sequence.first_end
            if extras >= Extras.HISTORY:
                rows['history'][row, :length] = sequence.tokens
            if extras >= Extras.BIAS and options.extras(sequence.request) == Extras.BIAS:
                rows['bias'][row] = self._bias_of(sequence)
        return rows, placed

    def _bias_of(self, sequence: Sequence) -> np.ndarray:
        if sequence not in self._biases:
            self._biases[sequence] = options.bias_row(sequence.request, self._vocab_size)
        return self._biases[sequence]

    def _by_shard(self, sequences: Iterable[Sequence]) -> list[list[Sequence]]:
        by_shard = [[] for _ in range(self._num_shards)]
        for sequence in sequences:
            by_shard[sequence.shard].append(sequence)
        return by_shard

    def _place(self, sequences: Iterable[Sequence], count: int) -> Placed:
        """The first `count` sequences of each shard."""
        return [
            (shard * count + row, sequence)
            for shard, found in enumerate(self._by_shard(sequences))
            for row, sequence in enumerate(found[:count])
        ]

    def _tables(self, num_rows: int, placed: Placed) -> dict[str, np.ndarray]:
        table = np.zeros((num_rows, self._table_length), np.int32)
        for row, sequence in placed:
            table[row, : len(sequence.pages)] = sequence.pages
        return {'page_table': table}


def _in_turn(sequences: Iterable[Sequence], chunk: int, count: int) -> list[tuple[Sequence, int]]:
    """(sequence, start) of the next `count` chunks: the first of each, the second of each, ...

    So a long prompt does not keep short ones waiting.
    """
    starts = [
        (turn, sequence, start)
        for sequence in sequences
        for turn, start in enumerate(
            range(sequence.num_stored, len(sequence.tokens) - 1, chunk)[:count]
        )
    ]
    starts.sort(key=lambda item: item[0])
    return [(sequence, start) for _, sequence, start in starts[:count]]

"""Packing: which tokens go into which row of a batch.

The tokens of a cache form one stream, document after document. A row consists of pieces of it, one
after another, padded at the end; each piece lies inside one document. The target of the input at
stream position s is the token at s + 1 if that belongs to the same document, so no target crosses
into another document, and attention stays inside a piece (`segment_ids`). There are three ways to
choose the pieces:

- `Concat` cuts the stream every T tokens (concat-then-split): no padding, but documents are cut.
- `BestFit` puts whole documents side by side (best-fit decreasing: Ding et al. 2024, "Fewer
  Truncations Improve Language Modeling"). Texts longer than a row are cut into full rows first and
  only the rest is packed; chats are never cut.
- `OneEach` gives every document rows of its own.

A row is computed from its number alone, in any order, without reading others.
"""

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Literal

import numpy as np

from jaxfm.data import BatchConfig
from jaxfm.data.corpus.token_cache import BEGINS, COUNTS, WORSE, TokenCache
from jaxfm.data.packing import best_fit
from jaxfm.errors import ConfigError, DataError

# The arrays of a batch, each [B, T].
BATCH_DTYPES = {
    **dict.fromkeys(('tokens', 'targets', 'positions', 'segment_ids'), np.int32),
    'loss_mask': np.float32,
}
# Those of chats that are compared, in addition: `sides` is 1 for a target of a chat that is wanted,
# or the better of two, and -1 for one of another; `pair_ids` numbers the documents of a row from 1.
COMPARED_DTYPES = {**BATCH_DTYPES, 'sides': np.float32, 'pair_ids': np.int32}

TooLong = Literal['error', 'drop', 'truncate', 'cut']

# Rows are filled in groups of about this many tokens, which fit into a core's cache.
FILLED_AT_ONCE = 1 << 16


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Parts of documents; all arrays are [P]."""

    starts: np.ndarray  # int64: where in the stream
    lengths: np.ndarray  # int64
    has_more: np.ndarray  # bool: the document continues, so the piece's last input has a target

    def __getitem__(self, index) -> 'Pieces':
        return Pieces(self.starts[index], self.lengths[index], self.has_more[index])


class Concat:
    """One stream, cut into rows of T tokens; the last row is padded."""

    name = 'concat'

    def __init__(self, cache: TokenCache, sequence_length: int):
        self.cache, self.sequence_length = cache, sequence_length
        self._offsets = np.asarray(cache.offsets)
        self.num_rows = -(-cache.num_tokens // sequence_length)
        self.fingerprint = cache.fingerprint

    @functools.cached_property
    def statistics(self) -> dict[str, int | float]:
        first, last = self._offsets[:-1], np.maximum(self._offsets[1:] - 1, 0)
        cut = first // self.sequence_length != last // self.sequence_length
        return _statistics(self, self.cache.num_tokens, cut_documents=int(cut.sum()))

    def rows(self, row_numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The batch of rows with these numbers [n]; all arrays are [n, T]."""
        return self.rows_from(np.asarray(row_numbers, np.int64) * self.sequence_length)

    def rows_from(self, starts: np.ndarray) -> dict[str, np.ndarray]:
        """Rows that begin at stream positions [n]; everything after the stream is padding."""
        offsets, T = self._offsets, self.sequence_length
        starts = np.asarray(starts, np.int64)
        stops = np.minimum(starts + T, self.cache.num_tokens)
        first = np.searchsorted(offsets, starts, side='right') - 1
        counts = np.maximum(np.searchsorted(offsets, stops, side='left') - first, 0)
        row = np.repeat(np.arange(len(starts)), counts)
        document = best_fit.ranges(first, counts)
        begin = np.maximum(offsets[document], starts[row])
        end = np.minimum(offsets[document + 1], stops[row])
        pieces = Pieces(begin, end - begin, end < offsets[document + 1])
        return fill_rows(self.cache, counts, pieces, T)


class BestFit:
    """Documents side by side; the index of all rows is stored next to the cache.

    Args:
      too_long: what to do with a chat longer than a row: error, drop or truncate; cut treats it as
        a text.

    Raises:
      DataError: a chat is longer than a row and too_long is error.
    """

    name = 'best_fit'

    def __init__(self, cache: TokenCache, sequence_length: int, too_long: TooLong = 'error'):
        self.cache, self.sequence_length = cache, sequence_length
        self.too_long = too_long if cache.is_chat else 'cut'
        self._index = best_fit.open_index(self._index_path, self._identity, self._build)
        self.num_rows = self._index.num_rows
        self.fingerprint = cache.fingerprint

    @property
    def statistics(self) -> dict[str, int | float]:
        return _statistics(self, **self._index.counts)

    @property
    def _index_path(self) -> Path:
        tokens = Path(self.cache.path)
        return tokens.with_name(
            f'{tokens.stem}.best_fit-{self.sequence_length}-{self.too_long}.npy'
        )

    @property
    def _identity(self) -> int:
        text = f'{self.cache.fingerprint} {self.cache.num_tokens}'
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])

    def _build(self) -> best_fit.Index:
        pieces, counts = _pieces(self.cache, self.sequence_length, self.too_long)
        order, row_offsets = best_fit.pack(pieces.lengths, self.sequence_length)
        pieces = pieces[order]
        return best_fit.Index(
            row_offsets, pieces.starts, 2 * pieces.lengths + pieces.has_more, counts
        )

    def rows(self, row_numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The batch of rows with these numbers [n]; all arrays are [n, T]."""
        counts, which = self._index.pieces(np.asarray(row_numbers, np.int64))
        sizes = self._index.sizes[which]
        pieces = Pieces(self._index.starts[which], sizes >> 1, (sizes & 1).astype(bool))
        return fill_rows(self.cache, counts, pieces, self.sequence_length)


class OneEach:
    """One document per row, padded; a text longer than a row takes as many rows as it needs."""

    name = 'none'

    def __init__(self, cache: TokenCache, sequence_length: int, too_long: TooLong = 'error'):
        self.cache, self.sequence_length = cache, sequence_length
        self.too_long = too_long if cache.is_chat else 'cut'
        self._pieces, self._counts = _pieces(cache, sequence_length, self.too_long)
        self.num_rows = len(self._pieces.starts)
        self.fingerprint = cache.fingerprint

    @property
    def statistics(self) -> dict[str, int | float]:
        return _statistics(self, **self._counts)

    def rows(self, row_numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The batch of rows with these numbers [n]; all arrays are [n, T]."""
        numbers = np.asarray(row_numbers, np.int64)
        one = np.ones(len(numbers), np.int64)
        return fill_rows(self.cache, one, self._pieces[numbers], self.sequence_length)


Packing = Concat | BestFit | OneEach


def make_packing(cache: TokenCache, config: BatchConfig) -> Packing:
    """Makes the packing of a data config; auto is concat for texts, best_fit for chats."""
    name = choose_packing(config, cache.is_chat)
    check_cuts(cache, config.too_long)
    if name == 'concat':
        return Concat(cache, config.sequence_length)
    return {'best_fit': BestFit, 'none': OneEach}[name](
        cache, config.sequence_length, config.too_long
    )


def check_cuts(cache: TokenCache, too_long: TooLong) -> None:
    """Raises ConfigError if documents of this kind may not be cut like that."""
    if cache.kind == 'pair' and too_long in ('truncate', 'cut'):
        raise ConfigError(
            f"config.data.too_long='{too_long}' would cut only the worse chat of a pair; use 'drop'"
        )


def choose_packing(config: BatchConfig, is_chat: bool) -> str:
    """The name of the packing. Raises ConfigError for one that would cut chats."""
    if config.packing == 'auto':
        return 'best_fit' if is_chat else 'concat'
    if config.packing == 'concat' and is_chat:
        raise ConfigError(
            "config.data.packing='concat' would cut chats; use 'best_fit' or 'none' "
            "('auto' is best_fit for chats)"
        )
    return config.packing


def empty_batch(
    num_rows: int, sequence_length: int, dtypes: dict[str, type] = BATCH_DTYPES
) -> dict[str, np.ndarray]:
    """A batch without values: its arrays are parts of one, for one allocation in place of five.

    A freed block of this size is kept for the next batch. Smaller ones, one after another, are
    given back to the system, and then two thirds of a batch's time are page faults.
    """
    block = np.empty((len(dtypes), num_rows, sequence_length), np.int32)
    return {name: part.view(dtype) for part, (name, dtype) in zip(block, dtypes.items())}


def fill_rows(
    cache: TokenCache, counts: np.ndarray, pieces: Pieces, sequence_length: int
) -> dict[str, np.ndarray]:
    """Fills rows from their pieces, in order; `counts` [n] is the number of pieces of each row.

    Returns the arrays of BATCH_DTYPES, or of COMPARED_DTYPES, each [n, T]. Segment ids restart in
    every row, positions in every piece; of a pair, each chat is a segment. Padding is 0 in all
    arrays.

    Raises:
      DataError: the pieces do not fit the cache or the rows, or a token is not in the vocabulary.
    """
    num_rows = len(counts)
    dtypes = COMPARED_DTYPES if is_compared(cache) else BATCH_DTYPES
    batch = empty_batch(num_rows, sequence_length, dtypes)
    step = max(1, FILLED_AT_ONCE // sequence_length)
    ends = np.concatenate([[0], np.cumsum(counts)])
    for first in range(0, num_rows, step):
        some = slice(first, min(num_rows, first + step))
        part = pieces[ends[some.start] : ends[some.stop]]
        _fill(cache, counts[some], part, {name: array[some] for name, array in batch.items()})
    return batch


def _fill(cache: TokenCache, counts: np.ndarray, pieces: Pieces, out: dict) -> None:
    num_rows, T = out['tokens'].shape
    layout = _layout(cache, counts, pieces, T)
    starts, lengths, segments, has_more, begins = layout
    flat = {name: array.reshape(-1) for name, array in out.items()}
    index = _count(num_rows * T)
    # Where in the stream the token of every slot is; padding may read any token.
    where = index + np.repeat(starts - begins, lengths)
    flat['tokens'][:] = cache.tokens.take(where, mode='clip')
    flat['segment_ids'][:] = np.repeat(segments, lengths)
    slots = _count(num_rows * T, np.int32)  # half the bytes of `index`
    np.subtract(slots, np.repeat(begins.astype(np.int32), lengths), out=flat['positions'])
    is_full = segments.all()
    if not is_full:
        inside = flat['segment_ids'] > 0
        flat['tokens'] *= inside
        flat['positions'] *= inside
    # The target is the next token, except at the end of a piece (padding counts as a piece).
    some = lengths > 0
    last = (begins + lengths - 1)[some]
    more, after = has_more[some], (starts + lengths)[some]
    flat['targets'][:-1] = flat['tokens'][1:]
    flat['targets'][last] = cache.tokens.take(after, mode='clip') * more
    if cache.mask is None:
        flat['loss_mask'][:] = 1 if is_full else inside
        flat['loss_mask'][last] = more
    else:
        marks = cache.mask.take(where, mode='clip')
        counted = marks & COUNTS
        flat['loss_mask'][:-1] = counted[1:]
        flat['loss_mask'][last] = more * (cache.mask.take(after, mode='clip') & COUNTS)
        if not is_full:
            flat['loss_mask'] *= inside
        if is_compared(cache):
            _tell_sides(marks, begins[segments > 0], index, out)
    largest = max(flat['tokens'].max(initial=0), flat['targets'].max(initial=0))
    if largest >= cache.vocab_size:
        raise DataError(
            f'{cache.path} is damaged: it has token id {largest}, '
            f'but the vocabulary ends at {cache.vocab_size - 1}'
        )


def is_compared(cache: TokenCache) -> bool:
    """Whether the documents are chats that are compared."""
    return cache.kind in ('pair', 'labelled')


def _tell_sides(marks: np.ndarray, begins: np.ndarray, index: np.ndarray, out: dict) -> None:
    """Fills the arrays that tell the chats of a pair apart.

    Args:
      marks: the bits of the mask for each slot of the flattened rows.
      begins: the slots where a document begins.
      index: the numbers of the slots.
    """
    flat = {name: array.reshape(-1) for name, array in out.items()}
    flat['pair_ids'][:] = flat['segment_ids']
    inside = flat['pair_ids'] > 0
    is_first = inside & (marks & BEGINS > 0)  # of a pair's second chat
    flat['targets'][:-1][is_first[1:]] = 0
    is_first[begins] = True
    out['segment_ids'][:] = is_first.reshape(out['segment_ids'].shape).cumsum(axis=1)
    flat['segment_ids'] *= inside
    flat['positions'][:] = index - np.maximum.accumulate(np.where(is_first, index, 0))
    flat['positions'] *= inside
    # Both chats of a pair are whole, so the token of a slot is on the same side as its target.
    flat['sides'][:] = flat['loss_mask'] * np.where(marks & WORSE, -1, 1)


def _layout(cache: TokenCache, counts: np.ndarray, pieces: Pieces, T: int):
    """(starts, lengths, segments, has_more, begins) of pieces and paddings, in the order of slots.

    `begins` is the slot in the flattened rows where a piece begins; padding has segment 0.
    """
    row = np.repeat(np.arange(len(counts)), counts)
    free = T - np.bincount(row, pieces.lengths, len(counts)).astype(np.int64)
    after = pieces.starts + pieces.lengths + pieces.has_more
    is_good = pieces.starts.min(initial=0) >= 0 and pieces.lengths.min(initial=1) > 0
    if not is_good or free.min(initial=0) < 0 or after.max(initial=0) > cache.num_tokens:
        raise DataError(
            f'the packing index (*.best_fit-*.npy) next to {cache.path} does not match it; '
            'remove the index to have it built again'
        )
    # Every row's pieces, and then its padding: `at` is the place of each piece among them.
    at, rows = np.arange(len(row)) + row, np.arange(len(counts))
    starts = np.zeros(len(row) + len(counts), np.int64)
    lengths, segments, has_more = starts.copy(), starts.copy(), starts.astype(bool)
    starts[at], lengths[at], has_more[at] = pieces.starts, pieces.lengths, pieces.has_more
    segments[at] = best_fit.ranges(np.ones(len(counts), np.int64), counts)
    lengths[np.cumsum(counts) + rows] = free
    keep = lengths > 0
    segments, lengths, starts = segments[keep].astype(np.int32), lengths[keep], starts[keep]
    return starts, lengths, segments, has_more[keep], np.cumsum(lengths) - lengths


@functools.lru_cache(maxsize=8)
def _count(number: int, dtype=np.int64) -> np.ndarray:
    """0, 1, 2, ... to be read only."""
    numbers = np.arange(number, dtype=dtype)
    numbers.flags.writeable = False
    return numbers


def _statistics(packing, tokens: int, **counts: int) -> dict[str, int | float]:
    slots = packing.num_rows * packing.sequence_length
    return {
        'packing': packing.name,
        'rows': packing.num_rows,
        'tokens': tokens,
        'packing_efficiency': tokens / slots if slots else 0.0,
        'cut_documents': 0,
        'truncated_documents': 0,
        'truncated_tokens': 0,
        'dropped_documents': 0,
    } | counts


def _pieces(cache: TokenCache, T: int, too_long: TooLong) -> tuple[Pieces, dict[str, int]]:
    """Cuts documents into pieces of at most T tokens; also counts what was done to long ones."""
    begins, lengths = cache.offsets[:-1], np.diff(cache.offsets)
    is_long = lengths > T
    counts = {'tokens': 0}
    num_pieces = -(-lengths // T)
    if too_long == 'cut':
        # A last piece of one token would be an input without a target.
        num_pieces -= lengths % T == 1
        counts['cut_documents'] = int((num_pieces > 1).sum())
    elif too_long == 'drop':
        num_pieces[is_long] = 0
        counts['dropped_documents'] = int(is_long.sum())
    elif too_long == 'truncate':
        num_pieces = np.minimum(num_pieces, 1)
        # A truncated chat may have no answer left; then there is nothing to learn from it.
        counts_in = (cache.mask[begins[d] + 1 :][:T] & COUNTS for d in np.flatnonzero(is_long))
        empty = [d for d, some in zip(np.flatnonzero(is_long), counts_in) if not some.any()]
        num_pieces[empty] = 0
        is_long[empty] = False
        counts['dropped_documents'] = len(empty)
        counts['truncated_documents'] = int(is_long.sum())
        counts['truncated_tokens'] = int((lengths - T)[is_long].sum())
    elif is_long.any():
        raise DataError(_too_long(cache, T, int(is_long.sum()), int(lengths.max())))
    starts = best_fit.ranges(np.zeros_like(num_pieces), num_pieces) * T
    starts += np.repeat(begins, num_pieces)
    left = np.repeat(cache.offsets[1:], num_pieces) - starts
    pieces = Pieces(starts, np.minimum(left, T), left > T)
    counts['tokens'] = int(pieces.lengths.sum())
    return pieces, counts


def _too_long(cache: TokenCache, T: int, number: int, longest: int) -> str:
    others = "'drop'" if cache.kind == 'pair' else "'drop' or 'truncate'"
    what = 'pairs' if cache.kind == 'pair' else 'chats'
    return (
        f'config.data: {number:,} of {cache.num_documents:,} {what} are longer than a row of {T} '
        f'tokens, the longest has {longest:,}: set config.data.sequence_length={longest}, '
        f'or config.data.too_long={others}'
    )

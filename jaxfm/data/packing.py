"""Packing: which tokens stand in a row, as arithmetic on the token stream of a cache.

Documents follow one another in one stream of N tokens (concat-then-split). A row of length T that
starts at stream position s holds the inputs s .. s + T - 1, and its targets are the tokens after
them in the same document. So no target crosses a document, every token but <|bos|> is the target
of exactly one input, and a row can be made at any time from its start alone.
"""

import numpy as np

from jaxfm.data.token_cache import TokenCache
from jaxfm.errors import DataError


def num_rows(cache: TokenCache, sequence_length: int) -> int:
    """Rows that hold the whole stream, the last one padded."""
    return -(-cache.num_tokens // sequence_length)


def rows(cache: TokenCache, starts: np.ndarray, sequence_length: int) -> dict[str, np.ndarray]:
    """The rows that begin at stream positions `starts` [B]: a batch, all arrays [B, T].

    Positions and segment ids restart in every row, so a document that began in an earlier row is
    segment 1 at position 0. Beyond the end of the stream everything is 0.
    """
    # [B, T + 1]: the stream position of every input and of the last target.
    where = np.asarray(starts, np.int64)[:, None] + np.arange(sequence_length + 1)
    inside = where < cache.num_tokens
    tokens = cache.tokens[np.where(inside, where, 0)].astype(np.int32) * inside
    if tokens.max(initial=0) >= cache.vocab_size:
        raise DataError(f'{cache.path} is damaged: token {tokens.max()} of {cache.vocab_size}')
    where, inside = where[:, :-1], inside[:, :-1]
    document = np.searchsorted(cache.offsets, where, side='right') - 1
    document = np.minimum(document, cache.num_documents - 1)
    begin, end = cache.offsets[document], cache.offsets[document + 1]
    has_target = inside & (where + 1 < end)
    return {
        'tokens': tokens[:, :-1],
        'targets': tokens[:, 1:] * has_target,
        'positions': ((where - np.maximum(begin, where[:, :1])) * inside).astype(np.int32),
        'segment_ids': ((document - document[:, :1] + 1) * inside).astype(np.int32),
        'loss_mask': has_target.astype(np.float32),
    }

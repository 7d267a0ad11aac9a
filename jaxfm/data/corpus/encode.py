"""Encodes documents: texts with the tokenizer, many at a time, and chats with their template.

The mask of a chat is 1 for every token that the assistant must produce. Where chats are compared,
only those after the given turns count, and the mask has two more bits: WORSE and BEGINS. A pair is
encoded as its better chat, followed by its worse one.
"""

import functools
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from jaxfm.chat.render import Chat
from jaxfm.data.corpus.token_cache import BEGINS, COUNTS, WORSE
from jaxfm.data.documents import Document
from jaxfm.errors import DataError
from jaxfm.tokenizer.build import Tokenizer

# Bytes of text encoded at a time: enough for all cores, but few enough for memory, since the
# encoder needs a hundred times as many.
CHUNK_BYTES = 1 << 21
# Longer documents are encoded in pieces of at most this many characters.
PIECE_CHARACTERS = 1 << 22


def read_chunks(
    documents: Iterable[tuple[bool, Document]],
) -> Iterator[list[tuple[bool, Document]]]:
    """Groups documents into lists of about CHUNK_BYTES."""
    some, left = [], CHUNK_BYTES
    for heldout, document in documents:
        some.append((heldout, document))
        left -= document.num_bytes + 64
        if left <= 0:
            yield some
            some, left = [], CHUNK_BYTES
    if some:
        yield some


def encode_documents(
    chunk: list[tuple[bool, Document]],
    tokenizer: Tokenizer,
    refuse: Callable[[Document, DataError], None],
) -> Iterator[tuple[bool, Document, np.ndarray, np.ndarray | None]]:
    """Yields (is_heldout, document, ids [n], mask [n]) in order; the mask is None for a text.

    A chat that its template refuses is left out after `refuse(document, error)`.
    """
    texts = [document.text for _, document in chunk if not document.messages]
    pieces = [_cut(text) for text in texts]
    encoded = iter(tokenizer.encode_batch([piece for parts in pieces for piece in parts]))
    pieces = iter(pieces)
    for heldout, document in chunk:
        if document.messages:
            try:
                ids, mask = _encode_chats(document, _open_chat(tokenizer))
            except DataError as error:
                refuse(document, error)
                continue
            yield heldout, document, ids, mask
        else:
            parts = [next(encoded) for _ in next(pieces)]
            yield heldout, document, _add_ends(parts, tokenizer), None


def _encode_chats(document: Document, chat: Chat) -> tuple[np.ndarray, np.ndarray]:
    """-> ids, int32 [n], and mask, uint8 [n]."""
    encode = functools.partial(chat.encode, tools=document.tools, num_given=document.num_given)
    ids, mask = encode(document.messages)
    if document.kind == 'chat':
        return ids, mask.astype(np.uint8)
    parts = [(ids, mask, document.is_wanted is False)]
    if document.rejected:
        worse = encode(document.rejected)
        if np.array_equal(worse[0], ids):  # the template drops what differs, such as white space
            raise DataError('chosen and rejected are the same tokens')
        parts.append((*worse, True))
    marks = []
    for number, (_, mask, is_worse) in enumerate(parts):
        mark = mask * np.uint8(COUNTS)
        mark[0] = 0  # nothing predicts the first token
        if not mark.any():
            raise DataError('nothing is left of an answer after the turns that are given')
        mark |= is_worse * np.uint8(WORSE)
        mark[0] |= (number > 0) * BEGINS
        marks.append(mark)
    return np.concatenate([ids for ids, _, _ in parts]), np.concatenate(marks)


def make_encoder(config, tokenizer: Tokenizer) -> Callable[[list[tuple]], Iterator[tuple]]:
    """Returns a function: [(anything, document)] -> iterator of (anything, document, ids, mask).

    It leaves out chats that the template refuses, and raises DataError when these are more than
    `max_bad_records`.
    """
    refused = set()

    def refuse(document: Document, error: DataError) -> None:
        refused.add(document.name)
        if len(refused) > getattr(config, 'max_bad_records', 0):
            raise DataError(f'{document.name}: {error}') from error

    return lambda chunk: encode_documents(chunk, tokenizer, refuse)


def _add_ends(parts: list[np.ndarray], tokenizer: Tokenizer) -> np.ndarray:
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return np.concatenate([np.array(bos, np.int32), *parts, np.array([tokenizer.eos_id], np.int32)])


@functools.lru_cache(maxsize=4)
def _open_chat(tokenizer: Tokenizer) -> Chat:
    return Chat(tokenizer)


def _cut(text: str) -> list[str]:
    """Splits a huge document, at lines if it can: the encoder needs 100 bytes per character."""
    pieces, start = [], 0
    while start < len(text):
        stop = start + PIECE_CHARACTERS
        if stop < len(text):
            stop = text.rfind('\n', start, stop) + 1 or stop
        pieces.append(text[start:stop])
        start = stop
    return pieces

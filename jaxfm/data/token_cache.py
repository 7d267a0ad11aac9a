"""The token cache: the ids of many documents in one memory-mapped file.

Two files make one side (train, heldout) of a corpus: `<side>.tokens`, all documents one after the
other as uint16 or uint32, each as <|bos|> ids <|eos|>; and `<side>.documents.npy`, int64 [D, 2]:
the stream position where a document ends, and its UTF-8 bytes.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from jaxfm.data.sources import Document
from jaxfm.data.tokenizer import Tokenizer
from jaxfm.errors import DataError

# Characters encoded at a time: enough for all cores, little enough for memory.
CHUNK_CHARACTERS = 1 << 22


class TokenCache:
    """Token ids of one side of a corpus, read from disk as they are needed."""

    def __init__(self, directory: Path, side: str, vocab_size: int, fingerprint: str):
        self.path = Path(directory) / f'{side}.tokens'
        self.vocab_size = vocab_size
        # Changes with any token of the corpus, the other side included.
        self.fingerprint = fingerprint
        documents = np.load(Path(directory) / f'{side}.documents.npy')
        # [D + 1]: document d is tokens[offsets[d]:offsets[d + 1]].
        self.offsets = np.concatenate([[0], documents[:, 0]])
        # [D]: UTF-8 bytes of each document.
        self.document_bytes = documents[:, 1]
        # [N].
        self.tokens = np.memmap(self.path, token_dtype(vocab_size), 'r')

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def num_documents(self) -> int:
        return len(self.document_bytes)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all documents: what bits per byte are divided by."""
        return int(self.document_bytes.sum())


def write(directory: Path, side: str, documents: Iterable[Document], tokenizer: Tokenizer) -> None:
    """Encodes documents, in their order, into the two files of one side."""
    dtype, end, rows = token_dtype(tokenizer.vocab_size), 0, []
    with open(directory / f'{side}.tokens', 'wb') as file:
        for document, ids in _encode(documents, tokenizer):
            if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
                raise DataError(
                    f'{document.name}: a token id is outside [0, {tokenizer.vocab_size})'
                )
            ids = np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]])
            file.write(ids.astype(dtype).tobytes())
            end += len(ids)
            rows.append((end, document.num_bytes))
        _to_disk(file)
    with open(directory / f'{side}.documents.npy', 'wb') as file:
        np.save(file, np.array(rows, np.int64).reshape(-1, 2))
        _to_disk(file)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _encode(
    documents: Iterable[Document], tokenizer: Tokenizer
) -> Iterator[tuple[Document, np.ndarray]]:
    for chunk in _chunks(documents):
        pieces = [piece for _, text in chunk for piece in _pieces(text)]
        encoded = iter(tokenizer.encode_batch(pieces))
        for document, text in chunk:
            parts = [next(encoded) for _ in _pieces(text)]
            yield document, np.concatenate([np.zeros(0, np.int32), *parts])


def _chunks(documents: Iterable[Document]) -> Iterator[list[tuple[Document, str]]]:
    chunk, size = [], 0
    for document in documents:
        chunk.append((document, document.read()))
        size += len(chunk[-1][1])
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _pieces(text: str) -> list[str]:
    """A huge document in parts of whole lines: the encoder needs 100 bytes a character."""
    pieces, start = [], 0
    while start < len(text):
        stop = start + CHUNK_CHARACTERS
        if stop < len(text):
            stop = text.rfind('\n', start, stop) + 1 or stop
        pieces.append(text[start:stop])
        start = stop
    return pieces


def _to_disk(file) -> None:
    file.flush()
    os.fsync(file.fileno())

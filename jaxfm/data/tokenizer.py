"""Tokenizers: text to ids and back, without loss for every str.

The special tokens <|bos|> and <|eos|> have ids 0 and 1. They are put around documents by the corpus
and never come out of text: a document that spells '<|eos|>' is encoded as its characters.
A tokenizer is saved as a tokenizer.json of the `tokenizers` library.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxfm.data import BPEConfig, BytesConfig
from jaxfm.errors import DataError

SPECIAL_TOKENS = ('<|bos|>', '<|eos|>')

# How text is cut into the pieces inside which BPE merges; a merge never crosses a cut.
PATTERNS = {
    # For source code: a line break takes the indentation after it, so the step from one line to the
    # next is one token at any depth; one sign before a name goes with it ('.append', '(self').
    'code': r'\r?\n[ \t\r\n]*|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+'
    r'|[ \t]+(?!\S)|\s',
    # As GPT-2: words, numbers and runs of signs, each with the space before it; other white space
    # apart, so that indentation of one depth is one token.
    'gpt2': r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}


class Tokenizer:
    """What both kinds share: everything but where the vocabulary comes from."""

    bos_id = 0
    eos_id = 1

    def __init__(self, backend: tokenizers.Tokenizer):
        # Otherwise the library would turn text that spells a special token into its id.
        backend.encode_special_tokens = True
        self.backend = backend

    @property
    def vocab_size(self) -> int:
        """Ids are in [0, vocab_size)."""
        return self.backend.get_vocab_size()

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that decides the ids."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids without special tokens; DataError for a str that has a lone surrogate."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f'text with a lone surrogate at {error.start} has no UTF-8 form'
            ) from error
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32, on all cores."""
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, path: Path) -> None:
        """Writes a tokenizer.json."""
        Path(path).write_text(self.backend.to_str(pretty=True), encoding='utf-8')


class Bytes(Tokenizer):
    """One token a byte."""

    def __init__(self, config: BytesConfig, texts: Iterable[str]):
        del config, texts
        super().__init__(_untrained(pattern=None, vocabulary=_byte_vocabulary()))


class BPE(Tokenizer):
    """Byte-level BPE trained on texts; the same texts give the same merges."""

    def __init__(self, config: BPEConfig, texts: Iterable[str]):
        backend = _untrained(PATTERNS[config.pattern], vocabulary=None)
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        super().__init__(backend)


def load(path: Path) -> Tokenizer:
    """Reads what `save` wrote; DataError when it is damaged or of another make."""
    try:
        backend = tokenizers.Tokenizer.from_str(Path(path).read_text(encoding='utf-8'))
    except Exception as error:  # The library raises bare Exceptions.
        raise DataError(f'{path} is not a tokenizer: {error}') from error
    if [backend.id_to_token(i) for i in range(len(SPECIAL_TOKENS))] != list(SPECIAL_TOKENS):
        raise DataError(f'{path}: ids 0 and 1 are not {" and ".join(SPECIAL_TOKENS)}')
    return Tokenizer(backend)


def _untrained(pattern: str | None, vocabulary: dict[str, int] | None) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[] if vocabulary else None))
    cuts = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if pattern:
        cuts.insert(0, pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated'))
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    backend.decoder = decoders.ByteLevel()
    if vocabulary:
        backend.add_special_tokens(list(SPECIAL_TOKENS))
    return backend


def _byte_vocabulary() -> dict[str, int]:
    """Ids of the bytes follow the special tokens: byte b is id 2 + b."""
    characters = _byte_characters()
    tokens = list(SPECIAL_TOKENS) + [characters[byte] for byte in range(256)]
    return {token: i for i, token in enumerate(tokens)}


def _byte_characters() -> list[str]:
    """The printable character by which byte-level BPE writes each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [characters[byte] for byte in range(256)]

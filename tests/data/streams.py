"""A token cache in memory, for tests of the code that reads one."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

BOS, EOS, VOCAB_SIZE = 0, 1, 2048


@dataclasses.dataclass
class Stream:
    """The attributes of a TokenCache that packing reads."""

    tokens: np.ndarray
    offsets: np.ndarray
    path: Path
    mask: np.ndarray | None = None
    is_chat: bool = False
    vocab_size: int = VOCAB_SIZE

    @property
    def kind(self):
        return 'chat' if self.is_chat else 'text'

    @property
    def num_tokens(self):
        return len(self.tokens)

    @property
    def num_documents(self):
        return len(self.offsets) - 1

    @property
    def fingerprint(self):
        return hashlib.sha256(self.tokens.tobytes()).hexdigest()


def stream(lengths, path, seed=0, is_chat=False, dtype=np.uint16):
    """Documents of these lengths (at least 2): random tokens between <|bos|> and <|eos|>.

    The mask of chats is 1 on a random half of the tokens, but never on a document's first one.
    """
    draw = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = draw.integers(2, VOCAB_SIZE, offsets[-1]).astype(dtype)
    tokens[offsets[:-1]], tokens[offsets[1:] - 1] = BOS, EOS
    mask = None
    if is_chat:
        mask = draw.integers(0, 2, len(tokens)).astype(np.uint8)
        mask[offsets[:-1]] = 0
    return Stream(tokens, offsets, Path(path) / f'train{seed}.tokens', mask, is_chat)

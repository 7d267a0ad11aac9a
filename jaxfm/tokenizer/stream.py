"""An incremental detokenizer: ids arrive a few at a time and become text as soon as possible.

It returns whole characters, and all pieces together equal `decode` of all ids. Decoding ids
one by one would be wrong: a character may take several tokens, SentencePiece drops the space before
a text, and a run of byte tokens ('<0xF0>') is valid text only as a whole, or not at all. So every
push decodes a window of ids again and returns the text that can no longer change.
"""

import os
from collections.abc import Iterable

from jaxfm.tokenizer.kinds import Tokenizer

WINDOW = 64  # new ids before the window moves; it moves later if a character is incomplete then


class TextStream:
    """An incremental detokenizer: ids in, pieces of text out."""

    def __init__(self, tokenizer: Tokenizer, window: int = WINDOW):
        self._tokenizer, self._size = tokenizer, window
        self._ids: list[int] = []
        self._given = 0  # characters of the window's text that were returned
        self._cut = 0  # the first ids of the window that are only context for the rest
        self._is_whole = True

    def __copy__(self) -> 'TextStream':
        copied = TextStream(self._tokenizer, self._size)
        copied.__dict__.update(self.__dict__, _ids=list(self._ids))
        return copied

    @property
    def is_whole(self) -> bool:
        """Whether all text of the ids has been returned: the last character is complete."""
        return self._is_whole

    def push(self, ids: Iterable[int]) -> str:
        """Adds ids and returns the text that is now certain, which may be ''."""
        self._ids += ids
        text = self._tokenizer.decode(self._ids)
        certain = self._certain(text)
        piece = self._give(certain)
        self._is_whole = certain == text
        if self._is_whole:
            self._move_window()
        return piece

    def finish(self) -> str:
        """Returns the text held back so far; an incomplete character becomes U+FFFD."""
        return self._give(self._tokenizer.decode(self._ids))

    def _certain(self, text: str) -> str:
        """The part of the window's text that no further id can change."""
        if (byte := self._tokenizer.invalid_byte_id) is not None:
            # An invalid byte makes the run of byte tokens before it invalid, too.
            text = os.path.commonprefix([text, self._tokenizer.decode([*self._ids, byte])])
        return text.rstrip('\ufffd')

    def _give(self, text: str) -> str:
        piece = text[self._given :]
        self._given += len(piece)
        return piece

    def _move_window(self) -> None:
        """Drops old ids once enough ids follow them; call it when no character is incomplete."""
        if len(self._ids) - self._cut < self._size:
            return
        context = self._tokenizer.decode(self._ids[self._cut :])
        if context:  # decoding drops a leading space, so a window must begin with returned text
            del self._ids[: self._cut]
            self._cut, self._given = len(self._ids), len(context)

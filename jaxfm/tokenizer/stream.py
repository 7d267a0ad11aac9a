"""Text from ids that come bit by bit: the pieces are whole characters, and their sum is `decode` of
all ids.

Decoding each id by itself would not do: a character may take several tokens, SentencePiece drops
the space before a text, and where single bytes are tokens ('<0xF0>') a run of them is text, or not,
as a whole. So a window of ids is decoded again with every push, and what can no longer change is
given.
"""

import os
from collections.abc import Iterable

from jaxfm.tokenizer.kinds import Tokenizer

WINDOW = 64  # ids that are decoded again at least; a cut in the text may let it grow to more


class TextStream:
    """Ids in, pieces of text out."""

    def __init__(self, tokenizer: Tokenizer, window: int = WINDOW):
        self._tokenizer, self._size = tokenizer, window
        self._ids: list[int] = []
        self._given = 0  # characters of the window's text that are out
        self._cut = 0  # so many ids of the window are the context for those behind them

    def push(self, ids: Iterable[int]) -> str:
        """The text that more ids have made certain; it may be empty."""
        self._ids += ids
        text = self._tokenizer.decode(self._ids)
        certain = self._certain(text)
        piece = self._give(certain)
        if certain == text:
            self._move_window()
        return piece

    def finish(self) -> str:
        """The text that was waiting for more ids: U+FFFD for a character that stays incomplete."""
        return self._give(self._tokenizer.decode(self._ids))

    def _certain(self, text: str) -> str:
        """The part of the window's text that no further id can change."""
        if (byte := self._tokenizer.invalid_byte_id) is not None:
            # A run of bytes that it follows is no text any more.
            text = os.path.commonprefix([text, self._tokenizer.decode([*self._ids, byte])])
        return text.rstrip('\ufffd')

    def _give(self, text: str) -> str:
        piece = text[self._given :]
        self._given += len(piece)
        return piece

    def _move_window(self) -> None:
        """Forgets ids once there are enough behind them; called where no character is open."""
        if len(self._ids) - self._cut < self._size:
            return
        context = self._tokenizer.decode(self._ids[self._cut :])
        if context:  # a space at the head of a window is dropped: it must not be one yet to come
            del self._ids[: self._cut]
            self._cut, self._given = len(self._ids), len(context)

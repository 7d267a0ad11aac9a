"""Stop strings: text and ids of a sample are released in step, and never past a stop string.

Which string ends a sample depends on the text alone, not on how its ids arrive: the one that is
complete first, and of those that end at the same character the longest.
"""

import collections
import copy
import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxfm.tokenizer.kinds import Tokenizer
from jaxfm.tokenizer.stream import TextStream

_WINDOW = 8  # where ids are pushed one by one, each decodes the window again


class Released(NamedTuple):
    """What may be shown now."""

    count: int  # so many more ids
    text: str
    stop: str | None  # the stop string that ended the sample; further ids are cut


class Stops:
    """Holds back text that may become a stop string or a character, and the ids that made it.

    A released id has all of its text released. The text of a held id may be released in part.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, strings: Sequence[str] = (), min_tokens: int = 0
    ):
        """Without a tokenizer, ids pass through and there is no text.

        min_tokens: a string that is complete with fewer ids does not end the sample.
        """
        if strings and tokenizer is None:
            raise ValueError('stop strings need a tokenizer')
        self._stream = None if tokenizer is None else TextStream(tokenizer, _WINDOW)
        self._has_strings = bool(strings)
        self._root = self._node = _build_automaton(tuple(strings))
        self._min_tokens = min_tokens
        self._num_ids = self._released_ids = 0
        self._held = ''  # text that was seen but not released
        self._num_chars = 0  # seen so far
        # (ids, characters) after ids that end with a whole character, as far as not released.
        self._boundaries = collections.deque()

    def __copy__(self) -> 'Stops':
        copied = object.__new__(Stops)
        copied.__dict__.update(self.__dict__)
        copied._stream = copy.copy(self._stream)
        copied._boundaries = self._boundaries.copy()
        return copied

    def push(self, ids: Iterable[int]) -> Released:
        """Adds ids, in any portions."""
        if self._stream is None:
            return Released(len(list(ids)), '', None)
        ids = list(ids)
        if not self._has_strings and self._push_all(ids):
            return self._release()
        for i in ids:
            self._num_ids += 1
            if stop := self._scan(self._stream.push([i])):
                return self._end(stop)
            if self._stream.is_whole:
                self._boundaries.append((self._num_ids, self._num_chars))
        return self._release()

    def _push_all(self, ids: list[int]) -> bool:
        """Adds ids at once, if they end with a whole character and there are no stop strings.

        It takes a tenth of the time: each push decodes a window of ids again.
        """
        stream = copy.copy(self._stream)
        text = stream.push(ids)
        if not stream.is_whole:
            return False
        self._stream = stream
        self._num_ids += len(ids)
        self._see(text)
        self._boundaries.append((self._num_ids, self._num_chars))
        return True

    def finish(self) -> Released:
        """Releases what is held: no further ids will come."""
        if self._stream is None:
            return Released(0, '', None)
        if stop := self._scan(self._stream.finish()):
            return self._end(stop)
        return Released(self._take_ids(self._num_ids), self._take_text(0), None)

    def interrupt(self, ids: Iterable[int]) -> Released:
        """Releases what is held, because these ids, which are not the sample's own, follow it.

        Their text is not released, and no stop string reaches across them.
        """
        if self._stream is None:
            return Released(0, '', None)
        self._see(self._stream.finish())
        released = Released(self._take_ids(self._num_ids), self._take_text(0), None)
        self._stream.push(ids)
        self._stream.finish()
        self._node = self._root
        self._boundaries.clear()
        return released

    def _scan(self, text: str) -> str | None:
        """Reads text up to the first stop string and returns that."""
        for index, char in enumerate(text):
            self._node = self._node.follow(char)
            if self._node.stop and self._num_ids >= self._min_tokens:
                self._see(text[: index + 1])
                return self._node.stop
        self._see(text)
        return None

    def _see(self, text: str) -> None:
        self._held += text
        self._num_chars += len(text)

    def _release(self) -> Released:
        """Releases all but the end of the text that may become a stop string."""
        text = self._take_text(self._node.depth)
        count = 0
        while self._boundaries and self._boundaries[0][1] <= self._num_chars - len(self._held):
            count += self._take_ids(self._boundaries.popleft()[0])
        return Released(count, text, None)

    def _end(self, stop: str) -> Released:
        return Released(self._take_ids(self._num_ids), self._take_text(len(stop)), stop)

    def _take_text(self, kept: int) -> str:
        cut = len(self._held) - kept
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def _take_ids(self, total: int) -> int:
        count, self._released_ids = total - self._released_ids, total
        return count


class _Node:
    """A prefix of stop strings: the longest one that the text ends with."""

    __slots__ = ('depth', 'following', 'shorter', 'stop')

    def __init__(self, depth: int):
        self.depth = depth  # characters
        self.following: dict[str, _Node] = {}
        self.shorter: _Node | None = None  # the next shorter prefix that the text also ends with
        self.stop: str | None = None  # the longest stop string that the text ends with

    def follow(self, char: str) -> '_Node':
        node = self
        while char not in node.following:
            if node.shorter is None:
                return node
            node = node.shorter
        return node.following[char]


@functools.lru_cache(maxsize=8)  # samples of one request share it
def _build_automaton(strings: tuple[str, ...]) -> _Node:
    """The automaton of Aho and Corasick (1975): constant time per character, for any strings."""
    root = _Node(0)
    for string in strings:
        node = root
        for char in string:
            node = node.following.setdefault(char, _Node(node.depth + 1))
        node.stop = string
    waiting = collections.deque([root])
    while waiting:
        node = waiting.popleft()
        for char, child in node.following.items():
            child.shorter = node.shorter.follow(char) if node.shorter else root
            child.stop = child.stop or child.shorter.stop
            waiting.append(child)
    return root

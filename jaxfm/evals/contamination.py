"""Contamination: which evaluation prompts stand in the training text.

A prompt is contaminated when 13 words of it in a row (Brown et al. 2020, GPT-3), or all of it
when it has fewer, stand in a train document. Words are runs of letters and digits, in lower case.
"""

import re
from collections.abc import Iterable, Iterator

import numpy as np

from jaxfm.data.dataset import Dataset

# So much of the training text is looked at, evenly spread over its documents: about two minutes.
MAX_BYTES = 1 << 29
# Words that are hashed together.
WORDS_AT_ONCE = 1 << 18

_WORD = re.compile(r'\w+')
_BETWEEN = '\0'  # between documents; no word
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


class Grams:
    """The n-grams of prompts, found in texts by their hashes and then compared."""

    def __init__(self, prompts: Iterable[str], n: int):
        self.found: set[int] = set()
        # {length: {words: numbers of the prompts that have them}}
        self._prompts: dict[int, dict[tuple[str, ...], list[int]]] = {}
        for number, prompt in enumerate(prompts):
            words = words_of(prompt)
            length = min(n, len(words))
            grams = {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}
            for gram in grams if words else ():
                self._prompts.setdefault(length, {}).setdefault(gram, []).append(number)
        self._hashes = {
            length: np.unique([_hashes(_hashes_of_words(gram), length)[0] for gram in grams])
            for length, grams in self._prompts.items()
        }

    def scan(self, words: list[str]) -> None:
        """Adds to `found` the prompts that have an n-gram in these words."""
        hashes_of_words = _hashes_of_words(words)
        for length, wanted in self._hashes.items():
            hashes = _hashes(hashes_of_words, length)
            where = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
            for i in np.flatnonzero(wanted[where] == hashes).tolist():
                self.found.update(self._prompts[length].get(tuple(words[i : i + length]), ()))


def measure(
    dataset: Dataset, prompts: list[str], n: int = 13, max_bytes: int = MAX_BYTES
) -> dict[str, int | float]:
    """{prompts, contaminated, contaminated_share, ngram, bytes_read, bytes_total} of prompts.

    Of a training text longer than `max_bytes` only every k-th document is read, or, on the fly, its
    beginning; `bytes_read` says how much it was, `bytes_total` of how much (0: not known).
    """
    grams, num_bytes = Grams(prompts, n), 0
    for words, size in _blocks(dataset.train_texts(max_bytes), max_bytes):
        grams.scan(words)
        num_bytes += size
    return {
        'prompts': len(prompts),
        'contaminated': len(grams.found),
        'contaminated_share': len(grams.found) / max(1, len(prompts)),
        'ngram': n,
        'bytes_read': num_bytes,
        'bytes_total': dataset.num_train_bytes,
    }


def words_of(text: str) -> list[str]:
    """What is compared: case, space and punctuation do not matter."""
    return _WORD.findall(text.lower())


def _blocks(texts: Iterable[str], max_bytes: int) -> Iterator[tuple[list[str], int]]:
    """(words of many texts, their UTF-8 bytes), at most `max_bytes` in all."""
    words, size, left = [], 0, max_bytes
    for text in texts:
        text = text[:left]
        num_bytes = len(text.encode('utf-8', 'replace'))
        words += words_of(text)
        words.append(_BETWEEN)
        size, left = size + num_bytes, left - num_bytes
        if len(words) >= WORDS_AT_ONCE:
            yield words, size
            words, size = [], 0
        if left <= 0:
            break
    yield words, size


def _hashes_of_words(words: Iterable[str]) -> np.ndarray:
    # Python's hash is another one in every process; what it finds is compared, so nothing is lost.
    return np.array([hash(word) for word in words], np.int64).view(np.uint64)


def _hashes(of_words: np.ndarray, length: int) -> np.ndarray:
    """[number of words - length + 1]: a hash of every `length` words in a row."""
    count = max(0, len(of_words) - length + 1)
    hashes = np.zeros(count, np.uint64)
    for i in range(length):
        hashes = hashes * _FACTOR + of_words[i : i + count]
    return hashes

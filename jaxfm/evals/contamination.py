"""Contamination: which evaluation prompts occur in the training text.

A prompt is contaminated if any 13 consecutive words of it (Brown et al. 2020, GPT-3) occur in a
training document; for a shorter prompt, all of its words. Words are lower-cased runs of letters,
digits and underscores.
"""

import re
from collections.abc import Iterable, Iterator

import numpy as np

from jaxfm.data.dataset import Dataset

# How much of the training text is searched, spread evenly over its documents: about two minutes.
MAX_BYTES = 1 << 29
# Words hashed in one batch.
WORDS_AT_ONCE = 1 << 18

_WORD = re.compile(r'\w+')
_BETWEEN = '\0'  # separates documents; matches no word
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


class Grams:
    """The n-grams of prompts. Candidates in a text are found by hash, then compared exactly."""

    def __init__(self, prompts: Iterable[str], n: int):
        self.found: set[int] = set()
        # {length: {n-gram: indices of the prompts that contain it}}
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
        """Adds to `found` the prompts that share an n-gram with these words."""
        hashes_of_words = _hashes_of_words(words)
        for length, wanted in self._hashes.items():
            hashes = _hashes(hashes_of_words, length)
            where = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
            for i in np.flatnonzero(wanted[where] == hashes).tolist():
                self.found.update(self._prompts[length].get(tuple(words[i : i + length]), ()))


def measure(
    dataset: Dataset, prompts: list[str], n: int = 13, max_bytes: int = MAX_BYTES
) -> dict[str, int | float]:
    """Counts the prompts that occur in the training text.

    Returns {prompts, contaminated, contaminated_share, ngram, bytes_read, bytes_total}.

    If the training text is longer than `max_bytes`, only every k-th document is read, or, if the
    data is tokenized on the fly, only the beginning. `bytes_read` of `bytes_total` bytes were
    searched; a total of 0 means unknown.
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
    """The words to compare; case, white space and punctuation are ignored."""
    return _WORD.findall(text.lower())


def _blocks(texts: Iterable[str], max_bytes: int) -> Iterator[tuple[list[str], int]]:
    """Yields (words of several texts, their UTF-8 bytes), at most about `max_bytes` in total."""
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
    # Python's hash of strings differs between processes, but all candidates are compared exactly.
    return np.array([hash(word) for word in words], np.int64).view(np.uint64)


def _hashes(of_words: np.ndarray, length: int) -> np.ndarray:
    """Hashes of all runs of `length` consecutive words, [number of words - length + 1]."""
    count = max(0, len(of_words) - length + 1)
    hashes = np.zeros(count, np.uint64)
    for i in range(length):
        hashes = hashes * _FACTOR + of_words[i : i + count]
    return hashes

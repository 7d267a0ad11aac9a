"""A corpus: tokenizer, train and held-out tokens of one data config, built once and kept on disk.

The cache is a directory named by the fingerprint of what went in: every byte of every document, the
tokenizer's config, the format. It is written under another name and renamed when it is whole, so a
killed build is never taken for a cache and two processes may build the same one at the same time.
"""

import functools
import hashlib
import json
import logging
import lzma
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from jaxfm.data import SOURCES, TOKENIZERS, DataConfig, token_cache, tokenizer
from jaxfm.data.sources import Document, Survey
from jaxfm.data.token_cache import TokenCache
from jaxfm.errors import DataError, PermissionDeniedError, StorageError

log = logging.getLogger('jaxfm')

# Part of the fingerprint: raise it when the files below or the way to write them change.
FORMAT = 1
# Sizes and digests of the other files of a cache.
INDEX = 'index.json'
# A tokenizer is trained on this much text at most, from documents in the order of their digest.
TRAINING_BYTES = 1 << 28


class Corpus:
    """An opened cache; DataError when a file of it is damaged."""

    def __init__(self, directory: Path, survey: Survey, sequence_length: int):
        _verify(directory)
        self.tokenizer = tokenizer.load(directory / 'tokenizer.json')
        # Names the tokens themselves: the same recipe with other merges has another fingerprint.
        self.fingerprint = _digest(f'{directory.name} {self.tokenizer.fingerprint}')
        vocab_size = self.tokenizer.vocab_size
        self.train = TokenCache(directory, 'train', vocab_size, self.fingerprint)
        self.heldout = TokenCache(directory, 'heldout', vocab_size, self.fingerprint)
        self._survey = survey
        self._sequence_length = sequence_length

    @functools.cached_property
    def heldout_documents(self) -> list[tuple[str, str]]:
        """(name, text) of every held-out document."""
        return [(document.name, document.read()) for document in self._survey.heldout]

    @property
    def statistics(self) -> dict[str, int | float | str]:
        """What went in and what came out; bytes are UTF-8, tokens include <|bos|> and <|eos|>."""
        train, heldout = self.train, self.heldout
        return {
            'train_documents': train.num_documents,
            'train_bytes': train.num_bytes,
            'train_tokens': train.num_tokens,
            'heldout_documents': heldout.num_documents,
            'heldout_bytes': heldout.num_bytes,
            'heldout_tokens': heldout.num_tokens,
            'bytes_per_token': train.num_bytes / train.num_tokens,
            'vocab_size': self.tokenizer.vocab_size,
            'duplicates_dropped': self._survey.duplicates,
            'files_skipped': self._survey.skipped,
            # They are split over rows, not cut off.
            'longer_than_context': int((np.diff(train.offsets) > self._sequence_length).sum()),
            'fingerprint': self.fingerprint,
        }


def build(config: DataConfig, cache_dir: Path) -> Corpus:
    """Opens the corpus of a config, after tokenising it if it is not in `cache_dir` yet."""
    survey = SOURCES[config.source.name].load()(config.source).survey()
    recipe = [FORMAT, survey.fingerprint, config.tokenizer.model_dump(), tokenizer.PATTERNS]
    directory = Path(cache_dir) / _digest(json.dumps(recipe))[:32]
    if not directory.exists():
        _build(config, survey, directory)
    return Corpus(directory, survey, config.sequence_length)


def xz_bits_per_byte(texts: Iterable[str]) -> float:
    """Bits per UTF-8 byte that `xz -9e` needs for the texts one after the other: a line to beat."""
    content = ''.join(texts).encode()
    return 8 * len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)) / len(content)


def _build(config: DataConfig, survey: Survey, directory: Path) -> None:
    started = time.perf_counter()
    partial = directory.with_name(f'{directory.name}.partial-{uuid.uuid4().hex[:8]}')
    try:
        partial.mkdir(parents=True)
        trained = TOKENIZERS[config.tokenizer.name].load()(
            config.tokenizer, _training_texts(survey.train)
        )
        trained.save(partial / 'tokenizer.json')
        token_cache.write(partial, 'train', survey.train, trained)
        token_cache.write(partial, 'heldout', survey.heldout, trained)
        _write_index(partial)
        _publish(partial, directory)
    except OSError as error:
        if isinstance(error, PermissionError):
            raise PermissionDeniedError(
                f'{directory.parent} cannot be written: permission denied'
            ) from error
        raise StorageError(f'the token cache in {directory.parent}: {error.strerror}') from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    seconds = time.perf_counter() - started
    log.info('tokenised %d documents in %.1f s', len(survey.train) + len(survey.heldout), seconds)


def _publish(partial: Path, directory: Path) -> None:
    try:
        partial.rename(directory)
    except OSError:
        # Another process has built the same cache meanwhile; its files are as good as ours.
        if not directory.exists():
            raise


def _training_texts(documents: Iterable[Document]) -> Iterator[str]:
    left = TRAINING_BYTES
    for document in sorted(documents, key=lambda document: document.digest):
        if left <= 0:
            return
        yield document.read()[:left]
        left -= document.num_bytes


def _write_index(directory: Path) -> None:
    files = sorted(directory.iterdir())
    index = {
        file.name: {'bytes': file.stat().st_size, 'sha256': _file_digest(file)} for file in files
    }
    (directory / INDEX).write_text(json.dumps(index, indent=1))


def _verify(directory: Path) -> None:
    """Compares every file with the index; DataError names the first that differs."""
    remedy = f'remove {directory} to have it built again'
    try:
        index = json.loads((directory / INDEX).read_text())
        expected = [
            (directory / name, entry['bytes'], entry['sha256']) for name, entry in index.items()
        ]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f'{directory / INDEX} is damaged ({error}); {remedy}') from error
    for file, size, digest in expected:
        if not file.exists():
            raise DataError(f'{file} is missing; {remedy}')
        if file.stat().st_size != size:
            raise DataError(f'{file} has {file.stat().st_size} bytes instead of {size}; {remedy}')
        if _file_digest(file) != digest:
            raise DataError(f'{file}: digest mismatch; {remedy}')


def _file_digest(path: Path) -> str:
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

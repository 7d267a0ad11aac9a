"""The ledger of a build: which shards are done, and which error stops it."""

import json
import logging
import math
import time
from pathlib import Path

from jaxfm.data.corpus.parts import TooManyInShard
from jaxfm.data.documents import KIND_NAMES, Kind
from jaxfm.data.sources.files import check_bad_records
from jaxfm.errors import DataError, StorageError

log = logging.getLogger('jaxfm')

# Seconds between two progress lines in the log.
LOG_SECONDS = 10


class Ledger:
    """Which shards are done, and which error stops the build: always the first in shard order."""

    def __init__(self, source, shards: list, parts: list[Path], allowed: float):
        self._source, self._shards, self._parts = source, shards, parts
        self._allowed = allowed  # bad records
        self._results: dict[int, list | Exception] = {}
        self._next = 0  # all shards before this one are done
        self._failed = math.inf  # the first shard that could not be made
        self._bad = []
        self._kinds: dict[Kind, str] = {}  # the first document of each kind
        self._bytes = self._tokens = 0
        self._started = self._logged = time.perf_counter()
        self.num_documents = 0
        for i, part in enumerate(parts):
            if part.exists():
                self._results[i] = json.loads((part / 'part.json').read_text('utf-8'))
        self._advance()

    @property
    def num_bad(self) -> int:
        return len(self._bad)

    @property
    def kind(self) -> Kind:
        """What the documents are."""
        return next(iter(self._kinds), 'text')

    def progress(self, num_bytes: int, num_tokens: int) -> None:
        """Adds to the counts, and logs them every LOG_SECONDS."""
        self._bytes += num_bytes
        self._tokens += num_tokens
        now = time.perf_counter()
        if now - self._logged >= LOG_SECONDS:
            self._logged = now
            log.info(
                'tokenising: %d of %d parts, %.0f MB of text, %.1fM tokens, %.2fM tokens/s',
                *(len(self._results), len(self._shards), self._bytes / 1e6, self._tokens / 1e6),
                self._tokens / (now - self._started) / 1e6,
            )

    def add(self, index: int, result: dict | Exception) -> None:
        """Records the result of a shard; raises the first error in shard order once it is known."""
        self._results[index] = result
        if isinstance(result, Exception):
            self._failed = min(self._failed, index)
        self._advance()

    def may_start(self, index: int) -> bool:
        """Whether a shard is still needed: it is not once an earlier one has failed."""
        return index < self._failed

    def close(self) -> None:
        """Raises StorageError unless every part is made."""
        if self._next < len(self._shards):
            raise StorageError(f'{self._parts[self._next]} was not made')

    def _advance(self) -> None:
        while self._next in self._results:
            result, shard = self._results[self._next], self._shards[self._next]
            if isinstance(result, Exception) and not isinstance(result, TooManyInShard):
                raise result
            summary = result.summary if isinstance(result, TooManyInShard) else result
            self._bad += [self._unpack(shard, bad) for bad in summary['bad']]
            if len(self._bad) > self._allowed:
                check_bad_records(self._bad, self._allowed)
            self._check_kind(summary)
            self._next += 1

    def _unpack(self, shard, bad):
        return bad if isinstance(bad, str) else self._source.unpack(shard, bad)

    def _check_kind(self, summary: dict) -> None:
        """Raises DataError unless all documents so far are of one kind."""
        for kind, name in summary['kinds'].items():
            self._kinds.setdefault(kind, name)
        if len(self._kinds) > 1:
            found = sorted(self._kinds.items())
            told = ', '.join(f'{name} is {KIND_NAMES[kind]}' for kind, name in found)
            raise DataError(
                f'{told}: all documents of a source are of one kind; split it into sources of a '
                'mixture'
            )

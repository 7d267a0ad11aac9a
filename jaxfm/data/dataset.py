"""The data of one phase: its sources, batches of their rows, and the held-out documents.

`open_dataset` tokenises what is not in the cache yet, or opens the sources for reading on the fly.
"""

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxfm.chat.render import Chat
from jaxfm.data import SOURCES, DataConfig
from jaxfm.data.corpus.build import Corpus, open_corpus
from jaxfm.data.corpus.encode import make_encoder
from jaxfm.data.corpus.heldout import Heldout, open_heldout
from jaxfm.data.corpus.token_cache import TokenCache
from jaxfm.data.documents import Document
from jaxfm.data.loader import Batches, PackedBatches, Put
from jaxfm.data.packing.rows import Packing, make_packing
from jaxfm.data.streaming import OnTheFly, Stream
from jaxfm.schema import Group
from jaxfm.tokenizer.build import Tokenizer

log = logging.getLogger('jaxfm')


class Dataset:
    """What a run sees of a phase's data.

    Attributes:
      sources: {name: its Corpus, or its Heldout if it is read on the fly}.
      heldout: {name: held-out tokens}.
      packings: {name: the rows of the train tokens}; empty if these are read on the fly.

    Raises:
      ConfigError, DataError: rows cannot be made as the config asks.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, sources: dict):
        self.config, self.tokenizer = config, tokenizer
        self.sources: dict[str, Corpus | Heldout] = sources
        self.sequence_length: int = config.sequence_length
        self.weights = config.all_weights
        self.heldout: dict[str, TokenCache] = {n: source.heldout for n, source in sources.items()}
        self.packings: dict[str, Packing] = {}
        if config.tokenize == 'cached':
            self.packings = {n: make_packing(source.train, config) for n, source in sources.items()}
        for packing in self.packings.values():
            _warn_of_lost(packing)
        self.batches(seed=0)  # raise now, before anything else is done, if rows cannot be made

    def batches(self, seed: int, rows: np.ndarray | None = None, put: Put | None = None) -> Batches:
        """Training batches from the first on; makes only `rows` of each, None is all.

        put: puts a batch on the devices, ahead of its step; None leaves it on the host.
        """
        config = self.config
        if config.tokenize == 'cached':
            return PackedBatches(self.packings, self.weights, config.batch_size, seed, rows, put)
        streams = {name: self._stream(each) for name, each in config.all_sources.items()}
        fingerprints = {name: source.fingerprint for name, source in self.sources.items()}
        vocab_size = self.tokenizer.vocab_size
        return OnTheFly(streams, fingerprints, self.weights, config, vocab_size, rows, put)

    def _stream(self, config: Group) -> Stream:
        make_source = functools.partial(SOURCES.load(config.name), config)
        return Stream(make_source, make_encoder(config, self.tokenizer), self.config)

    @functools.cached_property
    def chat(self) -> Chat:
        """Encodes chats for this run's tokenizer."""
        return Chat(self.tokenizer)

    @functools.cached_property
    def heldout_documents(self) -> list[Document]:
        """The held-out documents of all sources; in a mixture, names start with '<source>/'."""
        if len(self.sources) == 1:
            return next(iter(self.sources.values())).heldout_documents
        return [
            dataclasses.replace(document, name=f'{name}/{document.name}')
            for name, source in self.sources.items()
            for document in source.heldout_documents
        ]

    @property
    def num_heldout_bytes(self) -> int:
        """UTF-8 bytes of all held-out documents."""
        return sum(cache.num_bytes for cache in self.heldout.values())

    @property
    def fingerprint(self) -> str:
        """Changes with any token and with the share of any source; it is the same on every host.

        Of a source read on the fly, it changes with any held-out token, and with what the source
        can tell of its documents before they are read.
        """
        parts = [[n, source.contents, self.weights[n]] for n, source in self.sources.items()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @functools.cached_property
    def statistics(self) -> dict[str, int | float | str]:
        """What was read and how it is packed; in a mixture, names start with '<source>/'."""
        each = {name: self._source_statistics(name) for name in self.sources}
        vocab_size = {'vocab_size': self.tokenizer.vocab_size}
        if len(each) == 1:
            return dict(*each.values()) | vocab_size
        flat = {f'{name}/{key}': v for name, found in each.items() for key, v in found.items()}
        return flat | vocab_size

    def _source_statistics(self, name: str) -> dict[str, int | float | str]:
        source = self.sources[name]
        statistics = dict(source.statistics)
        if packing := self.packings.get(name):
            packed = dict(packing.statistics)
            statistics['rows_per_epoch'] = packed.pop('rows')
            del packed['tokens']
            statistics |= packed
        if len(self.sources) > 1:
            statistics['share'] = self.weights[name] / sum(self.weights.values())
        return statistics

    @property
    def num_train_bytes(self) -> int:
        """UTF-8 bytes of all train documents; sources read on the fly count as 0."""
        corpora = [source for source in self.sources.values() if isinstance(source, Corpus)]
        return sum(source.train.num_bytes for source in corpora)

    def train_texts(self, max_bytes: int) -> Iterator[str]:
        """Yields train documents as text: the same share of every source, about `max_bytes` in all.

        Sources that are read on the fly are read from the beginning, without a limit.
        """
        every = max(1, -(-self.num_train_bytes // max_bytes))
        for name, source in self.sources.items():
            if isinstance(source, Heldout):
                yield from _read(self.config.all_sources[name])
                continue
            cache = source.train
            for document in range(0, cache.num_documents, every):
                start, stop = cache.offsets[document : document + 2]
                yield self.tokenizer.decode(cache.tokens[start:stop].tolist())


def _warn_of_lost(packing: Packing) -> None:
    """Warns of chats that are left out; otherwise only a table of statistics would show it."""
    lost = packing.statistics['dropped_documents']
    if lost:
        lengths = np.diff(packing.cache.offsets)
        enough = int(np.quantile(lengths, 0.95, method='higher'))
        log.warning(
            'config.data.too_long: %d of %d chats do not fit a row of %d tokens and are left out; '
            'config.data.sequence_length=%d would keep 95 %%',
            *(lost, len(lengths), packing.sequence_length, enough),
        )


def open_dataset(config: DataConfig, tokenizer: Tokenizer, cache_dir: Path) -> Dataset:
    """Opens the data of a phase; what is not tokenised yet is tokenised into `cache_dir`.

    If `config.cache` is set, the tokens are read from that directory, which has a subdirectory for
    each source of a mixture.
    """
    sources = {}
    for name, each in config.all_sources.items():
        if config.tokenize == 'cached':
            inside = name if config.name == 'mixture' else ''
            sources[name] = open_corpus(each, tokenizer, cache_dir, config.cache, inside)
        else:
            sources[name] = open_heldout(each, tokenizer, cache_dir)
    return Dataset(config, tokenizer, sources)


def _read(config: Group) -> Iterator[str]:
    source = SOURCES.load(config.name)(config)
    for shard in source.shards():
        for is_heldout, document in source.read(shard):
            if not is_heldout:
                texts = [turn['content'] for turn in document.messages] or [document.text]
                yield '\n'.join(texts)

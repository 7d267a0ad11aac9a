"""The held-out documents of a source whose train documents are read on the fly.

They are tokenised once: all documents are read, but only the held-out ones are tokenised. Duplicate
text files are not removed here, while a corpus that is tokenised before training drops them.
"""

import functools
import hashlib
import json
import shutil
from pathlib import Path

from jaxfm.code import find_digest
from jaxfm.data import SOURCES
from jaxfm.data.corpus import token_cache
from jaxfm.data.corpus.encode import make_encoder, read_chunks
from jaxfm.data.corpus.token_cache import TokenCache
from jaxfm.data.documents import Document, Kind
from jaxfm.errors import DataError
from jaxfm.storage import whole
from jaxfm.tokenizer.build import Tokenizer

# Part of the recipe: raise it when the files, or the way they are written, change.
FORMAT = 1


class Heldout:
    """The held-out part of a source read on the fly. `fingerprint` changes with its files.

    source_contents: the `contents()` of the source, if it has that.
    """

    def __init__(self, directory: Path, vocab_size: int, fingerprint: str, source_contents: str):
        self.directory, self.fingerprint = directory, fingerprint
        self._source_contents = source_contents
        self.statistics = json.loads((directory / 'statistics.json').read_text('utf-8'))
        self.kind: Kind = 'chat' if (directory / 'heldout.mask').exists() else 'text'
        self.heldout = TokenCache(directory, 'heldout', vocab_size, fingerprint, self.kind)

    @functools.cached_property
    def contents(self) -> str:
        """Hash of what the documents are, as far as it is known, not of where they come from."""
        digest = hashlib.sha256(self._source_contents.encode())
        digest.update(self.heldout.tokens)
        return digest.hexdigest()

    @functools.cached_property
    def heldout_documents(self) -> list[Document]:
        """The held-out documents, at most the first 256 MiB of them."""
        return token_cache.read_documents(self.directory)


def open_heldout(config, tokenizer: Tokenizer, cache_dir: Path) -> Heldout:
    """Opens the held-out documents of a source's config; tokenises them first if needed."""
    source = SOURCES.load(config.name)(config)
    recipe = [FORMAT, config.model_dump(mode='json'), source.fingerprint(), tokenizer.fingerprint]
    if code := find_digest(config.name):
        recipe.append(code)
    fingerprint = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    directory = Path(cache_dir) / f'heldout-{fingerprint[:32]}'
    if not directory.exists():
        with token_cache.explain_cache_errors(directory):
            _build(config, tokenizer, directory)
    contents = source.contents() if hasattr(source, 'contents') else ''
    return Heldout(directory, tokenizer.vocab_size, fingerprint, contents)


def _build(config, tokenizer: Tokenizer, directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    with whole.write_directory(directory) as partial:
        (partial / 'part').mkdir()
        _write(config, tokenizer, partial / 'part')
        statistics = token_cache.join([partial / 'part'], partial, tokenizer.vocab_size)
        shutil.rmtree(partial / 'part')
        heldout = {name: v for name, v in statistics.items() if name.startswith('heldout_')}
        if not heldout['heldout_documents']:
            raise DataError('config.data: no document is held out; raise heldout_fraction')
        (partial / 'statistics.json').write_text(json.dumps(heldout), 'utf-8')


def _write(config, tokenizer: Tokenizer, part: Path) -> None:
    source, encode = SOURCES.load(config.name)(config), make_encoder(config, tokenizer)
    documents = (pair for shard in source.shards() for pair in source.read(shard) if pair[0])
    # `join` expects both sides; this one stays empty.
    with token_cache.Writer(part, 'train', tokenizer.vocab_size):
        pass
    with token_cache.Writer(part, 'heldout', tokenizer.vocab_size) as writer:
        for chunk in read_chunks(documents):
            for _, document, ids, mask in encode(chunk):
                writer.add(document, ids, mask, has_digest=False)

"""A corpus: train and held-out tokens of one source, made once and kept on disk.

The cache is a directory named by its recipe: the source's files and config, the tokenizer, the
format. Contents are neither read nor digested when it is opened; `verify_corpus` does that.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from jaxfm.data import SOURCES
from jaxfm.data.corpus import token_cache
from jaxfm.data.corpus.ledger import Ledger
from jaxfm.data.corpus.recipe import (
    PLACES,
    digest,
    drop_places,
    list_differences,
    make_recipe,
    select_source,
)
from jaxfm.data.corpus.token_cache import TokenCache
from jaxfm.data.corpus.workers import make_parts
from jaxfm.data.documents import Document
from jaxfm.errors import DataError, MissingInputError
from jaxfm.storage import whole
from jaxfm.tokenizer.build import Tokenizer, load_tokenizer

log = logging.getLogger('jaxfm')

# Recipe, statistics, and sizes and digests of the other files of a cache.
INDEX = 'index.json'

_REBUILD = '`python -m tools.corpus build --config FILE --output DIR --rebuild` makes it anew'


class Corpus:
    """An opened cache; DataError when a file of it is missing or has not its length."""

    def __init__(self, directory: Path, tokenizer: Tokenizer | None = None):
        self.directory = Path(directory)
        self.index = _read_index(self.directory)
        self.tokenizer = tokenizer or load_tokenizer(self.directory / 'tokenizer')
        # Of the tokens and masks themselves, not of where they come from.
        self.fingerprint: str = self.index['fingerprint']
        self.is_chat: bool = self.index['is_chat']
        vocab_size = self.index['vocab_size']
        self.train, self.heldout = (
            TokenCache(self.directory, side, vocab_size, self.fingerprint, self.is_chat)
            for side in token_cache.SIDES
        )

    @functools.cached_property
    def heldout_documents(self) -> list[Document]:
        """The held-out documents; of very many, the first 256 MiB."""
        return token_cache.read_documents(self.directory)

    @property
    def statistics(self) -> dict[str, int | float | str]:
        """What went in and what came out; bytes are UTF-8, tokens include special tokens.

        'train_length_histogram/64' is how many documents have 33 to 64 tokens.
        """
        statistics = dict(self.index['statistics'])
        statistics['bytes_per_token'] = statistics['train_bytes'] / statistics['train_tokens']
        return statistics | {
            'vocab_size': self.index['vocab_size'],
            'fingerprint': self.fingerprint,
        }


def open_corpus(config, tokenizer: Tokenizer, cache_dir: Path, cache: str = '') -> Corpus:
    """Opens the corpus of a source's config, after tokenising it if it is not there yet.

    `cache` names a directory made by `make_corpus`, which is opened and never made here.
    """
    config = select_source(config)
    if cache:
        _check_given(Path(cache), config, tokenizer)
        return Corpus(Path(cache), tokenizer)
    recipe = make_recipe(config, tokenizer)
    key = digest(json.dumps(drop_places(recipe), sort_keys=True))[:32]
    directory = Path(cache_dir) / key
    _make_cache(directory, recipe, config, tokenizer)
    return Corpus(directory, tokenizer)


def make_corpus(config, tokenizer: Tokenizer, directory: Path, rebuild: bool = False) -> Corpus:
    """Makes a cache in a directory of the caller's choice, or goes on making it.

    One that is there is opened, if it is of the same recipe; `rebuild` replaces another one.
    """
    config, directory = select_source(config), Path(directory)
    recipe = make_recipe(config, tokenizer)
    partial = directory.with_name(f'{directory.name}.partial')
    if directory.exists() and rebuild:
        _check_is_cache(directory)  # never anything else that somebody keeps there
        _remove(directory)
    if directory.exists():
        _check_given(directory, config, tokenizer)
    elif partial.exists() and _partial_recipe(partial) != recipe:
        _remove(partial)
    if not directory.exists():
        partial.mkdir(parents=True, exist_ok=True)
        (partial / 'recipe.json').write_text(json.dumps(recipe))
        _make_cache(directory, recipe, config, tokenizer)
    return Corpus(directory, tokenizer)


def verify_corpus(directory: Path) -> None:
    """Reads every file of a cache; DataError names the first that is not as it was made."""
    directory = Path(directory)
    for name, entry in _read_index(directory)['files'].items():
        if _file_digest(directory / name) != entry['sha256']:
            raise DataError(f'{directory / name}: digest mismatch; {_remedy(directory)}')


def _make_cache(directory: Path, recipe: dict, config, tokenizer: Tokenizer) -> None:
    """Makes the cache `directory` of a source's config, if it is not there yet."""
    partial = directory.with_name(f'{directory.name}.partial')
    with token_cache.explain_cache_errors(directory):
        while not directory.exists():
            partial.mkdir(parents=True, exist_ok=True)
            try:
                with _lock(partial / 'lock'):
                    if not directory.exists():
                        _build(directory, partial, recipe, config, tokenizer)
            except DataError:
                # The data must change, and with it the recipe: nobody will need these parts.
                shutil.rmtree(partial, ignore_errors=True)
                raise
            except FileNotFoundError:
                # Another process has finished, and removes the partial directory.
                if partial.exists() and not directory.exists():
                    raise


def _build(directory: Path, partial: Path, recipe: dict, config, tokenizer: Tokenizer) -> None:
    started = time.perf_counter()
    source = SOURCES.load(config.name)(config)
    shards = source.shards()
    parts = [partial / 'parts' / f'{i:06d}' for i in range(len(shards))]
    parts[0].parent.mkdir(exist_ok=True)
    allowed = getattr(config, 'max_bad_records', math.inf)
    ledger = Ledger(source, shards, parts, allowed)
    missing = [i for i, part in enumerate(parts) if not part.exists()]
    if 0 < len(missing) < len(parts):
        log.info('tokenising: %d of %d parts have to be made', len(missing), len(parts))
    todo = [(i, shards[i], parts[i]) for i in missing]
    make_parts(todo, config, tokenizer, partial, ledger)
    ledger.close()
    _join(directory, partial, recipe, parts, ledger, tokenizer)
    shutil.rmtree(partial, ignore_errors=True)
    seconds = time.perf_counter() - started
    log.info('tokenised %d documents in %.1f s', ledger.num_documents, seconds)


def _join(directory: Path, partial: Path, recipe: dict, parts, ledger, tokenizer) -> None:
    with whole.write_directory(directory, within=partial) as joined:
        statistics = token_cache.join(parts, joined, tokenizer.vocab_size)
        statistics |= {'bad_records': ledger.num_bad, 'vocab_size': tokenizer.vocab_size}
        ledger.num_documents = statistics['train_documents'] + statistics['heldout_documents']
        _check_sides(statistics)
        tokenizer.save(joined / 'tokenizer')
        _finish(recipe, joined, statistics)


def _check_sides(statistics: dict) -> None:
    """Raises DataError unless there are train documents and held-out ones."""
    total = statistics['train_documents'] + statistics['heldout_documents']
    if not statistics['train_documents']:
        raise DataError(f'config.data: of {total} documents none is left to train on')
    if not statistics['heldout_documents']:
        raise DataError(
            f'config.data: of {total} documents none is held out; raise heldout_fraction, '
            'or name other files in heldout_path'
        )


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Waits for another process that builds the same; where files cannot be locked both build."""
    with open(path, 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info('tokenising: another process does it already; waiting')
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            log.warning('%s cannot be locked; going on without', path)
        yield


def _partial_recipe(partial: Path) -> dict | None:
    try:
        return json.loads((partial / 'recipe.json').read_text())
    except (OSError, ValueError):
        return None


def _finish(recipe: dict, directory: Path, statistics: dict) -> None:
    """Writes the index of a cache whose other files are there."""
    files = sorted(path for path in directory.rglob('*') if path.is_file())
    entries = {
        path.relative_to(directory).as_posix(): {
            'bytes': path.stat().st_size,
            'sha256': _file_digest(path),
        }
        for path in files
    }
    contents = [
        [name, entry['sha256']]
        for name, entry in entries.items()
        if name.endswith(('.tokens', '.mask', '.npy'))
    ]
    index = {
        'recipe': recipe,
        'fingerprint': digest(json.dumps(contents)),
        'is_chat': 'train.mask' in entries,
        'vocab_size': statistics.pop('vocab_size'),
        'statistics': statistics,
        'files': entries,
    }
    with open(directory / INDEX, 'w') as file:
        json.dump(index, file, indent=1)
        whole.sync(file)


def _check_given(directory: Path, config, tokenizer: Tokenizer) -> None:
    """Raises DataError, with what a cache was made of, unless that is what is wanted."""
    if not directory.exists():
        raise MissingInputError(
            f'config.data.cache: there is no {directory}; '
            f'`python -m tools.corpus build --config FILE --output {directory}` makes it'
        )
    made = _read_index(directory)['recipe']
    try:
        wanted = make_recipe(config, tokenizer)
        ignored = PLACES
    except MissingInputError:
        # The cache has been brought to a machine without the files.
        source = config.model_dump(mode='json')
        wanted = made | {'source': source, 'tokenizer': tokenizer.fingerprint}
        ignored = set()
    differences = list_differences(made, wanted, ignored)
    if differences:
        raise DataError(
            f'the cache {directory} is of other data: {"; ".join(differences)}. {_REBUILD}'
        )


def _check_is_cache(directory: Path) -> None:
    """Raises DataError unless the directory is a cache."""
    if not (directory / INDEX).is_file():
        raise DataError(f'{directory} is no cache of tokens: it has no {INDEX}; name another one')


def _read_index(directory: Path) -> dict:
    """The index; DataError when a file is not there or has not its length."""
    _check_is_cache(directory)
    remedy = _remedy(directory)
    try:
        index = json.loads((directory / INDEX).read_text())
        sizes = {directory / name: entry['bytes'] for name, entry in index['files'].items()}
        missing = {'recipe', 'fingerprint', 'is_chat', 'vocab_size', 'statistics'} - index.keys()
        if missing or not sizes:
            raise KeyError(', '.join(sorted(missing)) or 'files')
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f'{directory / INDEX} is damaged ({error}); {remedy}') from error
    for path, size in sizes.items():
        if not path.exists():
            raise DataError(f'{path} is missing; {remedy}')
        if path.stat().st_size != size:
            raise DataError(f'{path} has {path.stat().st_size} bytes instead of {size}; {remedy}')
    return index


def _remedy(directory: Path) -> str:
    return f'remove {directory} to have it built again'


def _remove(directory: Path) -> None:
    with token_cache.explain_cache_errors(directory):
        whole.remove_directory(directory)


def _file_digest(path: Path) -> str:
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()

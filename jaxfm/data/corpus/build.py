"""A corpus: the train and held-out tokens of one source, made once and kept on disk.

The cache is a directory that is named after its recipe: the source's files and config, the
tokenizer, the format. Opening a cache does not read or hash its contents; `verify_corpus` does.
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
from jaxfm.data.documents import Document, Kind
from jaxfm.errors import DataError, MissingInputError
from jaxfm.storage import whole
from jaxfm.tokenizer.build import Tokenizer, load_tokenizer

log = logging.getLogger('jaxfm')

# Holds the recipe, the statistics, and the sizes and digests of a cache's other files.
INDEX = 'index.json'


class Corpus:
    """An opened cache. Raises DataError if one of its files is missing or has the wrong size."""

    def __init__(self, directory: Path, tokenizer: Tokenizer | None = None):
        self.directory = Path(directory)
        self.index = _read_index(self.directory)
        self.tokenizer = tokenizer or load_tokenizer(self.directory / 'tokenizer')
        # A hash of the tokens and masks themselves, not of where they come from.
        self.fingerprint: str = self.index['fingerprint']
        # Caches made before there were pairs do not say it.
        self.kind: Kind = self.index.get('kind', 'chat' if self.index['is_chat'] else 'text')
        vocab_size = self.index['vocab_size']
        self.train, self.heldout = (
            TokenCache(self.directory, side, vocab_size, self.fingerprint, self.kind)
            for side in token_cache.SIDES
        )

    @property
    def contents(self) -> str:
        """Hash of what the documents are, as in `Heldout`."""
        return self.fingerprint

    @functools.cached_property
    def heldout_documents(self) -> list[Document]:
        """The held-out documents, at most the first 256 MiB of them."""
        return token_cache.read_documents(self.directory)

    @property
    def statistics(self) -> dict[str, int | float | str]:
        """What was read and what it became; bytes are UTF-8, tokens include special tokens.

        'train_length_histogram/64' is how many documents have 33 to 64 tokens.
        """
        statistics = dict(self.index['statistics'])
        statistics['bytes_per_token'] = statistics['train_bytes'] / statistics['train_tokens']
        return statistics | {
            'vocab_size': self.index['vocab_size'],
            'fingerprint': self.fingerprint,
        }


def open_corpus(
    config, tokenizer: Tokenizer, cache_dir: Path, cache: str = '', inside: str = ''
) -> Corpus:
    """Opens the corpus of a source's config; tokenises it first if it is not there yet.

    `cache`, if given, is a directory made by `make_corpus`. It is opened, and never made here. For
    a source of a mixture, `inside` is the name of its directory in `cache`.

    Raises:
        MissingInputError: `cache` or the source's files do not exist.
        DataError: `cache` was made from other data, a file is damaged, or the data is bad.
    """
    config = select_source(config)
    if cache:
        directory = Path(cache) / inside
        if not directory.exists():
            raise MissingInputError(
                f'config.data.cache: {directory} does not exist; '
                f'make it with `python -m tools.corpus build --config FILE --output {cache}`'
            )
        _check_given(directory, config, tokenizer)
        return Corpus(directory, tokenizer)
    recipe = make_recipe(config, tokenizer)
    key = digest(json.dumps(drop_places(recipe), sort_keys=True))[:32]
    directory = Path(cache_dir) / key
    _make_cache(directory, recipe, config, tokenizer)
    return Corpus(directory, tokenizer)


def make_corpus(config, tokenizer: Tokenizer, directory: Path, rebuild: bool = False) -> Corpus:
    """Makes a cache in a directory of the caller's choice, or resumes making it.

    An existing cache is opened if it has the same recipe, else DataError is raised; with `rebuild`
    an existing cache is replaced.
    """
    config, directory = select_source(config), Path(directory)
    recipe = make_recipe(config, tokenizer)
    partial = directory.with_name(f'{directory.name}.partial')
    if directory.exists() and rebuild:
        _check_is_cache(directory)  # never remove anything else that somebody keeps there
        _remove(directory)
    if directory.exists():
        _check_given(directory, config, tokenizer)
    elif partial.exists() and _partial_recipe(partial) != recipe:
        _remove(partial)
    if not directory.exists():
        partial.mkdir(parents=True, exist_ok=True)
        (partial / 'recipe.json').write_text(json.dumps(recipe), 'utf-8')
        _make_cache(directory, recipe, config, tokenizer)
    return Corpus(directory, tokenizer)


def verify_corpus(directory: Path) -> None:
    """Reads every file of a cache. Raises DataError, naming the first file that has changed."""
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
                # The data must change, and so the recipe: these parts will not be used again.
                shutil.rmtree(partial, ignore_errors=True)
                raise
            except FileNotFoundError:
                # Another process has finished, and is removing the partial directory.
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
        log.info('tokenising: resuming, %d of %d parts are left', len(missing), len(parts))
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
        _finish(recipe, joined, statistics, ledger.kind)


def _check_sides(statistics: dict) -> None:
    """Raises DataError unless there are both train and held-out documents."""
    total = statistics['train_documents'] + statistics['heldout_documents']
    if not statistics['train_documents']:
        raise DataError(
            f'config.data: none of {total} documents is left to train on; lower heldout_fraction, '
            'or name other files in heldout_path'
        )
    if not statistics['heldout_documents']:
        raise DataError(
            f'config.data: none of {total} documents is held out; raise heldout_fraction, '
            'or name other files in heldout_path'
        )


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Waits for another process that builds the same; where files cannot be locked both build."""
    with open(path, 'w', encoding='utf-8') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info('tokenising: waiting for another process that is already doing it')
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            log.warning('%s cannot be locked; continuing without a lock', path)
        yield


def _partial_recipe(partial: Path) -> dict | None:
    try:
        return json.loads((partial / 'recipe.json').read_text('utf-8'))
    except (OSError, ValueError):
        return None


def _finish(recipe: dict, directory: Path, statistics: dict, kind: Kind) -> None:
    """Writes the index of a cache, after all its other files."""
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
        'kind': kind,
        'vocab_size': statistics.pop('vocab_size'),
        'statistics': statistics,
        'files': entries,
    }
    with open(directory / INDEX, 'w', encoding='utf-8') as file:
        json.dump(index, file, indent=1)
        whole.sync(file)


def _check_given(directory: Path, config, tokenizer: Tokenizer) -> None:
    """Raises DataError, listing the differences, unless the cache has the recipe that we want."""
    made = _read_index(directory)['recipe']
    try:
        wanted = make_recipe(config, tokenizer)
        ignored = PLACES
    except MissingInputError:
        # The cache was copied to a machine that does not have the source's files.
        source = config.model_dump(mode='json')
        wanted = made | {'source': source, 'tokenizer': tokenizer.fingerprint}
        ignored = set()
    differences = list_differences(made, wanted, ignored)
    if differences:
        raise DataError(
            f'the cache {directory} was made from other data: {"; ".join(differences)}; '
            'replace it with `python -m tools.corpus build --config FILE --output DIR --rebuild`'
        )


def _check_is_cache(directory: Path) -> None:
    """Raises DataError unless the directory is a cache."""
    if not (directory / INDEX).is_file():
        raise DataError(f'{directory} is not a token cache: it has no {INDEX}; give another path')


def _read_index(directory: Path) -> dict:
    """The index. Raises DataError if it is damaged, or a file is missing or has the wrong size."""
    _check_is_cache(directory)
    remedy = _remedy(directory)
    try:
        index = json.loads((directory / INDEX).read_text('utf-8'))
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

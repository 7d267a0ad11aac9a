"""A corpus: train and held-out tokens of one source, made once and kept on disk.

The cache is a directory named by its recipe: the source's files and config, the tokenizer, the
format. Contents are neither read nor digested when it is opened; `verify` does that.
"""

import functools
import hashlib
import itertools
import json
import lzma
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from jaxfm.data import SOURCES
from jaxfm.data.corpus import parts as building
from jaxfm.data.corpus import token_cache
from jaxfm.data.corpus.token_cache import TokenCache
from jaxfm.data.documents import Document
from jaxfm.errors import DataError, MissingInputError
from jaxfm.tokenizer import TokenizerConfig
from jaxfm.tokenizer.build import PATTERNS, Tokenizer, build_tokenizer, load_tokenizer

# Part of every recipe: raise it when the files below or the way to write them change.
FORMAT = 2
# Recipe, statistics, and sizes and digests of the other files of a cache.
INDEX = 'index.json'
# A tokenizer is trained on about this much text at most, from shards in the order of a hash.
TRAINING_BYTES = 1 << 28

_REBUILD = '`python -m tools.corpus build --config FILE --output DIR --rebuild` makes it anew'
# Where the files are does not matter while they are the same files.
_PLACES = {'path', 'heldout_path'}


class Corpus:
    """An opened cache; DataError when a file of it is missing or has not its length."""

    def __init__(self, directory: Path, opened: Tokenizer | None = None):
        self.directory = Path(directory)
        self.index = _read_index(self.directory)
        self.tokenizer = opened or load_tokenizer(self.directory / 'tokenizer')
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


def build(config, opened: Tokenizer, cache_dir: Path, cache: str = '') -> Corpus:
    """Opens the corpus of a source's config, after tokenising it if it is not there yet.

    `cache` names a directory made by `build_at`, which is opened and never made here.
    """
    config = _of_source(config)
    if cache:
        _check_given(Path(cache), config, opened)
        return Corpus(Path(cache), opened)
    recipe = _recipe(config, opened)
    key = _digest(json.dumps(_without_places(recipe), sort_keys=True))[:32]
    directory = Path(cache_dir) / key
    building.build(directory, config, opened, functools.partial(_finish, recipe))
    return Corpus(directory, opened)


def build_at(config, opened: Tokenizer, directory: Path, rebuild: bool = False) -> Corpus:
    """Makes a cache in a directory of the caller's choice, or goes on making it.

    One that is there is opened, if it is of the same recipe; `rebuild` replaces another one.
    """
    config, directory = _of_source(config), Path(directory)
    recipe = _recipe(config, opened)
    partial = directory.with_name(f'{directory.name}.partial')
    if directory.exists() and rebuild:
        _check_is_cache(directory)  # never anything else that somebody keeps there
        _remove(directory)
    if directory.exists():
        _check_given(directory, config, opened)
    elif partial.exists() and _partial_recipe(partial) != recipe:
        _remove(partial)
    if not directory.exists():
        partial.mkdir(parents=True, exist_ok=True)
        (partial / 'recipe.json').write_text(json.dumps(recipe))
        building.build(directory, config, opened, functools.partial(_finish, recipe))
    return Corpus(directory, opened)


def verify(directory: Path) -> None:
    """Reads every file of a cache; DataError names the first that is not as it was made."""
    directory = Path(directory)
    for name, entry in _read_index(directory)['files'].items():
        if _file_digest(directory / name) != entry['sha256']:
            raise DataError(f'{directory / name}: digest mismatch; {_remedy(directory)}')


def make_tokenizer(config: TokenizerConfig, source_config, cache_dir: Path) -> Tokenizer:
    """The tokenizer of a config; one that is trained is kept in `cache_dir`/tokenizers.

    `source_config` says what to train on; of a mixture every source has an equal part.
    """
    if config.name != 'bpe':
        return build_tokenizer(config, ())
    is_mixture = source_config.name == 'mixture'
    sources = source_config.sources.values() if is_mixture else [source_config]
    sources = [_of_source(source) for source in sources]
    recipe = {
        'sources': [_without_places(_recipe(source, None)) for source in sources],
        'tokenizer': config.model_dump(),
        'patterns': PATTERNS,
        'bytes': TRAINING_BYTES,
    }
    key = _digest(json.dumps(recipe, sort_keys=True))[:32]
    directory = Path(cache_dir) / 'tokenizers' / key
    if directory.exists():
        return load_tokenizer(directory)
    share = TRAINING_BYTES // len(sources)
    texts = itertools.chain(*(_training_texts(source, share) for source in sources))
    trained = build_tokenizer(config, texts)
    temporary = directory.with_name(f'{key}.{uuid.uuid4().hex[:8]}')
    with building.storage_errors(directory):
        try:
            trained.save(temporary)
            building.publish(temporary, directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return trained


def xz_bits_per_byte(texts: Iterable[str]) -> float:
    """Bits per UTF-8 byte that `xz -9e` needs for the texts one after the other: a line to beat."""
    content = ''.join(texts).encode()
    return 8 * len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)) / len(content)


def _of_source(config):
    """The part of a data config that says what the documents are."""
    schema = SOURCES[config.name].schema
    return schema.model_validate({name: getattr(config, name) for name in schema.model_fields})


def _recipe(config, opened: Tokenizer | None) -> dict:
    source = SOURCES[config.name].load()(config)
    source.files()
    return {
        'format': FORMAT,
        'source': config.model_dump(mode='json'),
        'files': source.fingerprint(),
        'tokenizer': opened.fingerprint if opened else '',
    }


def _without_places(recipe: dict) -> dict:
    return recipe | {'source': {k: v for k, v in recipe['source'].items() if k not in _PLACES}}


def _partial_recipe(partial: Path) -> dict | None:
    try:
        return json.loads((partial / 'recipe.json').read_text())
    except (OSError, ValueError):
        return None


def _training_texts(config, num_bytes: int) -> Iterator[str]:
    """Texts of train documents, equal ones once; the same of all shards for the same files."""
    if hasattr(config, 'max_bad_records'):
        # The build that follows complains, about the record that comes first in the files.
        config = config.model_copy(update={'max_bad_records': 1 << 62})
    source, left, seen = SOURCES[config.name].load()(config), num_bytes, set()
    shards = sorted(enumerate(source.shards()), key=lambda shard: _digest(str(shard[0])))
    for _, shard in shards:
        for heldout, document in source.read(shard):
            texts = [turn['content'] for turn in document.messages] or [document.text]
            key = hashlib.sha256('\0'.join(texts).encode('utf-8', 'replace')).digest()
            if heldout or key in seen:
                continue
            seen.add(key)
            for text in texts:
                if left <= 0:
                    return
                yield text[:left]
                left -= len(text.encode('utf-8', 'replace'))


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
        'fingerprint': _digest(json.dumps(contents)),
        'is_chat': 'train.mask' in entries,
        'vocab_size': statistics.pop('vocab_size'),
        'statistics': statistics,
        'files': entries,
    }
    with open(directory / INDEX, 'w') as file:
        json.dump(index, file, indent=1)
        token_cache.to_disk(file)


def _check_given(directory: Path, config, opened: Tokenizer) -> None:
    """DataError that says what a cache was made of, when that is not what is wanted."""
    if not directory.exists():
        raise MissingInputError(
            f'config.data.cache: there is no {directory}; '
            f'`python -m tools.corpus build --config FILE --output {directory}` makes it'
        )
    made = _read_index(directory)['recipe']
    try:
        wanted = _recipe(config, opened)
        ignored = _PLACES
    except MissingInputError:
        # The cache has been brought to a machine without the files.
        wanted = made | {'source': config.model_dump(mode='json'), 'tokenizer': opened.fingerprint}
        ignored = set()
    differences = _differences(made, wanted, ignored)
    if differences:
        raise DataError(
            f'the cache {directory} is of other data: {"; ".join(differences)}. {_REBUILD}'
        )


def _differences(made: dict, wanted: dict, ignored: set[str]) -> list[str]:
    names = {'format': 'the format', 'files': "the source's files", 'tokenizer': 'the tokenizer'}
    differences = [
        f'{what} {"are" if key == "files" else "is"} not the same'
        for key, what in names.items()
        if made.get(key) != wanted[key]
    ]
    there = made.get('source', {})
    for key in sorted(there.keys() | wanted['source'].keys() - ignored):
        a, b = there.get(key), wanted['source'].get(key)
        if a != b and key not in ignored:
            differences.append(f'config.data.{key} was {a!r} and is {b!r}')
    return differences


def _check_is_cache(directory: Path) -> None:
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
    """Removes a directory; no half of it is left under its name."""
    doomed = directory.with_name(f'{directory.name}.removed-{uuid.uuid4().hex[:8]}')
    with building.storage_errors(directory):
        directory.rename(doomed)
        shutil.rmtree(doomed)


def _file_digest(path: Path) -> str:
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

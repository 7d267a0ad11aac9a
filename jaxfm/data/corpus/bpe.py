"""The tokenizer of a run; a byte-level BPE is trained on the corpus once and cached."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from jaxfm.data import SOURCES
from jaxfm.data.corpus import token_cache
from jaxfm.data.corpus.recipe import digest, drop_places, make_recipe, select_source
from jaxfm.storage import whole
from jaxfm.tokenizer import BPEConfig, TokenizerConfig
from jaxfm.tokenizer.build import PATTERNS, Tokenizer, build_tokenizer, load_tokenizer

# A tokenizer is trained on at most about this much text, from shards in the order of a hash.
TRAINING_BYTES = 1 << 28


def make_tokenizer(config: TokenizerConfig, source_config, cache_dir: Path) -> Tokenizer:
    """Makes the tokenizer of a config; trains it, or opens the trained one, if it is a BPE."""
    if config.name != 'bpe':
        return build_tokenizer(config, ())
    return train_bpe(config, source_config, cache_dir)


def train_bpe(config: BPEConfig, source_config, cache_dir: Path) -> Tokenizer:
    """Opens the BPE in `cache_dir`/tokenizers; trains it first if it is not there.

    `source_config` says what to train on; the sources of a mixture contribute equal parts.
    """
    is_mixture = source_config.name == 'mixture'
    sources = source_config.sources.values() if is_mixture else [source_config]
    sources = [select_source(source) for source in sources]
    recipe = {
        'sources': [drop_places(make_recipe(source, None)) for source in sources],
        'tokenizer': config.model_dump(),
        'patterns': PATTERNS,
        'bytes': TRAINING_BYTES,
    }
    key = digest(json.dumps(recipe, sort_keys=True))[:32]
    directory = Path(cache_dir) / 'tokenizers' / key
    if directory.exists():
        return load_tokenizer(directory)
    share = TRAINING_BYTES // len(sources)
    texts = itertools.chain(*(read_training_texts(source, share) for source in sources))
    trained = build_tokenizer(config, texts)
    with token_cache.explain_cache_errors(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with whole.write_directory(directory) as temporary:
            trained.save(temporary)
    return trained


def read_training_texts(config, num_bytes: int) -> Iterator[str]:
    """Yields about `num_bytes` of train documents' texts, without duplicate documents.

    The same files always give the same texts; shards are read in the order of a hash.
    """
    if hasattr(config, 'max_bad_records'):
        # Ignore bad records: the build that follows reports the first one in the files.
        config = config.model_copy(update={'max_bad_records': 1 << 62})
    source, left, seen = SOURCES.load(config.name)(config), num_bytes, set()
    shards = sorted(enumerate(source.shards()), key=lambda shard: digest(str(shard[0])))
    for _, shard in shards:
        for heldout, document in source.read(shard):
            turns = (*document.messages, *document.rejected)
            texts = [turn['content'] for turn in turns] or [document.text]
            key = hashlib.sha256('\0'.join(texts).encode('utf-8', 'replace')).digest()
            if heldout or key in seen:
                continue
            seen.add(key)
            for text in texts:
                if left <= 0:
                    return
                yield text[:left]
                left -= len(text.encode('utf-8', 'replace'))

"""What a run reads: its tokenizer and the tokenised data of its phases, equal on all processes."""

import base64
import dataclasses
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

import jax

from jaxfm.config.load import read_config
from jaxfm.config.run import RunConfig
from jaxfm.data import SOURCES
from jaxfm.data.corpus.bpe import make_tokenizer
from jaxfm.data.dataset import Dataset, open_dataset
from jaxfm.distributed import agree
from jaxfm.errors import DataError, MissingInputError
from jaxfm.tokenizer.build import build_tokenizer, load_tokenizer
from jaxfm.tokenizer.kinds import Tokenizer


@dataclasses.dataclass(frozen=True)
class RunData:
    """A tokenizer, and {name of a phase: its data}."""

    tokenizer: Tokenizer
    datasets: dict[str, Dataset]


def open_data(config: RunConfig, workdir: Path) -> RunData:
    """Tokenised data of every phase; the first process builds it, the others open that.

    Raises:
      MissingInputError, DataError: files that are missing, bad, or not the same on all hosts; a
        tokenizer with more tokens than the model.
    """
    cache = cache_directory() / 'corpus'
    _check_files(config)
    primary = agree.is_primary()
    if not primary:
        agree.barrier('corpus')
    tokenizer = _make_tokenizer(config, workdir, cache)
    _check_tokenizer(tokenizer, config)
    datasets = {
        phase.name: open_dataset(phase.data, tokenizer, cache) for phase in config.all_phases
    }
    if primary and jax.process_count() > 1:
        agree.barrier('corpus')
    _check_tokens(datasets.values())
    return RunData(tokenizer, datasets)


def open_tokenizer(config: RunConfig, workdir: Path) -> Tokenizer:
    """The tokenizer alone: what the weights were trained with, or came with.

    Raises:
      DataError: it has more tokens than the model.
    """
    saved = workdir / 'tokenizer'
    if saved.exists():
        tokenizer = load_tokenizer(saved)
    else:
        tokenizer = build_tokenizer(config.tokenizer, ())
    _check_tokenizer(tokenizer, config)
    return tokenizer


def cache_directory() -> Path:
    """What may be deleted at any time: compiled programs and tokenised data."""
    home = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(home) / 'jaxfm'


def _make_tokenizer(config: RunConfig, workdir: Path, cache: Path) -> Tokenizer:
    """That of the config; where its files are gone the one that the run has saved."""
    saved = workdir / 'tokenizer'
    try:
        return make_tokenizer(config.tokenizer, config.all_phases[0].data, cache)
    except MissingInputError:
        known = workdir / 'config.json'
        is_there = known.exists() and saved.exists()
        if not is_there or read_config(known).tokenizer != config.tokenizer:
            raise
    return load_tokenizer(saved)


def _check_tokenizer(tokenizer: Tokenizer, config: RunConfig) -> None:
    # Gemma 3 has a special token, of images, that its text models have no weights for.
    size = config.model.vocab_size
    beyond = set(range(size, tokenizer.vocab_size))
    if not beyond <= set(tokenizer.special_tokens.values()):
        raise DataError(
            f'the tokenizer has {tokenizer.vocab_size} tokens, '
            f'config.model.vocab_size is {config.model.vocab_size}'
        )


def _check_files(config: RunConfig) -> None:
    """Raises unless every process has the files of the first: each would train on other rows.

    Raises:
      MissingInputError, DataError: a file that one of them has not, or in another size.
    """
    here = _file_sizes(config) if jax.process_count() > 1 else {}
    every = agree.exchange('files', _pack(here))
    for index, packed in every.items():
        if packed != every[0]:
            _refuse_files(_unpack(every[0]), _unpack(packed), index)


def _file_sizes(config: RunConfig) -> dict[str, int]:
    """{phase/source/file: bytes} of all files that are read without a cache."""
    sizes = {}
    for phase in (phase for phase in config.all_phases if not phase.data.cache):
        sources = phase.data.all_sources
        for name, source in sources.items():
            found = SOURCES.load(source.name)(source).files() or ()
            where = [part for part in (phase.name, name if len(sources) > 1 else '') if part]
            sizes |= {'/'.join([*where, file.name]): file.size for file, _ in found}
    return sizes


def _check_tokens(datasets: Iterable[Dataset]) -> None:
    """Raises unless every process has the same tokens; what is read on the fly was compared as
    files."""
    cached = [dataset for dataset in datasets if dataset.packings]
    every = agree.exchange('tokens', ' '.join(each.fingerprint for each in cached))
    for index, fingerprints in every.items():
        if fingerprints != every[0]:
            raise DataError(
                f'config.data: processes 0 and {index} have not the same tokens, though their '
                'files have the same names and sizes: copy the files once more'
            )


def _pack(sizes: dict[str, int]) -> str:
    """As text, and short: the names of millions of files pass through the coordinator."""
    text = json.dumps(sizes, sort_keys=True)
    return base64.b64encode(zlib.compress(text.encode())).decode()


def _unpack(text: str) -> dict[str, int]:
    return json.loads(zlib.decompress(base64.b64decode(text)))


def _refuse_files(first: dict[str, int], other: dict[str, int], index: int) -> None:
    """Names the first file that differs between process 0 and another one."""
    name = min(name for name, _ in first.items() ^ other.items())
    if name in first and name in other:
        raise DataError(
            f'config.data: {name} has {first[name]} bytes on the host of process 0, '
            f'{other[name]} on that of process {index}'
        )
    lacking = index if name in first else 0
    raise MissingInputError(f'config.data: {name} is missing on the host of process {lacking}')

"""A run's tokenizer and the tokenised data of its phases, checked to be equal on all processes."""

import base64
import dataclasses
import json
import zlib
from collections.abc import Iterable
from pathlib import Path

import jax

from jaxfm.config.load import read_config
from jaxfm.config.run import PhaseConfig, RunConfig
from jaxfm.data import SOURCES
from jaxfm.data.corpus.bpe import make_tokenizer
from jaxfm.data.dataset import Dataset, open_dataset
from jaxfm.data.documents import KIND_NAMES
from jaxfm.distributed import agree
from jaxfm.errors import DataError, MissingInputError
from jaxfm.objectives import PreferenceConfig
from jaxfm.rollout import documents_of
from jaxfm.run.cache import cache_directory
from jaxfm.tokenizer.build import build_tokenizer, load_tokenizer
from jaxfm.tokenizer.kinds import Tokenizer


@dataclasses.dataclass(frozen=True)
class RunData:
    """The tokenizer, and {phase name: its dataset}; a phase that samples all batches has none."""

    tokenizer: Tokenizer
    datasets: dict[str, Dataset]


def open_data(config: RunConfig, workdir: Path) -> RunData:
    """Opens the tokenised data of every phase. The first process builds it, the others wait.

    Raises:
      MissingInputError, DataError: files are missing, bad, or different between hosts, or the
        tokenizer has more tokens than the model.
    """
    cache = cache_directory() / 'corpus'
    _check_files(config)
    primary = agree.is_primary()
    if not primary:
        agree.barrier('corpus')
    tokenizer = _make_tokenizer(config, workdir, cache)
    check_vocabulary(tokenizer, config.model.vocab_size, 'config.model.vocab_size')
    datasets = {
        phase.name: open_dataset(documents, tokenizer, cache)
        for phase in config.all_phases
        if (documents := documents_of(phase.data)) is not None
    }
    if primary and jax.process_count() > 1:
        agree.barrier('corpus')
    _check_tokens(datasets.values())
    for phase in config.all_phases:
        if phase.name in datasets:
            _check_kinds(datasets[phase.name], phase)
    return RunData(tokenizer, datasets)


def _check_kinds(dataset: Dataset, phase: PhaseConfig) -> None:
    """Raises DataError unless the documents of a phase are what its objective learns from."""
    objective, where = phase.objective, f'config.objective.name {phase.objective.name}'
    is_preference = isinstance(objective, PreferenceConfig)
    wanted = {'text', 'chat'}
    if is_preference:
        wanted = {'pair', 'labelled'} if objective.loss == 'kto' else {'pair'}
    for name, source in dataset.sources.items():
        if source.kind in wanted:
            continue
        told = f'{where} learns from {_listed(wanted)}, but a document of {name} is '
        told += KIND_NAMES[source.kind]
        remedy = 'set config.data.fields.chosen and .rejected to the fields of a pair'
        if 'labelled' in wanted:
            remedy += ', or .label to that of a label'
        if not is_preference:
            objectives = 'dpo, or another preference' if source.kind == 'pair' else 'kto'
            remedy = (
                f'set config.objective.name to {objectives}; or name the fields of a chat, such as '
                'config.data.fields.messages'
            )
        raise DataError(f'{told}: {remedy}')


def _listed(kinds: set[str]) -> str:
    plural = {'text': 'texts', 'chat': 'chats', 'pair': 'pairs', 'labelled': 'chats with labels'}
    return ' or '.join(plural[kind] for kind in plural if kind in kinds)


def open_tokenizer(config: RunConfig, workdir: Path) -> Tokenizer:
    """Opens only the tokenizer: the one saved with the run, else the one the config names.

    Raises:
      DataError: it has more tokens than the model.
    """
    saved = workdir / 'tokenizer'
    if saved.exists():
        tokenizer = load_tokenizer(saved)
    else:
        tokenizer = build_tokenizer(config.tokenizer, ())
    check_vocabulary(tokenizer, config.model.vocab_size, 'config.model.vocab_size')
    return tokenizer


def _make_tokenizer(config: RunConfig, workdir: Path, cache: Path) -> Tokenizer:
    """The config's tokenizer; if its files are gone, the copy that the run has saved."""
    saved = workdir / 'tokenizer'
    try:
        return make_tokenizer(config.tokenizer, config.all_phases[0].data, cache)
    except MissingInputError:
        known = workdir / 'config.json'
        is_there = known.exists() and saved.exists()
        if not is_there or read_config(known).tokenizer != config.tokenizer:
            raise
    return load_tokenizer(saved)


def check_vocabulary(tokenizer: Tokenizer, size: int, name: str) -> None:
    """Raises DataError if a model with a vocabulary of this size lacks tokens of texts.

    name: of the size, for the message.
    """
    # Special tokens may exceed the vocabulary: Gemma 3's text models have no weights for the image
    # token.
    beyond = set(range(size, tokenizer.vocab_size))
    if not beyond <= set(tokenizer.special_tokens.values()):
        raise DataError(
            f'the tokenizer has {tokenizer.vocab_size} tokens, but {name} is only {size}'
        )


def _check_files(config: RunConfig) -> None:
    """Checks that every process has the same files as the first; else their rows would differ.

    Raises:
      MissingInputError: a file is missing on the host of one process.
      DataError: a file has another size there.
    """
    here = _file_sizes(config) if jax.process_count() > 1 else {}
    if found := agree.find_difference('files', _pack(here)):
        index, first, other = found
        _refuse_files(_unpack(first), _unpack(other), index)


def _file_sizes(config: RunConfig) -> dict[str, int]:
    """{phase/source/file: bytes} of all files that are read without `data.cache`."""
    sizes = {}
    for phase in (phase for phase in config.all_phases if not phase.data.cache):
        sources = phase.data.all_sources
        for name, source in sources.items():
            found = SOURCES.load(source.name)(source).files() or ()
            where = [part for part in (phase.name, name if len(sources) > 1 else '') if part]
            sizes |= {'/'.join([*where, file.name]): file.size for file, _ in found}
    return sizes


def _check_tokens(datasets: Iterable[Dataset]) -> None:
    """Raises DataError unless every process has the same tokens.

    Of data that is tokenised while training, only the held-out tokens are compared, and what its
    sources tell; `_check_files` compared its files.
    """
    here = [each.fingerprint for each in datasets] if jax.process_count() > 1 else []
    if found := agree.find_difference('tokens', ' '.join(here)):
        raise DataError(
            f'config.data: processes 0 and {found[0]} have different tokens, which names and '
            'sizes of files do not show: copy the data again'
        )


def _pack(sizes: dict[str, int]) -> str:
    """Compressed text, because the names of millions of files pass through the coordinator."""
    text = json.dumps(sizes, sort_keys=True)
    return base64.b64encode(zlib.compress(text.encode())).decode()


def _unpack(text: str) -> dict[str, int]:
    return json.loads(zlib.decompress(base64.b64decode(text)))


def _refuse_files(first: dict[str, int], other: dict[str, int], index: int) -> None:
    """Raises an error that names the first file that differs between process 0 and `index`."""
    name = min(name for name, _ in first.items() ^ other.items())
    if name in first and name in other:
        raise DataError(
            f'config.data: {name} has {first[name]} bytes on the host of process 0, but '
            f'{other[name]} on the host of process {index}: copy the files again'
        )
    lacking = index if name in first else 0
    raise MissingInputError(f'config.data: {name} is missing on the host of process {lacking}')

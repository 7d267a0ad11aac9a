"""Tokenizers: text to ids and back; byte-level ones without loss for every str.

Special tokens never come out of text: a document that spells '<|eos|>' is encoded as its
characters. The corpus puts them around documents, and chat templates between turns. Markup that a
vocabulary has as tokens without calling them special, such as <think>, is of this kind as well,
only that it is not left out when ids are decoded.

A tokenizer is what it is saved as: a directory with the vocabulary and tokenizer_config.json, as
Hugging Face lays it out.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxfm.chat.template import read_template
from jaxfm.errors import ConfigError, DataError
from jaxfm.tokenizer import TOKENIZERS, BPEConfig, BytesConfig, TokenizerConfig, TokenizerFileConfig
from jaxfm.tokenizer.files import CONFIG_FILE, read_tokenizer_files, to_json
from jaxfm.tokenizer.kinds import HuggingFace, Tokenizer, open_files

SPECIAL_TOKENS = ('<|bos|>', '<|eos|>')

# How text is cut into the pieces inside which BPE merges; a merge never crosses a cut.
PATTERNS = {
    # For source code: a line break takes the indentation after it, so the step from one line to the
    # next is one token at any depth; one sign before a name goes with it ('.append', '(self').
    'code': r'\r?\n[ \t\r\n]*|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+'
    r'|[ \t]+(?!\S)|\s',
    # As GPT-2: words, numbers and runs of signs, each with the space before it; other white space
    # apart, so that indentation of one depth is one token.
    'gpt2': r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}


class Bytes(HuggingFace):
    """One token a byte: byte b is id 2 + b, further special tokens follow."""

    def __init__(self, config: BytesConfig, texts: Iterable[str]):
        del texts
        backend = _make_backend(pattern=None, vocabulary=_byte_vocabulary())
        backend.add_special_tokens(_special_tokens(config))
        super().__init__(_to_files(backend, config))


class BPE(HuggingFace):
    """Byte-level BPE trained on texts; the same texts give the same merges."""

    def __init__(self, config: BPEConfig, texts: Iterable[str]):
        special = _special_tokens(config)
        if config.vocab_size < 256 + len(special):
            raise ConfigError(
                f'tokenizer.vocab_size {config.vocab_size} is less than 256 bytes '
                f'+ {len(special)} special tokens = {256 + len(special)}'
            )
        backend = _make_backend(PATTERNS[config.pattern], vocabulary=None)
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        super().__init__(_to_files(backend, config))


def build_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer of a config; only `bpe` reads the texts.

    Raises:
        MissingInputError, DataError, ConfigError: as `load_tokenizer`, and for the chat template.
    """
    return TOKENIZERS.load(config.name)(config, texts)


def load_tokenizer_file(config: TokenizerFileConfig, texts: Iterable[str] = ()) -> Tokenizer:
    """A tokenizer that exists, with what the config says in place of what its files say."""
    del texts
    files = read_tokenizer_files(config.path, config.pattern, config.bos_token, config.eos_token)
    if template := read_template(config.chat_template):
        said = json.loads(files[CONFIG_FILE]) | {'chat_template': template}
        files[CONFIG_FILE] = to_json(said)
    return _open_from(config.path, files)


def load_tokenizer(path: Path) -> Tokenizer:
    """What `save` wrote, or any other tokenizer that `read_tokenizer_files` finds at the path.

    Raises:
        MissingInputError: there is none, or the library that runs it is not installed.
        DataError: a file is damaged, or nothing says which token ends a text.
    """
    return _open_from(path, read_tokenizer_files(path))


def _open_from(path, files: dict[str, bytes]) -> Tokenizer:
    try:
        return open_files(files)
    except (DataError, ConfigError) as error:
        raise type(error)(f'{path}: {error}') from error


def _special_tokens(config: BytesConfig | BPEConfig) -> list[str]:
    special = [*SPECIAL_TOKENS, *config.special_tokens]
    # One letter could not be told from the same letter in a text.
    if len(set(special)) < len(special) or min(map(len, special)) < 2:
        raise ConfigError(f'tokenizer.special_tokens: one is too short or there twice: {special}')
    return special


def _to_files(backend: tokenizers.Tokenizer, config: BytesConfig | BPEConfig) -> dict[str, bytes]:
    said = {'bos_token': SPECIAL_TOKENS[0], 'eos_token': SPECIAL_TOKENS[1]}
    if template := read_template(config.chat_template):
        said['chat_template'] = template
    return {
        'tokenizer.json': backend.to_str(pretty=True).encode(),
        CONFIG_FILE: to_json(said),
    }


def _make_backend(pattern: str | None, vocabulary: dict[str, int] | None) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[] if vocabulary else None))
    cuts = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if pattern:
        cuts.insert(0, pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated'))
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    backend.decoder = decoders.ByteLevel()
    return backend


def _byte_vocabulary() -> dict[str, int]:
    """Ids of the bytes follow the special tokens: byte b is id 2 + b."""
    characters = _byte_characters()
    tokens = list(SPECIAL_TOKENS) + [characters[byte] for byte in range(256)]
    return {token: i for i, token in enumerate(tokens)}


def _byte_characters() -> list[str]:
    """The printable character by which byte-level BPE writes each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [characters[byte] for byte in range(256)]

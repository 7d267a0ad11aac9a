"""Builds and loads tokenizers: text to ids and back. Byte-level ones are lossless for every str.

Plain text never becomes a special token: a document that spells '<|eos|>' is encoded as ordinary
characters. The corpus puts special tokens around documents, and chat templates put them between
turns. Markup that a vocabulary has as tokens but does not mark as special, such as <think>, is
treated the same way, except that decoding keeps it.

The saved form of a tokenizer defines it: a directory with the vocabulary and tokenizer_config.json,
in Hugging Face's layout.
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

# How text is split into pieces before BPE; merges never cross the border between two pieces.
PATTERNS = {
    # For source code: a line break includes the indentation after it, so moving to the next line is
    # one token at any depth. A name includes one punctuation mark before it ('.append', '(self').
    'code': r'\r?\n[ \t\r\n]*|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+'
    r'|[ \t]+(?!\S)|\s',
    # As in GPT-2: words, numbers and runs of punctuation, each with the space before it. Other
    # white space is separate, so the indentation of a line is one token.
    'gpt2': r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}


class Bytes(HuggingFace):
    """One token per byte: byte b is id 2 + b; additional special tokens come after the bytes."""

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
                f'config.tokenizer.vocab_size {config.vocab_size} is less than 256 bytes '
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
    """Builds the tokenizer of a config; only `bpe` reads the texts.

    Raises:
        MissingInputError, DataError, ConfigError: as `load_tokenizer` and `read_template` do.
    """
    return TOKENIZERS.load(config.name)(config, texts)


def load_tokenizer_file(config: TokenizerFileConfig, texts: Iterable[str] = ()) -> Tokenizer:
    """Loads an existing tokenizer; values that the config sets override those in its files."""
    del texts
    files = read_tokenizer_files(config.path, config.pattern, config.bos_token, config.eos_token)
    if template := read_template(config.chat_template):
        said = json.loads(files[CONFIG_FILE]) | {'chat_template': template}
        files[CONFIG_FILE] = to_json(said)
    return _open_from(config.path, files)


def load_tokenizer(path: Path) -> Tokenizer:
    """Loads what `save` wrote, or any other tokenizer that `read_tokenizer_files` finds at `path`.

    Raises:
        MissingInputError: there is none, or the library that runs it is not installed.
        DataError: a file is damaged, or nothing says which token ends a text.
        ConfigError: as `read_tokenizer_files` does.
    """
    return _open_from(path, read_tokenizer_files(path))


def _open_from(path, files: dict[str, bytes]) -> Tokenizer:
    try:
        return open_files(files)
    except (DataError, ConfigError) as error:
        raise type(error)(f'{path}: {error}') from error


def _special_tokens(config: BytesConfig | BPEConfig) -> list[str]:
    special = [*SPECIAL_TOKENS, *config.special_tokens]
    # A special token of one letter would look like the same letter in a text.
    if len(set(special)) < len(special) or min(map(len, special)) < 2:
        raise ConfigError(
            'config.tokenizer.special_tokens: all must differ and have at least two characters; '
            f'with the built-in ones they are {special}'
        )
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
    """{token: id}: the special tokens, then the bytes; byte b is id 2 + b."""
    characters = _byte_characters()
    tokens = list(SPECIAL_TOKENS) + [characters[byte] for byte in range(256)]
    return {token: i for i, token in enumerate(tokens)}


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [characters[byte] for byte in range(256)]

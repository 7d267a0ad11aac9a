"""Finds the tokenizer at a path, and returns the files of its saved form.

These are a vocabulary (tokenizer.json, tokenizer.model or ranks.tiktoken) and
tokenizer_config.json, which names the special tokens and holds the chat template: Hugging Face's
layout. Any file may also be compressed, with .gz after its name. A .gguf contains its tokenizer.
"""

import difflib
import gzip
import json
import re
import zlib
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jaxfm.errors import ConfigError, DataError, MissingInputError
from jaxfm.pretrained.gguf.tokenizer import read_tokenizer
from jaxfm.storage.files import check_object, explain_damage, explain_errors

CONFIG_FILE = 'tokenizer_config.json'

# The known tiktoken encodings: the pattern that splits text, and {special token: id}.
ENCODINGS = {
    'cl100k_base': (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r'|\s++$|\s*[\r\n]|\s+(?!\S)|\s',
        {
            '<|endoftext|>': 100257,
            '<|fim_prefix|>': 100258,
            '<|fim_middle|>': 100259,
            '<|fim_suffix|>': 100260,
            '<|endofprompt|>': 100276,
        },
    ),
    'o200k_base': (
        r'[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+'
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r'|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*'
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r'|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+',
        {'<|endoftext|>': 199999, '<|endofprompt|>': 200018},
    ),
}

# Vocabulary files, in the order in which a directory is searched for them.
_VOCABULARIES = (
    *('tokenizer.json', 'tokenizer.model', 'ranks.tiktoken'),
    *('*.tiktoken', '*.model', '*.gguf'),
)
_PAIRS = (('vocab.json', 'merges.txt'), ('encoder.json', 'vocab.bpe'))  # GPT-2's two files


def read_tokenizer_files(
    path, pattern: str = '', bos_token: str = '', eos_token: str = ''
) -> dict[str, bytes]:
    """{name: content} of the saved form of the tokenizer at `path`, a file or a directory.

    Raises:
        MissingInputError: there is no tokenizer.
        DataError: a file is damaged.
        ConfigError: `path` matches several tokenizers or is not one by its name, or tiktoken ranks
            come without a pattern.
    """
    vocabulary = _locate(Path(path).expanduser())
    name = _plain_name(vocabulary)
    if name.endswith('.gguf'):
        inside, config = read_tokenizer(vocabulary)
    else:
        config = _config_beside(vocabulary)
    given = {'bos_token': bos_token, 'eos_token': eos_token, 'pattern': pattern}
    config |= {key: value for key, value in given.items() if value}
    kind = str(config.pop('tokenizer_class', ''))
    if bos_token:
        config.pop('add_bos_token', None)
    if name.endswith('.gguf'):
        content = {'tokenizer.json': inside}
    elif name.endswith('.tiktoken'):
        content = {'ranks.tiktoken': read_bytes(vocabulary)}
        config = _tiktoken_config(config, vocabulary)
    elif name.endswith('.model'):
        content = {'tokenizer.model': read_bytes(vocabulary)}
    elif second := dict(_PAIRS).get(name):
        content = {'tokenizer.json': _byte_level_bpe(vocabulary, second)}
        config = {'eos_token': '<|endoftext|>'} | config
    else:
        content = {'tokenizer.json': read_bytes(vocabulary)}
        if kind and not bos_token:
            config.setdefault('add_bos_token', _adds_bos(content['tokenizer.json'], config, kind))
    return content | {CONFIG_FILE: to_json(config)}


def read_bytes(path: Path) -> bytes:
    """The content of a file, decompressed if its name ends in .gz."""
    failure = f'{path} cannot be read'
    with explain_errors(failure, MissingInputError, denied=f'{failure}: permission denied'):
        content = path.read_bytes()
    try:
        return gzip.decompress(content) if path.suffix == '.gz' else content
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f'{path} is damaged: {error}') from error


def read_json(path: Path) -> dict:
    return parse_json(read_bytes(path), path)


def to_json(value: dict) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True).encode()


def parse_json(content: bytes, name) -> dict:
    """Parses a JSON object. Raises DataError, which names the file, for anything else."""
    with explain_damage(f'{name} is damaged'):
        value = json.loads(content)
    return check_object(value, str(name))


def _locate(path: Path) -> Path:
    """Finds the vocabulary file; of GPT-2's two files, the first."""
    if path.is_dir():
        return _search(path)
    if path.is_file():
        known = _plain_name(path).endswith(('.json', '.model', '.tiktoken', '.gguf'))
        first = {second: first for first, second in _PAIRS}.get(_plain_name(path))
        if found := _find_existing(path.parent / first) if first else known and path:
            return found
        raise ConfigError(
            f'{path} is not a tokenizer file; give a .json, .model, .tiktoken or .gguf'
        )
    if found := _find_existing(path):
        return found
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, 1)
    hint = f'; do you mean {near[0]}?' if near else ''
    raise MissingInputError(f'config.tokenizer.path: {path} does not exist{hint}')


def _search(directory: Path) -> Path:
    inside = directory / 'tokenizer'
    directory = inside if inside.is_dir() else directory
    for pattern in _VOCABULARIES:
        found = sorted([*directory.glob(pattern), *directory.glob(pattern + '.gz')])
        if len({_plain_name(file) for file in found}) > 1:
            names = ', '.join(file.name for file in found)
            raise ConfigError(
                f'{directory} has several tokenizers; give the path of one of them: {names}'
            )
        if found:
            return found[0]
    for first, second in _PAIRS:
        if (found := _find_existing(directory / first)) and _find_existing(directory / second):
            return found
    raise MissingInputError(
        f'{directory} has no tokenizer: it contains no tokenizer.json, no .model, .tiktoken or '
        '.gguf, and no vocab.json with merges.txt'
    )


def _find_existing(path: Path) -> Path | None:
    for candidate in (path, path.with_name(path.name + '.gz')):
        if candidate.is_file():
            return candidate
    return None


def _plain_name(path: Path) -> str:
    return path.name.removesuffix('.gz')


def _config_beside(vocabulary: Path) -> dict:
    """The special tokens and chat template that the files next to a vocabulary define."""
    said = {}
    for name in ('special_tokens_map.json', CONFIG_FILE):
        if found := _find_existing(vocabulary.with_name(name)):
            said |= {k: v for k, v in read_json(found).items() if v is not None}
    config = {}
    for key, value in said.items():
        token = value.get('content') if isinstance(value, dict) else value
        if key.endswith('_token') and isinstance(token, str | bool):
            config[key] = token
    kept = ('pattern', 'special_tokens', 'tokenizer_class')
    config |= {key: said[key] for key in kept if key in said}
    if template := _template(said.get('chat_template'), vocabulary):
        config['chat_template'] = template
    return config


def _adds_bos(tokenizer_json: bytes, config: dict, kind: str) -> bool:
    """Whether the transformers class `kind` puts bos before a text.

    Files name a bos token even if it is never added, so the name alone says nothing.
    """
    after = parse_json(tokenizer_json, 'tokenizer.json').get('post_processor')
    named = json.dumps(config.get('bos_token', ''), ensure_ascii=False)
    return kind.startswith(('Llama', 'Gemma')) or named in json.dumps(after, ensure_ascii=False)


def _template(said, vocabulary: Path) -> str:
    """The chat template: chat_template.jinja if there is one; of several by name, `default`."""
    if found := _find_existing(vocabulary.with_name('chat_template.jinja')):
        return read_bytes(found).decode('utf-8', 'replace')
    entries = said if isinstance(said, list) else [{'name': 'default', 'template': said or ''}]
    named = {}
    for entry in entries:
        match entry:
            case {'name': str(name), 'template': str(template)}:
                named[name] = template
            case _:
                raise DataError(
                    f'{vocabulary.with_name(CONFIG_FILE)}: chat_template must be a string, or a '
                    'list of objects with a name and a template'
                )
    return named.get('default', next(iter(named.values()), ''))


def _tiktoken_config(config: dict, path: Path) -> dict:
    """Fills in the pattern and special tokens if the pattern names a known encoding."""
    pattern = config.get('pattern')
    if not pattern:
        names = ' or '.join(ENCODINGS)
        raise ConfigError(
            f'{path} does not define how text is split: set config.tokenizer.pattern to {names}, '
            'or to a regular expression'
        )
    if pattern in ENCODINGS:
        pattern, special = ENCODINGS[pattern]
        return (
            {'eos_token': '<|endoftext|>', 'special_tokens': special}
            | config
            | {'pattern': pattern}
        )
    if re.fullmatch(r'\w+', pattern):
        near = difflib.get_close_matches(pattern, ENCODINGS, 1) or list(ENCODINGS)
        raise ConfigError(
            f'config.tokenizer.pattern: {pattern} is not a known encoding; '
            f'use {" or ".join(near)}, or a regular expression'
        )
    return config


def _byte_level_bpe(vocabulary: Path, second: str) -> bytes:
    """Makes a tokenizer.json from the two files in which GPT-2 and similar models come."""
    if not (merges := _find_existing(vocabulary.with_name(second))):
        raise MissingInputError(
            f'{vocabulary} is half of a tokenizer: {second} is missing in its directory'
        )
    lines = read_bytes(merges).decode('utf-8', 'replace').split('\n')
    pairs = [tuple(line.split()) for line in lines if line and not line.startswith('#version')]
    if any(len(pair) != 2 for pair in pairs):
        raise DataError(f'{merges} is damaged: a line is not a pair of tokens')
    ids = read_json(vocabulary)
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=pairs))
    except Exception as error:  # The library raises bare Exceptions.
        raise DataError(f'{vocabulary} and {second} do not belong together: {error}') from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([token for token in ids if re.fullmatch(r'<\|.*\|>', token)])
    return backend.to_str().encode()

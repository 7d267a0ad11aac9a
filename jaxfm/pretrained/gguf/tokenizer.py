"""The tokenizer in a `.gguf` file, converted back to a tokenizer.json.

The file stores tokens, their types, and merges or scores. For pre-tokenization it stores only a
name, `pre`; the patterns behind each name come from the original tokenizers, as quoted in
llama.cpp's llama-vocab.cpp and the converter of `transformers`.
"""

import dataclasses
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from jaxfm.errors import DataError, listed
from jaxfm.pretrained.gguf import container

# Token types in tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPACE = '▁'  # SentencePiece's symbol for a space


@dataclasses.dataclass(frozen=True)
class Pre:
    """The pre-tokenization of a byte-level tokenizer.

    Attributes:
        patterns: applied in order; each splits the pieces left by the previous one at its matches.
        ignore_merges: a piece that is itself a token is not merged.
        add_bos: whether documents begin with bos if the file does not say.
        nfc: whether the text is NFC-normalized first.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r'[^\r\n\p{L}\p{N}]?\p{L}+'
_SIGNS = r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
_LLAMA3 = rf'{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}'
_QWEN2 = rf'{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_SIGNS}'
_UPPER, _LOWER = r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]', r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]'
_CASED = r'[^\r\n\p{L}\p{N}]?' + _UPPER
_PATHS = r' ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
_TEKKEN = rf'{_CASED}*{_LOWER}+|{_CASED}+{_LOWER}*|\p{{N}}|{_PATHS}'
_GPT4O = (
    rf'{_CASED}*{_LOWER}+{_CONTRACTIONS}?|{_CASED}+{_LOWER}*{_CONTRACTIONS}?'
    rf'|\p{{N}}{{1,3}}|{_PATHS}'
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The original splits off single digits, then applies GPT-2's pattern. This is the same in one
# pattern, which takes the fast path of word_encoder: white space before a digit ends its piece.
_DIGITS = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
_LLAMA = Pre((_LLAMA3,), ignore_merges=True, add_bos=True)

PRE_NAMES = {
    # llama.cpp's fallback for files without `pre`; no known model uses it.
    'default': Pre(
        (
            r'[\p{P}\$\+<=>\^~\|]+',
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
            r'\p{N}+',
            r'[0-9][0-9][0-9]',
        )
    ),
    'gpt-2': Pre((_GPT2,)),
    'smollm': Pre((_DIGITS,)),
    'starcoder': Pre((_DIGITS,)),
    'llama3': _LLAMA,
    'llama-v3': _LLAMA,
    'llama-bpe': _LLAMA,
    'dbrx': Pre((_LLAMA3,)),
    'smaug-bpe': Pre((_LLAMA3,)),
    'qwen2': Pre((_QWEN2,), nfc=True),
    'deepseek-r1-qwen': Pre((_QWEN2,)),
    'tekken': Pre((_TEKKEN,), ignore_merges=True, add_bos=True),
    'gpt-4o': Pre((_GPT4O,)),
}

_ROLES = {
    'bos_token': 'bos_token_id',
    'eos_token': 'eos_token_id',
    'unk_token': 'unknown_token_id',
    'pad_token': 'padding_token_id',
}
# Phi-3's special tokens strip the white space after them, except these.
_PHI3_PLAIN = ('<unk>', '<s>', '<|endoftext|>')


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokens of a file, their types (`kinds`) and its other tokenizer.ggml keys (`said`)."""

    said: dict
    architecture: str
    tokens: list[str]
    kinds: list[int]

    @property
    def ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    def of_kind(self, *kinds: int) -> list[str]:
        return [token for token, kind in zip(self.tokens, self.kinds) if kind in kinds]


def read_tokenizer(path: Path) -> tuple[bytes, dict]:
    """The content of tokenizer.json, and the equivalent of tokenizer_config.json.

    Raises:
        MissingInputError, PermissionDeniedError, DataError: as `container.read`.
        DataError: the file has no tokenizer, or one that is damaged or not supported.
    """
    metadata, _ = container.read(path)
    try:
        vocabulary = _vocabulary(metadata)
        make = {'gpt2': _byte_level, 'llama': _sentencepiece}
        kind = _text(vocabulary.said, 'model', '')
        if kind not in make:
            raise DataError(f'has a tokenizer of kind {kind!r}; supported: {", ".join(make)}')
        backend, add_bos = make[kind](vocabulary)
        _add_tokens(backend, vocabulary)
        config = _roles(vocabulary)
    except DataError as error:
        raise DataError(f'{path} {error}') from error
    config['add_bos_token'] = bool(vocabulary.said.get('add_bos_token', add_bos))
    if isinstance(template := metadata.get('tokenizer.chat_template'), str):
        config['chat_template'] = template
    return backend.to_str().encode(), config


def _vocabulary(metadata: dict) -> Vocabulary:
    prefix = 'tokenizer.ggml.'
    said = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    if not (tokens := _texts(said, 'tokens')):
        raise DataError('has no tokenizer: no tokenizer.ggml.tokens')
    kinds = said.get('token_type')
    if kinds is None:  # older files
        special = [said.get(role) for role in _ROLES.values()]
        kinds = [_CONTROL if i in special else _NORMAL for i in range(len(tokens))]
    _check_numbers('token_type', kinds, len(tokens))
    architecture = str(metadata.get('general.architecture', ''))
    if architecture.startswith('gemma'):
        # Runs of spaces are marked user-defined and spelled with spaces, but merge like words.
        runs = [i for i, token in enumerate(tokens) if len(token) > 1 and not token.strip(' ')]
        for i in runs:
            tokens[i], kinds[i] = _SPACE * len(tokens[i]), _NORMAL
    vocabulary = Vocabulary(said, architecture, tokens, kinds)
    if len(vocabulary.ids) < len(tokens):
        twice = [token for i, token in enumerate(tokens) if vocabulary.ids[token] != i]
        raise DataError(f'is damaged: tokens occur twice: {listed(twice)}')
    return vocabulary


def _byte_level(vocabulary: Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    """A backend, and whether documents begin with bos by default."""
    name = _text(vocabulary.said, 'pre', 'default')
    if name not in PRE_NAMES:
        raise DataError(
            f'has the pre-tokenizer {name!r} (tokenizer.ggml.pre), which is not supported; '
            f'supported: {", ".join(PRE_NAMES)}'
        )
    pre = PRE_NAMES[name]
    merges = [tuple(merge.split(' ')) for merge in _texts(vocabulary.said, 'merges')]
    if any(len(pair) != 2 for pair in merges):
        raise DataError('is damaged: an entry of tokenizer.ggml.merges is not a pair of tokens')
    backend = _bpe(vocabulary, merges, ignore_merges=pre.ignore_merges)
    cuts = [pre_tokenizers.Split(Regex(pattern), 'isolated') for pattern in pre.patterns]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, letters])
    backend.decoder = decoders.ByteLevel()
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    return backend, pre.add_bos


def _sentencepiece(vocabulary: Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    """A backend, and True: by default documents begin with bos."""
    unknown = vocabulary.of_kind(_UNKNOWN)
    backend = _bpe(
        vocabulary,
        _merges(vocabulary),
        unk_token=unknown[0] if unknown else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    spaces = [normalizers.Replace(' ', _SPACE)]
    letters = [decoders.Replace(_SPACE, ' '), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.said.get('add_space_prefix', True):
        spaces.insert(0, normalizers.Prepend(_SPACE))
        letters.append(decoders.Strip(' ', 1, 0))
    backend.normalizer = normalizers.Sequence(spaces)
    backend.decoder = decoders.Sequence(letters)
    return backend, True


def _merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The merges that the scores imply: all pairs of tokens that make a token, best token first.

    Gemma's merges follow the order of its tokens, not its scores.
    """
    count = len(vocabulary.tokens)
    scores = vocabulary.said.get('scores')
    if vocabulary.architecture.startswith('gemma'):
        scores = [-i for i in range(count)]
    _check_numbers('scores', scores, count)
    ids = vocabulary.ids
    words = set(vocabulary.of_kind(_NORMAL))
    pairs = [
        (word[:cut], word[cut:])
        for word in vocabulary.of_kind(_NORMAL)
        for cut in range(1, len(word))
        if word[:cut] in words and word[cut:] in words
    ]

    def rank(pair):
        first, second = pair
        word = ids[first + second]
        return -scores[word], -len(first), -len(second), word, ids[first], ids[second]

    return sorted(pairs, key=rank)


def _bpe(vocabulary: Vocabulary, merges: list[tuple[str, str]], **options) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer(models.BPE(vocab=vocabulary.ids, merges=merges, **options))
    except Exception as error:  # The library raises bare Exceptions.
        raise DataError(f'is damaged: tokens and merges do not match: {error}') from error


def _add_tokens(backend: tokenizers.Tokenizer, vocabulary: Vocabulary) -> None:
    """Adds the tokens that are matched whole in a text before merging; they keep their ids."""
    is_phi3 = vocabulary.architecture == 'phi3' and vocabulary.said.get('model') == 'llama'
    special = [
        AddedToken(token, rstrip=is_phi3 and token not in _PHI3_PLAIN, normalized=False)
        for token in vocabulary.of_kind(_UNKNOWN, _CONTROL)
    ]
    backend.add_special_tokens(special)
    defined = vocabulary.of_kind(_USER_DEFINED)
    backend.add_tokens([AddedToken(token, normalized=False) for token in defined])


def _roles(vocabulary: Vocabulary) -> dict:
    """{role: token}, with the roles of tokenizer_config.json."""
    roles = {}
    for role, key in _ROLES.items():
        i = vocabulary.said.get(key)
        if i is None:
            continue
        if not isinstance(i, int) or not 0 <= i < len(vocabulary.tokens):
            raise DataError(
                f'is damaged: tokenizer.ggml.{key} is {i!r}, but there are '
                f'{len(vocabulary.tokens)} tokens'
            )
        roles[role] = vocabulary.tokens[i]
    return roles


def _check_numbers(key: str, values, count: int) -> None:
    """Raises DataError unless the values of a key are one number for each of `count` tokens."""
    is_right = isinstance(values, list) and len(values) == count
    if not is_right or not all(isinstance(value, int | float) for value in values):
        raise DataError(
            f'is damaged: tokenizer.ggml.{key} must have one number for each of {count} tokens'
        )


def _text(said: dict, key: str, default: str) -> str:
    text = said.get(key, default)
    if not isinstance(text, str):
        raise DataError(f'is damaged: tokenizer.ggml.{key} is not a string')
    return text


def _texts(said: dict, key: str) -> list[str]:
    texts = said.get(key, [])
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f'is damaged: tokenizer.ggml.{key} is not a list of strings')
    return list(texts)

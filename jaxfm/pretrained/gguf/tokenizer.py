"""The tokenizer in a `.gguf` file, as the tokenizer.json that it was made of.

llama.cpp keeps tokens, their types, and merges or scores; how text is cut is a name, `pre`, whose
patterns are those of the original tokenizers, as its source (llama-vocab.cpp) and the converter of
`transformers` quote them.
"""

import dataclasses
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from jaxfm.errors import DataError, listed
from jaxfm.pretrained.gguf import container

# Types of tokens.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPACE = '▁'  # by which SentencePiece writes one


@dataclasses.dataclass(frozen=True)
class Pre:
    """How a byte-level tokenizer cuts a text before it merges.

    Attributes:
        patterns: each cuts the pieces that the one before left, apart from what it matches.
        ignore_merges: a piece that is a token is not merged.
        add_bos: unless the file says otherwise.
        nfc: the text is normalized.
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
# Digits are cut out one by one before GPT-2's pattern cuts the rest; here in one pattern, which is
# encoded quickly (see word_encoder): white space before a digit is at the end of its piece.
_DIGITS = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
_LLAMA = Pre((_LLAMA3,), ignore_merges=True, add_bos=True)

PRE_NAMES = {
    # What llama.cpp does where a file does not say; of no model that is known.
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
# Tokens behind which Phi-3 takes white space along are all special ones but these.
_PHI3_PLAIN = ('<unk>', '<s>', '<|endoftext|>')


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What a file says of its tokens; `kinds` has the type of each."""

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
    """The content of tokenizer.json, and what tokenizer_config.json would say.

    Raises:
        MissingInputError, PermissionDeniedError, DataError: as `container.read`.
        DataError: the file has no tokenizer, one of a kind that is not read, or a damaged one.
    """
    metadata, _ = container.read(path)
    try:
        vocabulary = _vocabulary(metadata)
        make = {'gpt2': _byte_level, 'llama': _sentencepiece}
        kind = _text(vocabulary.said, 'model', '')
        if kind not in make:
            raise DataError(f'has a tokenizer of the kind {kind!r}; read are {", ".join(make)}')
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
    if kinds is None:  # in old files
        special = [said.get(role) for role in _ROLES.values()]
        kinds = [_CONTROL if i in special else _NORMAL for i in range(len(tokens))]
    _check_numbers('token_type', kinds, len(tokens))
    architecture = str(metadata.get('general.architecture', ''))
    if architecture.startswith('gemma'):
        # Runs of spaces are called user-defined and spelled as spaces, but merged like words.
        runs = [i for i, token in enumerate(tokens) if len(token) > 1 and not token.strip(' ')]
        for i in runs:
            tokens[i], kinds[i] = _SPACE * len(tokens[i]), _NORMAL
    vocabulary = Vocabulary(said, architecture, tokens, kinds)
    if len(vocabulary.ids) < len(tokens):
        twice = [token for i, token in enumerate(tokens) if vocabulary.ids[token] != i]
        raise DataError(f'is damaged: tokens are there twice: {listed(twice)}')
    return vocabulary


def _byte_level(vocabulary: Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    """A backend, and whether documents begin with a token for it."""
    name = _text(vocabulary.said, 'pre', 'default')
    if name not in PRE_NAMES:
        raise DataError(
            f'cuts text by the rule {name!r} (tokenizer.ggml.pre); known are {", ".join(PRE_NAMES)}'
        )
    pre = PRE_NAMES[name]
    merges = [tuple(merge.split(' ')) for merge in _texts(vocabulary.said, 'merges')]
    if any(len(pair) != 2 for pair in merges):
        raise DataError('is damaged: one of tokenizer.ggml.merges is not a pair of tokens')
    backend = _bpe(vocabulary, merges, ignore_merges=pre.ignore_merges)
    cuts = [pre_tokenizers.Split(Regex(pattern), 'isolated') for pattern in pre.patterns]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, letters])
    backend.decoder = decoders.ByteLevel()
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    return backend, pre.add_bos


def _sentencepiece(vocabulary: Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    """A backend, and that documents begin with a token for it."""
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
    """The merges that scores stand for: of what can be merged, what gives the best token first.

    Those of Gemma are in the order of its tokens, its scores are not.
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
        raise DataError(f'is damaged: its tokens and merges do not fit: {error}') from error


def _add_tokens(backend: tokenizers.Tokenizer, vocabulary: Vocabulary) -> None:
    """Tokens that are found in a text as a whole; they keep their ids."""
    is_phi3 = vocabulary.architecture == 'phi3' and vocabulary.said.get('model') == 'llama'
    special = [
        AddedToken(token, rstrip=is_phi3 and token not in _PHI3_PLAIN, normalized=False)
        for token in vocabulary.of_kind(_UNKNOWN, _CONTROL)
    ]
    backend.add_special_tokens(special)
    defined = vocabulary.of_kind(_USER_DEFINED)
    backend.add_tokens([AddedToken(token, normalized=False) for token in defined])


def _roles(vocabulary: Vocabulary) -> dict:
    """Tokens by what they are for."""
    roles = {}
    for role, key in _ROLES.items():
        i = vocabulary.said.get(key)
        if i is None:
            continue
        if not isinstance(i, int) or not 0 <= i < len(vocabulary.tokens):
            raise DataError(
                f'is damaged: tokenizer.ggml.{key} is {i}, of {len(vocabulary.tokens)} tokens'
            )
        roles[role] = vocabulary.tokens[i]
    return roles


def _check_numbers(key: str, values, count: int) -> None:
    """Raises DataError unless a key has a number for each of `count` tokens."""
    is_right = isinstance(values, list) and len(values) == count
    if not is_right or not all(isinstance(value, int | float) for value in values):
        raise DataError(
            f'is damaged: its {count} tokens do not have a number each in tokenizer.ggml.{key}'
        )


def _text(said: dict, key: str, default: str) -> str:
    text = said.get(key, default)
    if not isinstance(text, str):
        raise DataError(f'is damaged: tokenizer.ggml.{key} is no text')
    return text


def _texts(said: dict, key: str) -> list[str]:
    texts = said.get(key, [])
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f'is damaged: tokenizer.ggml.{key} is no list of texts')
    return list(texts)

"""Byte-level BPE word by word: the ids of the `tokenizers` library at two to four times its speed.

The library spends most of its time splitting text into words, and encodes a word again each time it
occurs. Here `regex` splits text with the tokenizer's own pattern, and the library's ids of each
word are cached. Texts with characters that the two might classify differently (they implement
different versions of Unicode) are left to the library.
"""

import functools
import itertools
import json
import re
import unicodedata
from collections.abc import Sequence

import regex
import tokenizers
from tokenizers import pre_tokenizers

# The pattern of `ByteLevel` itself: GPT-2's.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Characters whose class is the same in every version of Unicode since 5.0 (2006).
KNOWN = (
    *('\t\n', '\r\r', ' ~', '\u00a0\u024f', '\u0400\u0482', '\u048a\u0513'),
    *('\u2010\u2027', '\u2030\u205e', '\u20a0\u20b5', '\u2190\u22ff', '\u2500\u25ff'),
    *('\u3041\u3096', '\u30a1\u30fa', '\u4e00\u9fa5', '\uac00\ud7a3'),
)
_KNOWN = re.compile(f'[{"".join(f"{re.escape(a)}-{re.escape(b)}" for a, b in KNOWN)}]*')
# The longest word that is cached, in characters (a line of base64 is longer), and how many words.
_LONGEST, _REMEMBERED = 64, 1 << 18


class WordEncoder:
    """Encodes texts to the ids that `backend` would give."""

    def __init__(self, backend: tokenizers.Tokenizer, pattern: str, normalization: str | None):
        self._cut = regex.compile(pattern).findall
        self._normalization = normalization
        self._model = backend.model
        self._to_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._ids_of: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int] | None:
        """Ids of one text; None if only the backend can encode it."""
        if not _KNOWN.fullmatch(text):
            return None
        if self._normalization and not unicodedata.is_normalized(self._normalization, text):
            return None
        words = self._cut(text)
        found = map(self._ids_of.get, words)
        ids = [self._encode_word(word) if i is None else i for word, i in zip(words, found)]
        return list(itertools.chain.from_iterable(ids))

    def _encode_word(self, word: str) -> list[int]:
        letters = self._to_letters.pre_tokenize_str(word)[0][0]
        ids = [token.id for token in self._model.tokenize(letters)]
        if len(word) <= _LONGEST and len(self._ids_of) < _REMEMBERED:
            self._ids_of[word] = ids
        return ids


def encode_batch(
    encoder: WordEncoder | None, backend: tokenizers.Tokenizer, texts: Sequence[str]
) -> list[list[int]]:
    """Ids of texts. The backend encodes those that the encoder cannot, or all if it is None."""
    encoded = [encoder.encode(text) if encoder else None for text in texts]
    unknown = [i for i, ids in enumerate(encoded) if ids is None]
    found = backend.encode_batch_fast([texts[i] for i in unknown], add_special_tokens=False)
    for i, encoding in zip(unknown, found):
        encoded[i] = encoding.ids
    return encoded


def make_word_encoder(content: str, backend: tokenizers.Tokenizer) -> WordEncoder | None:
    """The encoder of a tokenizer.json; None if it does more than split text and merge bytes."""
    config = json.loads(content)
    model, normalizer = config['model'], config.get('normalizer')
    pattern = _pattern(config.get('pre_tokenizer'))
    options = ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix', 'byte_fallback')
    is_plain = model.get('type') == 'BPE' and not any(model.get(name) for name in options)
    # Otherwise the library would search a text for added tokens before splitting it.
    no_words_added = all(token['special'] for token in _read_added_tokens(backend))
    if not (pattern and is_plain and no_words_added):
        return None
    if normalizer and normalizer.get('type') != 'NFC':
        return None
    return WordEncoder(backend, pattern, 'NFC' if normalizer else None)


def _read_added_tokens(backend: tokenizers.Tokenizer) -> list[dict]:
    return json.loads(backend.to_str())['added_tokens']


def _pattern(config: dict | None) -> str | None:
    """The pattern that splits text; None unless it is the only thing that does."""
    match config:
        case {'type': 'ByteLevel', 'use_regex': True, 'add_prefix_space': False}:
            return _GPT2
        case {
            'type': 'Sequence',
            'pretokenizers': [
                {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated'} as split,
                {'type': 'ByteLevel', 'use_regex': False, 'add_prefix_space': False},
            ],
        } if not split.get('invert'):
            return pattern if _is_readable(pattern) else None
    return None


@functools.cache
def _is_readable(pattern: str) -> bool:
    try:
        regex.compile(pattern)
    except regex.error:
        return False
    # If a pattern has groups, findall returns these instead of the words.
    return not regex.compile(pattern).groups

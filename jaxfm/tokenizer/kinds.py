"""How text becomes ids: what all tokenizers share, and one class per library that runs them.

Plain text never becomes a special token. Special tokens are found only in a rendered chat, where
`encode_parts` distinguishes those that the template wrote from those that a message spells.
"""

import base64
import binascii
import difflib
import functools
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import models

from jaxfm.errors import ConfigError, DataError, MissingInputError
from jaxfm.tokenizer.backend import open_backend, open_further
from jaxfm.tokenizer.files import CONFIG_FILE, parse_json
from jaxfm.tokenizer.word_encoder import encode_batch, make_word_encoder

# An added token that is not marked special is control or markup if it looks like this; others
# (runs of spaces, words) are ordinary vocabulary.
_MARKUP = re.compile(r'<[^\s].*>|\[/?[A-Z_]+\]', re.DOTALL)
# Markup that a model writes into its own text: <think>, </tool_call>.
_TAG = re.compile(r'</?\w+>')

_REMEMBERED_LENGTH, _REMEMBERED_TEXTS = 32, 4096


class Tokenizer:
    """Base class of all tokenizers; a subclass defines how plain text becomes ids.

    Attributes:
        bos_id: put before documents; None if the tokenizer puts none there.
        eos_id: put after documents, and after chats whose template does not mark the end itself.
        special_tokens: {text: id} of all tokens that plain text never becomes.
        chat_template: Jinja; '' if there is none.
        template_variables: special tokens under the names that templates use for them.
    """

    # Tokens that absorb the white space on one side, as Phi-3's do.
    _strips_left = _strips_right = frozenset()
    # Special tokens that decoding keeps.
    _visible: frozenset[str] = frozenset()
    # Whether the space that some tokenizers put before a text also goes after a special token.
    _prefix_after_special = False
    # Whether the library may encode plain text as a special token, which we must then prevent.
    _may_leak = False

    def __init__(self, files: dict[str, bytes]):
        self._files = files
        config = parse_json(files[CONFIG_FILE], CONFIG_FILE)
        self.chat_template: str = config.get('chat_template', '')
        self.special_tokens: dict[str, int] = self._open(config)
        names = {k: v for k, v in config.items() if k.endswith('_token') and isinstance(v, str)}
        self.template_variables = {'bos_token': '', 'eos_token': ''} | names
        self.eos_id: int = self._find_special('eos_token')
        has_bos = names.get('bos_token') and config.get('add_bos_token', True)
        self.bos_id: int | None = self._find_special('bos_token') if has_bos else None
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self.special_pattern = re.compile(f'({"|".join(map(re.escape, longest_first))})')
        hidden = self.special_tokens.keys() - self._visible | {names['eos_token']}
        self._hidden_ids = frozenset(self.special_tokens[token] for token in hidden)
        self._cache: dict[tuple[str, bool], list[int]] = {}

    @property
    def vocab_size(self) -> int:
        """Ids are in [0, vocab_size)."""
        raise NotImplementedError

    @property
    def tokens(self) -> dict[int, str | bytes]:
        """{id: token} of the whole vocabulary, as the library spells it."""
        raise NotImplementedError

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of everything that determines the ids, including those of chats."""
        digest = hashlib.sha256()
        for name, content in sorted(self._files.items()):
            digest.update(f'{name} {len(content)}\n'.encode())
            digest.update(content)
        return digest.hexdigest()

    @functools.cached_property
    def tags(self) -> frozenset[str]:
        """Special tokens that a model writes into its own text, such as <think>."""
        return frozenset(token for token in self._visible if _TAG.fullmatch(token))

    @functools.cached_property
    def invalid_byte_id(self) -> int | None:
        """The token '<0xFF>', a byte that UTF-8 never has; None if bytes are not such tokens."""
        return self._token_id('<0xFF>')

    def encode(self, text: str) -> list[int]:
        """Ids without special tokens. Raises DataError if the text has a lone surrogate."""
        return self._plain([text], is_start=True)[0]

    def encode_after(self, text: str) -> list[int]:
        """As `encode`, of a text that follows another one: no space is put before it."""
        return self._plain([text], is_start=False)[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 [n], as `encode`; uses all cores."""
        return [np.array(ids, np.int32) for ids in self._plain(texts, is_start=True)]

    def encode_parts(self, parts: Iterable[str], filler: str = '') -> list[list[int]]:
        """Ids of the parts of one rendered text, in which spelled special tokens become tokens.

        The ids of a part do not depend on later parts, so they are the same if the text ends there.
        `filler` is the character that `guard` inserted; it is removed before encoding.
        """
        encoded, before = [], None  # before: the last special token; '' after text, None at start
        for part in parts:
            ids, pieces = [], self.special_pattern.split(part)
            for text, token in zip(pieces[::2], [*pieces[1::2], '']):
                text = text.rstrip() if token in self._strips_left else text
                text = text.lstrip() if before in self._strips_right else text
                if text:
                    is_start = before is None or (before and self._prefix_after_special)
                    ids += self._part(text.replace(filler, '') if filler else text, is_start)
                    before = ''
                if token:
                    ids.append(self.special_tokens[token])
                    before = token
            encoded.append(ids)
        return encoded

    def guard(self, text: str, filler: str, but: frozenset[str] = frozenset()) -> str:
        """Puts the filler between the letters of all special tokens in a text, except in `but`."""

        def break_up(match):
            token = match.group()
            return token if token in but else filler.join([*token, ''])

        return self.special_pattern.sub(break_up, text)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD, unknown ids become nothing."""
        hidden = self._hidden_ids if skip_special_tokens else ()
        return self._decode([int(i) for i in ids if int(i) not in hidden])

    def decode_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text that `ids` add to `before`. Without it, SentencePiece drops a first space."""
        text, whole = self.decode(before), self.decode([*before, *ids])
        return whole[len(os.path.commonprefix([text, whole])) :]

    def save(self, directory: Path) -> None:
        """Writes the files of a saved tokenizer into a directory, creating it if needed."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (directory / name).write_bytes(content)

    def __reduce__(self):
        return open_files, (self._files,)

    def _open(self, config: dict) -> dict[str, int]:
        """Opens the vocabulary and returns {text: id} of its special tokens."""
        raise NotImplementedError

    def _ids(self, texts: Sequence[str], is_start: bool) -> list[list[int]]:
        """Ids of texts; `is_start` is False for texts that continue another one."""
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError

    def _token_id(self, token: str) -> int | None:
        """The id of a token, special or not; None if there is no such token."""
        return self.special_tokens.get(token)

    def _plain(self, texts: Sequence[str], is_start: bool) -> list[list[int]]:
        for text in texts:
            _check_unicode(text)
        encoded = self._ids(texts, is_start)
        if self._may_leak:
            special = frozenset(self.special_tokens.values())
            for i, ids in enumerate(encoded):
                if not special.isdisjoint(ids):
                    encoded[i] = self._spell_out(texts[i], is_start)
        return encoded

    def _spell_out(self, text: str, is_start: bool) -> list[int]:
        """Ids of a text in which spelled special tokens are cut into letters before encoding."""
        spelled = [match.span() for match in self.special_pattern.finditer(text)]
        cuts = [cut for start, stop in spelled for cut in range(start + 1, stop)]
        pieces = [text[start:stop] for start, stop in itertools.pairwise([0, *cuts, len(text)])]
        first = self._ids(pieces[:1], is_start)
        return list(itertools.chain(*first, *self._ids(pieces[1:], False)))

    def _part(self, text: str, is_start: bool) -> list[int]:
        """Ids of a piece of a chat; short pieces, mostly the template's own, are cached."""
        is_start = bool(is_start)
        if len(text) > _REMEMBERED_LENGTH:
            return self._plain([text], is_start)[0]
        if (text, is_start) not in self._cache:
            if len(self._cache) >= _REMEMBERED_TEXTS:
                self._cache.clear()
            self._cache[text, is_start] = self._plain([text], is_start)[0]
        return self._cache[text, is_start]

    def _find_special(self, key: str) -> int:
        """The id of the token for `key` (eos_token, ...); from now on the token is special."""
        token = self.template_variables[key]
        names = ', '.join(list(self.special_tokens)[:8]) or 'none'
        if not token:
            raise DataError(
                'the tokenizer does not define which token ends a text: '
                f'set config.tokenizer.{key}; its special tokens: {names}'
            )
        if (found := self._token_id(token)) is None:
            near = difflib.get_close_matches(token, self.special_tokens, 1)
            hint = f'; do you mean {near[0]}?' if near else f'; its special tokens: {names}'
            raise DataError(f'config.tokenizer.{key}: the vocabulary has no {token!r}{hint}')
        self.special_tokens[token] = found
        return found


class HuggingFace(Tokenizer):
    """A tokenizer.json, run by the `tokenizers` library."""

    def _open(self, config: dict) -> dict[str, int]:
        content = self._files['tokenizer.json'].decode('utf-8', 'replace')
        self._backend = open_backend(content)
        added = self._backend.get_added_tokens_decoder()
        tokens = {token.content: token for token in added.values() if _is_special(token)}
        self._visible = frozenset(text for text, token in tokens.items() if not token.special)
        self._strips_left = frozenset(text for text, token in tokens.items() if token.lstrip)
        self._strips_right = frozenset(text for text, token in tokens.items() if token.rstrip)
        self._may_leak = not isinstance(self._backend.model, models.BPE)
        self._size = max([self._backend.get_vocab_size(with_added_tokens=False) - 1, *added]) + 1
        self._further, self._prefix_after_special = open_further(content, self._backend)
        # Otherwise the library would turn text that spells one of these into its id.
        self._backend.add_special_tokens(sorted(self._visible))
        self._further.add_special_tokens(sorted(self._visible))
        self._words = make_word_encoder(content, self._backend)
        return {token.content: i for i, token in sorted(added.items()) if _is_special(token)}

    @property
    def vocab_size(self) -> int:
        return self._size

    @property
    def tokens(self):
        return {i: token for token, i in self._backend.get_vocab(with_added_tokens=True).items()}

    def _ids(self, texts, is_start):
        backend = self._backend if is_start else self._further
        return encode_batch(self._words, backend, texts)

    def _decode(self, ids):
        return self._backend.decode(ids, skip_special_tokens=False)

    def _token_id(self, token):
        return self._backend.token_to_id(token)


class SentencePiece(Tokenizer):
    """A tokenizer.model, run by the `sentencepiece` library."""

    _prefix_after_special = True
    # Fields appended to a serialized model are merged into it. These bytes turn off
    # add_dummy_prefix (3) and remove_extra_whitespaces (4) in normalizer_spec (field 3), for text
    # that continues other text.
    _GOES_ON = b'\x1a\x04\x18\x00\x20\x00'

    def _open(self, config: dict) -> dict[str, int]:
        try:
            import sentencepiece
        except ImportError as error:
            raise _make_absent_error('sentencepiece') from error
        model = self._files['tokenizer.model']
        try:
            self._start = sentencepiece.SentencePieceProcessor(model_proto=model)
            self._further = sentencepiece.SentencePieceProcessor(model_proto=model + self._GOES_ON)
        except (RuntimeError, OSError) as error:
            raise DataError(f'tokenizer.model is damaged: {error}') from error
        for key, i in (('bos_token', self._start.bos_id()), ('eos_token', self._start.eos_id())):
            if i >= 0:
                config.setdefault(key, self._start.id_to_piece(i))
        pieces = [(self._start.id_to_piece(i), i) for i in range(self.vocab_size)]
        written = {piece: i for piece, i in pieces if self._is_user_defined(piece, i)}
        self._visible, self._may_leak = frozenset(written), bool(written)
        return {piece: i for piece, i in pieces if self._start.is_control(i)} | written

    @property
    def vocab_size(self) -> int:
        return self._start.vocab_size()

    @property
    def tokens(self):
        return {i: self._start.id_to_piece(i) for i in range(self.vocab_size)}

    def _is_user_defined(self, piece: str, i: int) -> bool:
        """Whether a piece is markup that the library encodes as one token."""
        odd = self._start.is_control(i) or self._start.is_byte(i) or self._start.is_unknown(i)
        return not odd and bool(_MARKUP.fullmatch(piece)) and self._further.encode(piece) == [i]

    def _ids(self, texts, is_start):
        return (self._start if is_start else self._further).encode(list(texts))

    def _decode(self, ids):
        return self._start.decode([i for i in ids if 0 <= i < self.vocab_size])

    def _token_id(self, token):
        i = self._start.piece_to_id(token)
        return None if i == self._start.unk_id() else i


class Tiktoken(Tokenizer):
    """A file of tiktoken ranks, run by the `tiktoken` library."""

    def _open(self, config: dict) -> dict[str, int]:
        try:
            import tiktoken
        except ImportError as error:
            raise _make_absent_error('tiktoken') from error
        ranks = _ranks(self._files['ranks.tiktoken'])
        special = {str(token): int(i) for token, i in config.get('special_tokens', {}).items()}
        for key in ('bos_token', 'eos_token'):  # ranks have neither, so a new one gets the next id
            if config.get(key) and config[key] not in special:
                special[config[key]] = 1 + max([*ranks.values(), *special.values()])
        try:
            self._encoding = tiktoken.Encoding(
                'ranks', pat_str=config['pattern'], mergeable_ranks=ranks, special_tokens=special
            )
        except (ValueError, KeyError) as error:
            raise ConfigError(
                f'config.tokenizer.pattern or the special tokens are not valid: {error}'
            ) from error
        self._known = frozenset(ranks.values()) | frozenset(special.values())
        return special

    @property
    def vocab_size(self) -> int:
        return self._encoding.n_vocab

    @property
    def tokens(self):
        return {i: self._encoding.decode_single_token_bytes(i) for i in self._known}

    def _ids(self, texts, is_start):
        if len(texts) == 1:
            return [self._encoding.encode_ordinary(texts[0])]
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)

    def _decode(self, ids):
        return self._encoding.decode([i for i in ids if i in self._known])


def open_files(files: dict[str, bytes]) -> Tokenizer:
    """Makes a tokenizer from the files of its saved form; raises as `load_tokenizer` does."""
    if 'tokenizer.model' in files:
        return SentencePiece(files)
    return Tiktoken(files) if 'ranks.tiktoken' in files else HuggingFace(files)


def _make_absent_error(package: str) -> MissingInputError:
    return MissingInputError(
        f"this tokenizer needs the package {package}: pip install 'jaxfm[data]'"
    )


def _check_unicode(text: str) -> None:
    """Raises DataError unless the text can be encoded as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f'the text is not valid Unicode: lone surrogate at character {error.start}'
        ) from error


def _is_special(token: tokenizers.AddedToken) -> bool:
    return token.special or bool(_MARKUP.fullmatch(token.content))


def _ranks(content: bytes) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataError(
                f'ranks.tiktoken:{number} is damaged: {line[:40]!r} is not a token and its rank'
            ) from error
    if len(set(ranks.values())) != len(ranks) or not ranks:
        raise DataError('ranks.tiktoken is damaged: it is empty or repeats a rank')
    return ranks

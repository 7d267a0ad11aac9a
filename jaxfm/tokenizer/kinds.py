"""How text becomes ids: what all tokenizers share, and the libraries that run them.

Special tokens never come out of text. Their names are found in a rendered chat only, where
`encode_parts` tells what a template wrote from what a message spells.
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

# An added token that is not called special is control or markup when it looks like this; others
# (runs of spaces, words) are vocabulary like any.
_MARKUP = re.compile(r'<[^\s].*>|\[/?[A-Z_]+\]', re.DOTALL)
# Of these, what a model writes into its text itself: <think>, </tool_call>.
_TAG = re.compile(r'</?\w+>')

_REMEMBERED_LENGTH, _REMEMBERED_TEXTS = 32, 4096


class Tokenizer:
    """What all kinds share; a kind says how plain text becomes ids.

    Attributes:
        bos_id: put in front of documents, None where the vocabulary has none.
        eos_id: put behind documents, and behind chats whose template writes no mark of its own.
        special_tokens: {text: id} of all tokens that never come out of text.
        chat_template: Jinja; '' is none.
        template_variables: special tokens by the names that templates know them by.
    """

    # Tokens that take the white space on one side along, as those of Phi-3 do.
    _strips_left = _strips_right = frozenset()
    # Special tokens that decoding shows.
    _visible: frozenset[str] = frozenset()
    # Some kinds put a space before a text; whether they do so behind a special token, too.
    _prefix_after_special = False
    # Whether plain text may come out as a special token, which then has to be prevented.
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

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of everything that decides the ids, those of chats included."""
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
        """The token of a byte that no UTF-8 has; None where single bytes are no tokens '<0xFF>'."""
        return self._token_id('<0xFF>')

    def encode(self, text: str) -> list[int]:
        """Ids without special tokens; DataError for a str that has a lone surrogate."""
        return self._plain([text], is_start=True)[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32, on all cores."""
        return [np.array(ids, np.int32) for ids in self._plain(texts, is_start=True)]

    def encode_parts(self, parts: Iterable[str], filler: str = '') -> list[list[int]]:
        """Ids of the parts of one text in which special tokens are spelled by their names.

        What follows a part does not change its ids, so they are also those of a text that ends
        there. `filler` is a character that keeps spellings text; it leaves no ids itself.
        """
        encoded, before = [], None  # before: the special token there, '' is text, None the start
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
        """The text with the filler between the letters of special tokens, of those in `but` not."""

        def break_up(match):
            token = match.group()
            return token if token in but else filler.join([*token, ''])

        return self.special_pattern.sub(break_up, text)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD, ids of no token nothing."""
        hidden = self._hidden_ids if skip_special_tokens else ()
        return self._decode([int(i) for i in ids if int(i) not in hidden])

    def decode_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text that ids add behind others; alone, SentencePiece would drop a first space."""
        text, whole = self.decode(before), self.decode([*before, *ids])
        return whole[len(os.path.commonprefix([text, whole])) :]

    def save(self, directory: Path) -> None:
        """Writes the files of a saved tokenizer into a directory, which is made."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (directory / name).write_bytes(content)

    def __reduce__(self):
        return open_files, (self._files,)

    def _open(self, config: dict) -> dict[str, int]:
        """Opens the vocabulary; its special tokens."""
        raise NotImplementedError

    def _ids(self, texts: Sequence[str], is_start: bool) -> list[list[int]]:
        """Ids of texts; is_start is False where a text goes on after another one."""
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError

    def _token_id(self, token: str) -> int | None:
        """The id of a token that need not be special."""
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
        """Ids of a text whose spellings of special tokens are cut into their letters."""
        spelled = [match.span() for match in self.special_pattern.finditer(text)]
        cuts = [cut for start, stop in spelled for cut in range(start + 1, stop)]
        pieces = [text[start:stop] for start, stop in itertools.pairwise([0, *cuts, len(text)])]
        first = self._ids(pieces[:1], is_start)
        return list(itertools.chain(*first, *self._ids(pieces[1:], False)))

    def _part(self, text: str, is_start: bool) -> list[int]:
        """Ids of a piece of a chat; the short ones, mostly of the template, are remembered."""
        is_start = bool(is_start)
        if len(text) > _REMEMBERED_LENGTH:
            return self._plain([text], is_start)[0]
        if (text, is_start) not in self._cache:
            if len(self._cache) >= _REMEMBERED_TEXTS:
                self._cache.clear()
            self._cache[text, is_start] = self._plain([text], is_start)[0]
        return self._cache[text, is_start]

    def _find_special(self, key: str) -> int:
        """The id of the token that has the role `key`, which is special from now on."""
        token = self.template_variables[key]
        names = ', '.join(list(self.special_tokens)[:8]) or 'none'
        if not token:
            raise DataError(
                f'the tokenizer does not say which token ends a text: set tokenizer.{key}; '
                f'its special tokens: {names}'
            )
        if (found := self._token_id(token)) is None:
            near = difflib.get_close_matches(token, self.special_tokens, 1)
            hint = f'; do you mean {near[0]}?' if near else f'; its special tokens: {names}'
            raise DataError(f'tokenizer.{key}: the vocabulary has no {token!r}{hint}')
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
        # So that the library leaves their spellings alone, as it does those of special tokens.
        self._backend.add_special_tokens(sorted(self._visible))
        self._further.add_special_tokens(sorted(self._visible))
        self._words = make_word_encoder(content, self._backend)
        return {token.content: i for i, token in sorted(added.items()) if _is_special(token)}

    @property
    def vocab_size(self) -> int:
        return self._size

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
    # What is appended to a serialized model is merged into it: normalizer_spec (field 3) with
    # add_dummy_prefix (3) and remove_extra_whitespaces (4) off, for text that goes on.
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

    def _is_user_defined(self, piece: str, i: int) -> bool:
        """Whether the library turns the spelling of a markup into one token."""
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
    """Ranks of tokens, run by the `tiktoken` library."""

    def _open(self, config: dict) -> dict[str, int]:
        try:
            import tiktoken
        except ImportError as error:
            raise _make_absent_error('tiktoken') from error
        ranks = _ranks(self._files['ranks.tiktoken'])
        special = {str(token): int(i) for token, i in config.get('special_tokens', {}).items()}
        for key in ('bos_token', 'eos_token'):  # ranks have none: a name is all there is to one
            if config.get(key) and config[key] not in special:
                special[config[key]] = 1 + max([*ranks.values(), *special.values()])
        try:
            self._encoding = tiktoken.Encoding(
                'ranks', pat_str=config['pattern'], mergeable_ranks=ranks, special_tokens=special
            )
        except (ValueError, KeyError) as error:
            raise ConfigError(f'tokenizer.pattern or its special tokens: {error}') from error
        self._known = frozenset(ranks.values()) | frozenset(special.values())
        return special

    @property
    def vocab_size(self) -> int:
        return self._encoding.n_vocab

    def _ids(self, texts, is_start):
        if len(texts) == 1:
            return [self._encoding.encode_ordinary(texts[0])]
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)

    def _decode(self, ids):
        return self._encoding.decode([i for i in ids if i in self._known])


def open_files(files: dict[str, bytes]) -> Tokenizer:
    """The tokenizer that saved files are of; errors as `load_tokenizer`."""
    if 'tokenizer.model' in files:
        return SentencePiece(files)
    return Tiktoken(files) if 'ranks.tiktoken' in files else HuggingFace(files)


def _make_absent_error(package: str) -> MissingInputError:
    return MissingInputError(
        f"this tokenizer needs the package {package}: pip install 'jaxfm[data]'"
    )


def _check_unicode(text: str) -> None:
    """Raises DataError unless the text has a UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f'text with a lone surrogate at {error.start} has no UTF-8 form') from error


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
                f'ranks.tiktoken:{number} is damaged: {line[:40]!r} is no token with its rank'
            ) from error
    if len(set(ranks.values())) != len(ranks) or not ranks:
        raise DataError('ranks.tiktoken is damaged: it is empty or has a rank twice')
    return ranks

"""Tokenizers: text to ids and back, and what a config may say of them."""

from typing import Literal

from pydantic import Field

from jaxfm.registry import Entry, Registry
from jaxfm.schema import Group


class TokenizerConfig(Group):
    """What every tokenizer has."""

    # How chats become text: a file with a Jinja template, or the name of one that we bring
    # (`chat.template.TEMPLATES`); '' is the tokenizer's own, else `plain`.
    chat_template: str = ''


class BytesConfig(TokenizerConfig):
    """One token a byte: 256 bytes and the special tokens."""

    name: Literal['bytes'] = 'bytes'
    special_tokens: list[str] = []  # beside <|bos|> and <|eos|>, such as those of a chat template


class BPEConfig(TokenizerConfig):
    """Byte-level BPE, trained on the train documents of the first phase."""

    name: Literal['bpe'] = 'bpe'
    # Special tokens and the 256 bytes included.
    vocab_size: int = Field(default=2048, ge=258)
    # How text is cut before merging; `tokenizer.build.PATTERNS` explains the choices.
    pattern: Literal['code', 'gpt2'] = 'gpt2'
    special_tokens: list[str] = []


class TokenizerFileConfig(TokenizerConfig):
    """A tokenizer that exists: from a Hugging Face tokenizer.json, SentencePiece .model, tiktoken
    ranks (.tiktoken), the model in a .gguf, or a directory or a run that has one of them."""

    name: Literal['file'] = 'file'
    path: str = Field(min_length=1)
    # For tiktoken ranks only, which say neither how text is cut nor the special tokens: the name of
    # an encoding (cl100k_base, o200k_base) or a regular expression.
    pattern: str = ''
    # In place of what the file says; '' is the file's own.
    bos_token: str = ''
    eos_token: str = ''


TOKENIZERS = Registry(
    {
        'bytes': Entry('jaxfm.tokenizer.build:Bytes', BytesConfig),
        'bpe': Entry('jaxfm.tokenizer.build:BPE', BPEConfig),
        'file': Entry('jaxfm.tokenizer.build:load_tokenizer_file', TokenizerFileConfig),
    }
)

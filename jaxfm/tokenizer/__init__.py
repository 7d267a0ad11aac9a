"""The config groups and the registry of tokenizers, which turn text into ids and back."""

from typing import Literal

from pydantic import Field

from jaxfm.registry import Entry, Registry
from jaxfm.schema import Group


class TokenizerConfig(Group):
    """Options of every tokenizer."""

    # How chats become text: the path of a Jinja template, or the name of a built-in one (plain,
    # chatml, qa); '' is the tokenizer's own template, or plain if it has none.
    chat_template: str = ''


class BytesConfig(TokenizerConfig):
    """One token per byte: 256 bytes and the special tokens."""

    name: Literal['bytes'] = 'bytes'
    # In addition to <|bos|> and <|eos|>, such as those of a chat template.
    special_tokens: list[str] = []


class BPEConfig(TokenizerConfig):
    """Byte-level BPE, trained on the train documents of the first phase."""

    name: Literal['bpe'] = 'bpe'
    # Includes the special tokens and the 256 bytes.
    vocab_size: int = Field(default=2048, ge=258)
    # How text is split before merging; `tokenizer.build.PATTERNS` explains the choices.
    pattern: Literal['code', 'gpt2'] = 'gpt2'
    special_tokens: list[str] = []  # in addition to <|bos|> and <|eos|>


class TokenizerFileConfig(TokenizerConfig):
    """An existing tokenizer: a Hugging Face tokenizer.json, a SentencePiece .model, tiktoken ranks
    (.tiktoken), the tokenizer in a .gguf, or a directory or run that contains one of these."""

    name: Literal['file'] = 'file'
    path: str = Field(min_length=1)
    # Only for tiktoken ranks, which define neither how text is split nor special tokens: the name
    # of an encoding (cl100k_base, o200k_base) or a regular expression.
    pattern: str = ''
    # Override the file's tokens; '' keeps them.
    bos_token: str = ''
    eos_token: str = ''


TOKENIZERS = Registry(
    {
        'bytes': Entry('jaxfm.tokenizer.build:Bytes', BytesConfig),
        'bpe': Entry('jaxfm.tokenizer.build:BPE', BPEConfig),
        'file': Entry('jaxfm.tokenizer.build:load_tokenizer_file', TokenizerFileConfig),
    }
)

"""Data: from documents to batches of token ids, all on the host.

`sources` finds and reads documents, `tokenizer` turns text into ids, `corpus` keeps the ids in a
cache on disk, `packing` says which tokens a row holds, `loader` delivers batches of rows. Nothing
here touches a device.
"""

from typing import Annotated, Literal

from pydantic import Field

from jaxfm.schema import Entry, Group, one_of

Fraction = Annotated[float, Field(gt=0, lt=1)]


class PythonStdlibConfig(Group):
    """The source of the running interpreter's standard library: text that every machine has."""

    name: Literal['python_stdlib'] = 'python_stdlib'
    # Share of the files that is held out, chosen by a hash of the path inside the library.
    heldout_fraction: Fraction = 0.05


class TextConfig(Group):
    """Local UTF-8 text files, one document each."""

    name: Literal['text'] = 'text'
    # Globs (`**` included) or plain paths.
    files: list[str] = Field(min_length=1)
    # Globs of the held-out files; when given, heldout_fraction is not used.
    heldout_files: list[str] = []
    # Share of the files that is held out, chosen by a hash of their path. When that picks no file
    # (one big file, say) the tail of every file is held out instead, and the log says so.
    heldout_fraction: Fraction = 0.05


class BytesConfig(Group):
    """One token a byte: 256 bytes and the special tokens."""

    name: Literal['bytes'] = 'bytes'


class BPEConfig(Group):
    """Byte-level BPE, trained on the train documents."""

    name: Literal['bpe'] = 'bpe'
    # Special tokens and the 256 bytes included.
    vocab_size: int = Field(default=2048, ge=258)
    # How text is cut before merging; `tokenizer.PATTERNS` explains the choices.
    pattern: Literal['code', 'gpt2'] = 'gpt2'


SOURCES = {
    'python_stdlib': Entry('jaxfm.data.sources:PythonStdlib', PythonStdlibConfig),
    'text': Entry('jaxfm.data.sources:Text', TextConfig),
}

TOKENIZERS = {
    'bytes': Entry('jaxfm.data.tokenizer:Bytes', BytesConfig),
    'bpe': Entry('jaxfm.data.tokenizer:BPE', BPEConfig),
}


class DataConfig(Group):
    """What is read, how it becomes tokens, and the shape of a batch."""

    source: one_of(SOURCES) = PythonStdlibConfig()
    tokenizer: one_of(TOKENIZERS) = BPEConfig()
    # Tokens in a row of a batch.
    sequence_length: int = Field(ge=2)
    # Rows in a step, over all hosts.
    batch_size: int = Field(ge=1)

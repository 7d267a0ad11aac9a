"""Data: from documents to batches of token ids, all on the host.

`sources` find and read documents, `corpus` keeps their ids in a cache on disk (`build` makes it),
`streaming` encodes them while training; `packing` says which tokens a row holds, `order` and
`mixture` which row comes next; `loader` delivers batches of rows, and `dataset` is all of that for
one phase of a run. Nothing here touches a device.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from jaxfm.registry import Entry, Registry, one_of
from jaxfm.schema import ConflictError, Group, Problem

Fraction = Annotated[float, Field(gt=0, lt=1)]


class PythonStdlibConfig(Group):
    """The source of the running interpreter's standard library: text that every machine has."""

    name: Literal['python_stdlib'] = 'python_stdlib'
    # Share of the files that is held out, chosen by a hash of the path inside the library.
    heldout_fraction: Fraction = 0.05


class FieldsConfig(Group):
    """Where a record has its document: dotted paths (`instances.0.output`).

    With none of text, messages, prompt given, a record with `messages` or `conversations` is a
    chat, one with `prompt` and `completion` a chat of one turn, any other must have `text`.
    """

    text: str = ''
    messages: str = ''  # a list of turns
    prompt: str = ''  # with completion: one user turn, one assistant turn
    completion: str = ''
    system: str = ''  # a text before the messages
    tools: str = 'tools'  # a list of tools, or JSON text of one; may be absent
    role: str = ''  # inside a turn; '' is role or from
    content: str = ''  # inside a turn; '' is content or value
    # What other names of roles mean; human, gpt and the like are known.
    roles: dict[str, Literal['system', 'user', 'assistant', 'tool']] = {}
    group: str = ''  # a label; scores of evaluations are also given by group


class FilesConfig(Group):
    """Documents in files: plain text (one document a file), or records of text or chats."""

    name: Literal['files'] = 'files'
    # Paths or globs (`**` included), local or s3://bucket/...; .gz and .zst are decompressed.
    path: str | list[str] = Field(min_length=1)
    # The held-out files; when given, heldout_fraction is not used.
    heldout_path: str | list[str] = []
    # Share that is held out: of text files by a hash of their path, of records by a hash of their
    # content. When that picks no file (one big text, say) the tail of every file is held out; when
    # it picks none of few records, one is.
    heldout_fraction: Fraction = 0.05
    # auto goes by the suffix: .jsonl, .parquet, .array_record (JSON records); others are text.
    format: Literal['auto', 'text', 'jsonl', 'parquet', 'array_record'] = 'auto'
    fields: FieldsConfig = FieldsConfig()
    # Records that may be bad (no JSON, no such field) before it is an error; they are left out.
    max_bad_records: int = Field(default=0, ge=0)


ProblemKind = Literal['addition', 'subtraction', 'reverse', 'rotate', 'last_letters']


class ProblemsConfig(Group):
    """Generated problems with one right answer: arithmetic and string manipulation.

    Which problems are held out is decided by a hash of the problem, so no phase trains on them.
    """

    name: Literal['problems'] = 'problems'
    form: Literal['text', 'chat'] = 'text'
    # [] is all that there are; one that is listed twice is trained on twice as often.
    kinds: list[ProblemKind] = []
    num_problems: int = Field(default=100_000, ge=1)  # to train on
    num_heldout: int = Field(default=240, ge=1, le=10_000)
    seed: int = Field(default=0, ge=0, lt=2**32)  # which of all possible problems


SOURCES = Registry(
    {
        'python_stdlib': Entry('jaxfm.data.sources.python_stdlib:PythonStdlib', PythonStdlibConfig),
        'files': Entry('jaxfm.data.sources.files:Files', FilesConfig),
        'problems': Entry('jaxfm.data.sources.problems:Problems', ProblemsConfig),
    },
    base=Group,
)


class BatchConfig(Group):
    """How documents become the rows of a batch."""

    # Tokens in a row of a batch.
    sequence_length: int = Field(ge=2)
    # Rows in a step, over all hosts.
    batch_size: int = Field(ge=1)
    # concat: one stream, cut into rows. best_fit: documents side by side in a row, cut only when
    # longer than it. none: one document a row. auto: concat for text, best_fit for chats, which are
    # never cut.
    packing: Literal['auto', 'concat', 'best_fit', 'none'] = 'auto'
    # A chat longer than a row stops the run, is left out, or loses its end.
    too_long: Literal['error', 'drop', 'truncate'] = 'error'
    # cached: once, before training, into a cache on disk; rows are shuffled over the whole corpus.
    # on_the_fly: while training; every process reads everything, in the order of the files.
    tokenize: Literal['cached', 'on_the_fly'] = 'cached'
    # A cache made by `python -m tools.corpus build`; '' is one kept in the user's cache directory.
    cache: str = ''

    @property
    def all_sources(self) -> dict[str, Group]:
        """{name: group of the source}, without what says how rows are made."""
        group = SOURCES.find(self.name).schema
        values = {name: getattr(self, name) for name in group.model_fields}
        return {self.name: group.model_construct(**values)}

    @property
    def all_weights(self) -> dict[str, float]:
        """{name: share of the rows}, not normalised."""
        return {self.name: 1.0}


class PythonStdlibData(PythonStdlibConfig, BatchConfig):
    """Batches of the standard library."""


class FilesData(FilesConfig, BatchConfig):
    """Batches of documents in files."""


class ProblemsData(ProblemsConfig, BatchConfig):
    """Batches of generated problems."""


class MixtureData(BatchConfig):
    """Batches of several sources; a weight is the source's share of the rows."""

    name: Literal['mixture'] = 'mixture'
    sources: dict[str, one_of(SOURCES)] = Field(min_length=1)
    # {source: weight}; they need not sum to one.
    weights: dict[str, Annotated[float, Field(gt=0)]]

    @model_validator(mode='after')
    def _check(self):
        if self.sources.keys() != self.weights.keys():
            odd = sorted(self.sources.keys() ^ self.weights.keys())
            sentence = (
                f'sources and weights must have the same names; only in one: {", ".join(odd)}'
            )
            paths = tuple((key, name) for name in odd for key in ('sources', 'weights'))
            raise ConflictError(Problem(paths, sentence))
        return self

    @property
    def all_sources(self):
        return self.sources

    @property
    def all_weights(self):
        return self.weights


DATA = Registry(
    {
        'python_stdlib': Entry('jaxfm.data.dataset:Dataset', PythonStdlibData),
        'files': Entry('jaxfm.data.dataset:Dataset', FilesData),
        'problems': Entry('jaxfm.data.dataset:Dataset', ProblemsData),
        'mixture': Entry('jaxfm.data.dataset:Dataset', MixtureData),
    },
    base=Group,
    beside=BatchConfig,
)
DataConfig = one_of(DATA)

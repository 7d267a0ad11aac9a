"""Data: from documents to batches of token ids, all on the host.

`sources` find and read documents. `corpus` tokenises them once, into a cache on disk; `streaming`
does so during training instead. `packing` decides which tokens a row holds, `order` and `mixture`
which row comes next. `loader` delivers batches of rows, and `dataset` combines all of this for one
phase of a run. Nothing here touches a device.
"""

import inspect
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, model_validator

from jaxfm.errors import ConfigError
from jaxfm.registry import Adapter, Entry, Registry, find_class, one_of
from jaxfm.schema import ConflictError, Group, Problem

Fraction = Annotated[float, Field(gt=0, lt=1)]


class PythonStdlibConfig(Group):
    """The running interpreter's standard library: text that every machine has."""

    name: Literal['python_stdlib'] = 'python_stdlib'
    # Fraction of the files to hold out, chosen by a hash of a file's path inside the library.
    heldout_fraction: Fraction = 0.05


class FieldsConfig(Group):
    """Where a record has its document: dotted paths (`instances.0.output`).

    If none of text, messages, prompt, completion and chosen is set, a record with `messages` or
    `conversations` is a chat, one with `prompt` and `completion` is a chat of these two, which has
    a label if `label` is true or false, one with `chosen` and `rejected` is a pair, and any other
    must have `text`.
    """

    text: str = ''
    messages: str = ''  # a list of turns; or a text, as that of `chosen`
    prompt: str = ''  # a user turn as text, or a list of turns; completion follows it
    completion: str = ''  # an assistant turn as text, or a list of turns
    # Of a pair: the better and the worse completion, or whole chats. Each is an assistant turn as
    # text after `prompt`; a list of turns; or a text with the turns '\n\nHuman:', '\n\nAssistant:'.
    chosen: str = ''
    rejected: str = ''
    label: str = ''  # true or false: whether the completion, or a chat's last turn, is wanted
    system: str = ''  # text of a system turn to put before the others
    tools: str = 'tools'  # a list of tools, or such a list as JSON text; may be absent
    role: str = ''  # key inside a turn; '' is role or from
    content: str = ''  # key inside a turn; '' is content or value
    # Meaning of other role names; human, gpt and similar ones are known.
    roles: dict[str, Literal['system', 'user', 'assistant', 'tool']] = {}
    group: str = ''  # a label; evaluations also report scores per group


class FilesConfig(Group):
    """Documents in files: plain text (one document per file), or records of texts or chats."""

    name: Literal['files'] = 'files'
    # Paths or globs (`**` too), local, s3://bucket/... or hf://datasets/ORG/NAME/...; .gz and .zst
    # are decompressed.
    path: str | list[str] = Field(min_length=1)
    # The held-out files; if set, heldout_fraction is ignored.
    heldout_path: str | list[str] = []
    # Fraction to hold out: text files by a hash of their path, records by a hash of their content.
    # If that puts all text files on one side (there is one big text, say), the tail of every file
    # is held out instead; if it picks none of a few records, one of them is held out.
    heldout_fraction: Fraction = 0.05
    # auto goes by the suffix: .jsonl, .parquet, .array_record (JSON records); others are text.
    format: Literal['auto', 'text', 'jsonl', 'parquet', 'array_record'] = 'auto'
    fields: FieldsConfig = FieldsConfig()
    # How many bad records (not JSON, a field is missing) to leave out; one more is an error.
    max_bad_records: int = Field(default=0, ge=0)


ProblemKind = Literal[
    'addition', 'subtraction', 'multiplication', 'reverse', 'rotate', 'last_letters'
]
CALCULATED = 'addition', 'subtraction', 'multiplication'  # kinds that a calculator solves


class ProblemsConfig(Group):
    """Generated problems with one right answer: arithmetic and string manipulation.

    A hash of the problem decides whether it is held out, so no phase trains on a held-out problem.
    """

    name: Literal['problems'] = 'problems'
    # pairs: chats with the right answer, and as the worse one with a wrong digit or letter.
    # calls: chats that ask a calculator, `[123*456]`, whose result is the user's next message.
    form: Literal['text', 'chat', 'pairs', 'calls'] = 'text'
    # [] is all kinds but multiplication, which small models do not learn; for calls, those that a
    # calculator solves. A kind that is listed twice is trained on twice as often.
    kinds: list[ProblemKind] = []
    num_problems: int = Field(default=100_000, ge=1)  # to train on
    num_heldout: int = Field(default=240, ge=1, le=10_000)
    seed: int = Field(default=0, ge=0, lt=2**32)  # selects problems from all possible ones

    @classmethod
    def find_conflicts(cls, parts: dict) -> list[Problem]:
        """Kinds that no calculator solves."""
        others = sorted(set(parts.get('kinds', ())) - set(CALCULATED))
        if parts.get('form') != 'calls' or not others:
            return []
        sentence = f'form calls has no {others[0]}: a calculator solves {", ".join(CALCULATED)}'
        return [Problem((('form',), ('kinds',)), sentence)]


class RandomAccessConfig(Group):
    """Documents of a class from outside with random access: any grain.RandomAccessDataSource.

    An element is a text (str, or bytes of UTF-8), or a record of a text or chat (a dict).
    """

    name: str
    # What the class is called with: class(**arguments).
    arguments: dict[str, JsonValue] = {}
    # Fraction of the elements to hold out, by a hash of their content; of few, at least one.
    heldout_fraction: Fraction = 0.05
    fields: FieldsConfig = FieldsConfig()
    # How many elements that are no documents to leave out; one more is an error.
    max_bad_records: int = Field(default=0, ge=0)

    @classmethod
    def find_conflicts(cls, parts: dict) -> list[Problem]:
        if not {'name', 'arguments'} <= parts.keys():
            return []
        try:
            signature = inspect.signature(find_class(parts['name']))
        except (
            ConfigError,
            ValueError,
        ):  # another check reports it, or it is not written in Python
            return []
        return _find_unfit(signature, parts['name'], parts['arguments'])


def _find_unfit(
    signature: inspect.Signature, name: str, arguments: dict[str, Any]
) -> list[Problem]:
    """The problems of calling a class with these arguments."""
    known = [f'{each}' for each in signature.parameters.values()]
    takes = f'{name} takes {", ".join(known) or "no arguments"}'
    names = {
        each.name for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD
    }
    has_others = len(names) < len(known)
    unknown = [each for each in arguments if each not in names and not has_others]
    if unknown:
        return [Problem.at(('arguments', each), f'no such argument: {takes}') for each in unknown]
    try:
        signature.bind(**arguments)
    except TypeError as error:
        return [Problem.at(('arguments',), f'{error}: {takes}')]
    return []


_RANDOM_ACCESS = Adapter(
    ('__len__', '__getitem__'),
    'random access (a grain.RandomAccessDataSource)',
    Entry('jaxfm.data.sources.random_access:RandomAccess', RandomAccessConfig),
)
SOURCES = Registry(
    {
        'python_stdlib': Entry('jaxfm.data.sources.python_stdlib:PythonStdlib', PythonStdlibConfig),
        'files': Entry('jaxfm.data.sources.files:Files', FilesConfig),
        'problems': Entry('jaxfm.data.sources.problems:Problems', ProblemsConfig),
    },
    base=Group,
    adapter=_RANDOM_ACCESS,
)


class BatchConfig(Group):
    """How documents become the rows of a batch."""

    # Tokens in a row of a batch.
    sequence_length: int = Field(ge=2)
    # Rows per step, over all hosts.
    batch_size: int = Field(ge=1)
    # concat: one stream of tokens, cut into rows. best_fit: documents side by side in a row, cut
    # only if longer than a row. none: one document per row. auto: concat for texts, best_fit for
    # chats, which are never cut.
    packing: Literal['auto', 'concat', 'best_fit', 'none'] = 'auto'
    # What to do with a chat longer than a row: stop the run, leave the chat out, or cut its end.
    too_long: Literal['error', 'drop', 'truncate'] = 'error'
    # cached: once before training, into a cache on disk; rows are shuffled over the whole corpus.
    # on_the_fly: during training; every process reads everything, in the order of the files.
    tokenize: Literal['cached', 'on_the_fly'] = 'cached'
    # A cache made by `python -m tools.corpus build`; '' is one in the user's cache directory.
    cache: str = ''

    @property
    def all_sources(self) -> dict[str, Group]:
        """{name: config of the source}, without the fields of BatchConfig."""
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
    adapter=_RANDOM_ACCESS,
)
DataConfig = one_of(DATA)

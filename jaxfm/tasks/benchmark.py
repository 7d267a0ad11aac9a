"""Benchmarks read from files: a table of names and fields, and a function from row to example.

Examples before a question (`shots`) are the first ones of another split, the same for all questions
(or for those of one subject), so that a sampler computes them once. A question is never among its
own examples.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable
from typing import Any

from jaxfm.errors import ConfigError, DataError
from jaxfm.tasks import FileTaskConfig
from jaxfm.tasks.base import Choice, Prompt, Task
from jaxfm.tasks.files import BadRow, Fields, Row, find_beside, find_files, merge_fields, read_rows
from jaxfm.tasks.final_answers import final_choice


@dataclasses.dataclass(frozen=True)
class Example:
    """A question, and what follows it where it is an example for other questions."""

    question: str  # ends where the answer begins
    worked: str  # begins with the white space between question and answer
    gold: Any = None  # what `evaluate` compares with
    group: str = ''
    introduction: str = ''  # comes before all examples; in a chat it is the system message
    choices: tuple[str, ...] = ()  # continuations of the question, white space first
    right: tuple[int, ...] = ()
    contexts: tuple[str, ...] = ()  # in place of the question, one for each choice
    id: str = ''  # of its row


@dataclasses.dataclass(frozen=True)
class Question(Prompt):
    """A prompt whose completion is compared with `gold`."""

    gold: Any = dataclasses.field(default=None, kw_only=True)


class Benchmark(Task):
    """A task over files. Subclasses set the table below, and write `parse` and `answer`.

    Raises:
      ConfigError: the config asks for what the benchmark does not have.
      MissingInputError: there is no such file.
      DataError: no record can be used, or there are fewer examples than `shots`.
    """

    name: str
    # Published names without suffix, or globs with one; the first that is there is used.
    files: tuple[str, ...]
    shot_files: tuple[str, ...] = ()  # the same for the split of the examples
    fields: Fields
    optional: tuple[str, ...] = ()  # fields that a record may lack
    columns: tuple[str, ...] = ()  # of its .csv, if that has no header
    shots_by_group = False  # examples come from the question's own group
    between = '\n\n'  # of examples
    # A completion of raw text ends before the first of these; a chat ends by itself.
    ends: tuple[str, ...] = ()
    unconditional = 'Answer:'  # see Choice
    has_chat_form = True
    has_shots = True  # its records have answers that can be shown

    def __init__(self, config: FileTaskConfig, documents: Iterable = ()):
        if config.chat and not self.has_chat_form:
            raise ConfigError(
                f'task {self.name} continues plain text: it has no form for chat=True'
            )
        if config.shots and not self.has_shots:
            raise ConfigError(
                f'task {self.name}: its records have no answers to show; shots must be 0, '
                f'not {config.shots}'
            )
        self.config = config
        examples = self.read_examples()
        shots = self.read_shots() if config.shots else []
        self._shots = {}
        for shot in shots:
            self._shots.setdefault(shot.group if self.shots_by_group else '', []).append(shot)
        self._prompts = [self._prompt(one) for one in choose(examples, config.num_prompts)]

    def parse(self, row: Row) -> Example:
        """The example of a row. Raises BadRow."""
        raise NotImplementedError

    def read_examples(self) -> list[Example]:
        """All questions, in the order of the files."""
        return self._read(self.config.path, self.files)

    def read_shots(self) -> list[Example]:
        """The examples to choose shots from, best ones first."""
        path = self.config.shots_path or find_beside(self.config.path, self.shot_files)
        if not path:
            beside = f' (there is no {self.shot_files[0]}.jsonl beside path)'
            raise ConfigError(
                f'task {self.name}: shots={self.config.shots} needs shots_path, a file with '
                f'examples{beside if self.shot_files else ""}'
            )
        return self._read(path, self.shot_files or self.files)

    def prompts(self) -> list[Prompt]:
        """The questions, chosen by a hash of their ids, in the order of the files."""
        return list(self._prompts)

    def evaluate(self, prompt: Prompt, completion: str) -> float:
        """1.0 if the completion's answer is the right one; else 0.0."""
        answer = self.answer(prompt, completion)
        return float(answer is not None and answer in self._right(prompt))

    def stop(self, prompt: Prompt, completion: str) -> bool:
        """Whether a completion of raw text has gone on to something else, such as a question."""
        return not prompt.messages and any(end in completion for end in self.ends)

    def answer(self, prompt: Prompt, completion: str) -> str | None:
        """Of choices, the one that the completion states or begins with; None if that is not clear.

        Subclasses parse other answers. Raw text ends where the next question would begin.

        Raises:
          ValueError: the choices have equal continuations, so only their likelihoods differ.
        """
        written = completion.strip()
        choices = [text.strip() for text in _continuations(prompt)]
        if len(set(choices)) < len(choices):
            raise ValueError(
                f'task {self.name}: the choices of {prompt.id} differ in their contexts, so they '
                "are compared by likelihood; evaluate with name='likelihood'"
            )
        if not prompt.messages:
            written = written.partition(self.between)[0]
        return final_choice(written, choices)

    def cut(self, prompt: Prompt, completion: str) -> str:
        """The completion up to where `stop` would have stopped it."""
        found = [completion.find(end) for end in self.ends if end in completion]
        return completion if prompt.messages or not found else completion[: min(found)]

    def _right(self, prompt: Prompt) -> list[str]:
        if isinstance(prompt, Choice):
            return [prompt.pairs[i][1].strip() for i in prompt.right]
        return [prompt.gold]

    def _read(self, path: str, names: tuple[str, ...]) -> list[Example]:
        files = find_files(self.name, path, names)
        fields = merge_fields(self.name, self.fields, self.config.fields)
        return read_rows(self.name, files, fields, self.optional, self._parse, self.columns)

    def _parse(self, row: Row) -> Example:
        return dataclasses.replace(self.parse(row), id=row.id)

    def _prompt(self, example: Example) -> Prompt:
        shots = self._shots_for(example)
        intro = example.introduction
        before = intro + ''.join(shot.question + shot.worked + self.between for shot in shots)
        messages = _messages(example, shots) if self.config.chat else ()
        text = before + example.question
        given = dict(id=example.id, text=text, messages=messages, group=example.group)
        if not example.choices:
            return Question(**given, gold=example.gold)
        # Choices share one text as context, because there may be many thousands of questions.
        contexts = [before + context for context in example.contexts] or itertools.repeat(text)
        # In a chat, the choice begins the assistant's turn.
        choices = [text.lstrip() if messages else text for text in example.choices]
        return Choice(
            **given,
            pairs=tuple(zip(contexts, choices)),
            right=example.right,
            unconditional=self.unconditional,
        )

    def _shots_for(self, example: Example) -> list[Example]:
        count = self.config.shots
        pool = self._shots.get(example.group if self.shots_by_group else '', [])
        others = (shot for shot in pool if shot.question != example.question)
        shots = list(itertools.islice(others, count))
        if len(shots) < count:
            of = f' of {example.group}' if self.shots_by_group else ''
            raise DataError(
                f'task {self.name}: shots={count}, but there are only {len(shots)} examples{of} '
                f'for question {example.id}'
            )
        return shots


def choose(examples: list[Example], count: int) -> list[Example]:
    """`count` examples chosen by a hash of their ids, in the given order; all for 0."""
    if not count:
        return examples
    ranked = sorted(examples, key=lambda one: hashlib.sha256(one.id.encode()).digest())
    chosen = {one.id for one in ranked[:count]}
    return [one for one in examples if one.id in chosen]


def _continuations(prompt: Prompt) -> list[str]:
    return [text for _, text in prompt.pairs] if isinstance(prompt, Choice) else []


def _messages(example: Example, shots: list[Example]) -> tuple[dict, ...]:
    turns = [('system', example.introduction.strip())] if example.introduction else []
    for shot in shots:
        turns += [('user', shot.question), ('assistant', shot.worked.strip())]
    turns.append(('user', example.question))
    return tuple({'role': role, 'content': content} for role, content in turns)


def options_of(value: Any) -> tuple[list[str], list[str]]:
    """(texts, labels) of a question's options in any published form. Raises BadRow.

    [text, ...], [{'text', 'label'}, ...] or {'text': [...], 'label': [...]}; without labels they
    are A, B, C and so on.
    """
    labels = [chr(ord('A') + i) for i in range(26)]
    if isinstance(value, dict) and isinstance(value.get('text'), list):
        texts, labels = value['text'], value.get('label', labels)
    elif isinstance(value, list) and all(isinstance(one, dict) for one in value):
        texts = [one.get('text') for one in value]
        labels = [str(one.get('label', labels[i])) for i, one in enumerate(value)]
    else:
        texts = value
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(t, str) for t in texts):
        raise BadRow(f'choices must be two texts or more, but are {value!r:.60}')
    return texts, [str(label) for label in labels[: len(texts)]]


def index_of(answer: Any, labels: list[str]) -> int:
    """The index of the right option, given as a label or as an index from 0. Raises BadRow.

    Where labels are numbers, a number is a label: of '1' and '2', 1 is the first.
    """
    is_number = isinstance(answer, int) and not isinstance(answer, bool)
    text = str(answer) if is_number else answer
    if text in labels:
        return labels.index(text)
    # Some files have the index as a text.
    if isinstance(text, str) and text.isdecimal() and not any(map(str.isdecimal, labels)):
        if int(text) < len(labels):
            return int(text)
    raise BadRow(f'answer {answer!r:.40} is none of {", ".join(labels)}')

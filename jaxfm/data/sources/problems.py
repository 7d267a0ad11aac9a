"""Generated problems with one right answer: arithmetic and strings, as lines of text or as chats.

Pre-training on the text form teaches the skills; fine-tuning on the chat form teaches when to use
them. A hash of kind and operands decides whether a problem is held out, so train and held-out
problems are disjoint over all forms, seeds and numbers of problems. Nothing is stored: documents
are a function of the config.
"""

import dataclasses
import hashlib
import random
import string
from collections.abc import Callable, Iterator

from jaxfm.data import CALCULATED, ProblemsConfig
from jaxfm.data.documents import Document
from jaxfm.data.sources import is_heldout

VERSION = 2  # raise it when anything below that determines the documents changes
HELDOUT_FRACTION = 1 / 16
PROBLEMS_PER_TEXT = 32
PROBLEMS_PER_SHARD = 1 << 15

# The answer follows its task at the same distance as in a chat with the template `qa`, so what a
# model learns about distances still holds in chats, and chats are quick to learn. The byte right
# before the answer differs, so that only chats teach where their answers begin.
TEXT = '{task} -->{answer}\n'
QUESTION = 'Please {task}'
CALL = '[{expression}]'

Operands = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A type of problem."""

    num_problems: int  # how many different operands `draw` may return
    draw: Callable[[random.Random], Operands]
    solve: Callable[..., str]
    task: str  # a format string for the operands; what is to be calculated is its second word
    is_easy: bool = True  # enough for small models to learn it


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem: its kind, its operands and the answer."""

    kind: str
    operands: Operands
    answer: str

    @property
    def task(self) -> str:
        """What to do, in words."""
        return KINDS[self.kind].task.format(*self.operands)

    @property
    def question(self) -> str:
        """What the user of a chat asks."""
        return QUESTION.format(task=self.task)

    @property
    def call(self) -> str:
        """How a calculator is asked."""
        return CALL.format(expression=self.task.partition(' ')[2])

    @property
    def text(self) -> str:
        """Task and answer as a line of text."""
        return TEXT.format(task=self.task, answer=self.answer)

    @property
    def wrong_answer(self) -> str:
        """The answer with one other digit or letter; always the same one."""
        rng = random.Random(self.text)
        place = rng.choice([i for i, letter in enumerate(self.answer) if letter.isalnum()])
        known = string.digits if self.answer[place].isdigit() else string.ascii_lowercase
        other = rng.choice([letter for letter in known if letter != self.answer[place]])
        return self.answer[:place] + other + self.answer[place + 1 :]

    @property
    def is_heldout(self) -> bool:
        """Whether this problem is held out; the same for every config."""
        return is_heldout(' '.join((self.kind, *self.operands)), HELDOUT_FRACTION)


@dataclasses.dataclass(frozen=True)
class Shard:
    """Documents [start, stop) of one side."""

    is_heldout: bool
    start: int
    stop: int


class Problems:
    """The source. Each train problem has a random kind; held-out ones take all kinds in turn."""

    def __init__(self, config: ProblemsConfig):
        self._config = config
        usual = CALCULATED if config.form == 'calls' else [k for k in KINDS if KINDS[k].is_easy]
        self._kinds = config.kinds or list(usual)
        self._per_document = PROBLEMS_PER_TEXT if config.form == 'text' else 1

    def files(self) -> None:
        """Does nothing: no input can be missing."""

    def fingerprint(self) -> str:
        """Hash of the config and of this module's version."""
        text = f'{VERSION} {self._config.model_dump_json(include=set(ProblemsConfig.model_fields))}'
        return hashlib.sha256(text.encode()).hexdigest()

    def shards(self) -> list[Shard]:
        """The train documents in several shards, then the held-out ones in one."""
        count = -(-self._config.num_problems // self._per_document)
        size = PROBLEMS_PER_SHARD // self._per_document
        train = [Shard(False, start, min(start + size, count)) for start in range(0, count, size)]
        return [*train, Shard(True, 0, -(-self._config.num_heldout // self._per_document))]

    def read(self, shard: Shard) -> Iterator[tuple[bool, Document]]:
        """Yields (is_heldout, document), in order."""
        heldout = self._heldout() if shard.is_heldout else []
        side = 'heldout' if shard.is_heldout else 'train'
        for number in range(shard.start, shard.stop):
            first = number * self._per_document
            problems = heldout[first : first + self._per_document] or self._train(number, first)
            yield shard.is_heldout, self._document(f'{side}:{number}', problems)

    def _train(self, number: int, first: int) -> list[Problem]:
        """The problems of train document `number`; its first one is problem `first` of them all."""
        rng = random.Random(f'{self._config.seed} {number}')
        count = min(self._per_document, self._config.num_problems - first)
        kinds = rng.choices(self._kinds, k=count)
        return [draw(kind, rng, heldout=False) for kind in kinds]

    def _heldout(self) -> list[Problem]:
        """All held-out problems, taking the kinds in turn; none occurs twice."""
        rngs = {kind: random.Random(f'{self._config.seed} {kind}') for kind in self._kinds}
        kinds, problems = list(rngs), {}
        while len(problems) < self._config.num_heldout:
            kind = kinds[len(problems) % len(kinds)]
            problems.setdefault(draw(kind, rngs[kind], heldout=True))
        return list(problems)

    def _document(self, name: str, problems: list[Problem]) -> Document:
        if self._config.form == 'text':
            return Document(name=name, text=''.join(problem.text for problem in problems))
        (problem,) = problems
        good, bad = (
            (
                {'role': 'user', 'content': problem.question},
                {'role': 'assistant', 'content': answer},
            )
            for answer in (problem.answer, problem.wrong_answer)
        )
        if self._config.form == 'calls':
            calls = {'role': 'assistant', 'content': problem.call}
            result = {'role': 'user', 'content': problem.answer}
            messages = good[0], calls, result, good[1]
            return Document(name=name, messages=messages, group=problem.kind)
        if self._config.form == 'chat':
            return Document(name=name, messages=good, group=problem.kind)
        return Document(name=name, messages=good, rejected=bad, num_given=1, group=problem.kind)


def draw(name: str, rng: random.Random, heldout: bool) -> Problem:
    """Draws a problem of one side whose question does not contain its answer."""
    kind = KINDS[name]
    while True:
        operands = kind.draw(rng)
        problem = Problem(name, operands, kind.solve(*operands))
        shown = problem.answer in problem.question.lower()
        if not shown and problem.is_heldout == heldout:
            return problem


def _numbers(rng: random.Random) -> Operands:
    return str(rng.randint(100_000, 999_999)), str(rng.randint(1, 9))


def _factors(rng: random.Random) -> Operands:
    return str(rng.randint(100, 999)), str(rng.randint(100, 999))


def _word(rng: random.Random) -> Operands:
    return (_letters(rng, 5, 6),)


def _words(rng: random.Random) -> Operands:
    return (' '.join(_letters(rng, 2, 4) for _ in range(4)),)


def _letters(rng: random.Random, shortest: int, longest: int) -> str:
    return ''.join(rng.choices(string.ascii_lowercase, k=rng.randint(shortest, longest)))


NUM_NUMBERS = 900_000 * 9
NUM_WORDS = sum(26**length for length in (5, 6))
NUM_FOUR_WORDS = sum(26**length for length in (2, 3, 4)) ** 4

KINDS = {
    'addition': Kind(
        num_problems=NUM_NUMBERS,
        draw=_numbers,
        solve=lambda a, b: str(int(a) + int(b)),
        task='sum {0}+{1}',
    ),
    'subtraction': Kind(
        num_problems=NUM_NUMBERS,
        draw=_numbers,
        solve=lambda a, b: str(int(a) - int(b)),
        task='sum {0}-{1}',
    ),
    'multiplication': Kind(
        num_problems=900 * 900,
        draw=_factors,
        solve=lambda a, b: str(int(a) * int(b)),
        task='multiply {0}*{1}',
        is_easy=False,
    ),
    'reverse': Kind(
        num_problems=NUM_WORDS,
        draw=_word,
        solve=lambda word: word[::-1],
        task='reverse {0}',
    ),
    'rotate': Kind(
        num_problems=NUM_WORDS,
        draw=_word,
        solve=lambda word: word[1:] + word[0],
        task='rotate {0}',
    ),
    'last_letters': Kind(
        num_problems=NUM_FOUR_WORDS,
        draw=_words,
        solve=lambda words: ''.join(word[-1] for word in words.split()),
        task='last letters of {0}',
    ),
}

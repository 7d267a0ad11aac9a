"""Generated problems with one right answer: arithmetic and strings, as lines of text or as chats.

The text form teaches the skills, several wordings a kind; the chat form asks for them in words that
the text never uses. A problem is held out by a hash of its kind and its operands, so train and
held-out problems are disjoint over all forms, seeds and numbers. Nothing is stored: documents are a
function of the config.
"""

import dataclasses
import hashlib
import random
import string
from collections.abc import Callable, Iterator

from jaxfm.data import ProblemsConfig
from jaxfm.data.documents import Document

VERSION = 1  # of everything below that decides the documents
HELDOUT_ONE_IN = 16
PROBLEMS_PER_TEXT = 32
PROBLEMS_PER_SHARD = 1 << 15

Operands = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A type of problem. Wordings are formats of the operands."""

    num_problems: int  # how many operands `draw` chooses from
    draw: Callable[[random.Random], Operands]
    solve: Callable[..., str]
    texts: tuple[str, ...]
    chat: str

    def question(self, operands: Operands) -> str:
        """What the user of a chat asks."""
        return self.chat.format(*operands)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A kind, what it is about, and the answer."""

    kind: str
    operands: Operands
    answer: str

    @property
    def is_heldout(self) -> bool:
        """The side of this problem, whatever asks for it."""
        digest = hashlib.sha256(' '.join((self.kind, *self.operands)).encode()).digest()
        return digest[0] % HELDOUT_ONE_IN == 0


@dataclasses.dataclass(frozen=True)
class Shard:
    """Documents start .. stop - 1 of one side."""

    is_heldout: bool
    start: int
    stop: int


class Problems:
    """The source. Its kinds are drawn with equal chances; the held-out ones are as many of each."""

    def __init__(self, config: ProblemsConfig):
        self._config = config
        self._kinds = list(dict.fromkeys(config.kinds or KINDS))
        self._per_document = PROBLEMS_PER_TEXT if config.form == 'text' else 1

    def files(self) -> None:
        """Nothing can be absent."""

    def fingerprint(self) -> str:
        """Of the config and of this module's version."""
        text = f'{VERSION} {self._config.model_dump_json(include=set(ProblemsConfig.model_fields))}'
        return hashlib.sha256(text.encode()).hexdigest()

    def shards(self) -> list[Shard]:
        """The train documents in pieces, then the held-out ones."""
        count = -(-self._config.num_problems // self._per_document)
        size = PROBLEMS_PER_SHARD // self._per_document
        train = [Shard(False, start, min(start + size, count)) for start in range(0, count, size)]
        return [*train, Shard(True, 0, -(-self._config.num_heldout // self._per_document))]

    def read(self, shard: Shard) -> Iterator[tuple[bool, Document]]:
        """(is_heldout, document), in order."""
        heldout = self._heldout() if shard.is_heldout else []
        side = 'heldout' if shard.is_heldout else 'train'
        for number in range(shard.start, shard.stop):
            first = number * self._per_document
            name = f'{side}:{number}'
            rng = random.Random(f'{self._config.seed} {name}')
            problems = heldout[first : first + self._per_document] or self._train(first, rng)
            yield shard.is_heldout, self._document(name, problems, rng)

    def _train(self, first: int, rng: random.Random) -> list[Problem]:
        """The problems of the document that begins with problem `first`."""
        count = min(self._per_document, self._config.num_problems - first)
        kinds = rng.choices(self._kinds, k=count)
        return [draw(kind, rng, is_heldout=False) for kind in kinds]

    def _heldout(self) -> list[Problem]:
        """All held-out problems, the kinds in turn; none twice."""
        rngs = {kind: random.Random(f'{self._config.seed} {kind}') for kind in self._kinds}
        problems = {}
        while len(problems) < self._config.num_heldout:
            kind = self._kinds[len(problems) % len(self._kinds)]
            problems.setdefault(draw(kind, rngs[kind], is_heldout=True))
        return list(problems)

    def _document(self, name: str, problems: list[Problem], rng: random.Random) -> Document:
        if self._config.form == 'text':
            return Document(name=name, text=''.join(_line(problem, rng) for problem in problems))
        (problem,) = problems
        question = KINDS[problem.kind].question(problem.operands)
        turns = (('user', question), ('assistant', problem.answer))
        messages = tuple({'role': role, 'content': content} for role, content in turns)
        return Document(name=name, messages=messages, group=problem.kind)


def draw(name: str, rng: random.Random, is_heldout: bool) -> Problem:
    """A problem of one side whose answer does not stand in its question."""
    kind = KINDS[name]
    while True:
        operands = kind.draw(rng)
        problem = Problem(name, operands, kind.solve(*operands))
        shown = problem.answer in kind.question(operands).lower()
        if not shown and problem.is_heldout == is_heldout:
            return problem


def _line(problem: Problem, rng: random.Random) -> str:
    wording = rng.choice(KINDS[problem.kind].texts)
    return f'{wording.format(*problem.operands)}{problem.answer}\n'


def _numbers(rng: random.Random) -> Operands:
    return str(rng.randint(100_000, 999_999)), str(rng.randint(1, 9))


def _word(rng: random.Random) -> Operands:
    return (_letters(rng, 5, 7),)


def _words(rng: random.Random) -> Operands:
    return (' '.join(_letters(rng, 2, 4) for _ in range(4)),)


def _letters(rng: random.Random, shortest: int, longest: int) -> str:
    return ''.join(rng.choices(string.ascii_lowercase, k=rng.randint(shortest, longest)))


NUM_NUMBERS = 900_000 * 9
NUM_WORDS = sum(26**length for length in (5, 6, 7))
NUM_FOUR_WORDS = sum(26**length for length in (2, 3, 4)) ** 4

KINDS = {
    'addition': Kind(
        num_problems=NUM_NUMBERS,
        draw=_numbers,
        solve=lambda a, b: str(int(a) + int(b)),
        texts=('{0}+{1}=', '{0} and {1} make ', 'sum of {0}, {1}: ', 'adding {1} to {0} gives '),
        chat='What is {0} plus {1}?',
    ),
    'subtraction': Kind(
        num_problems=NUM_NUMBERS,
        draw=_numbers,
        solve=lambda a, b: str(int(a) - int(b)),
        texts=('{0}-{1}=', '{0} less {1} is ', 'from {0} take {1}: ', 'taking {1} off {0} leaves '),
        chat='What is {0} minus {1}?',
    ),
    'reverse': Kind(
        num_problems=NUM_WORDS,
        draw=_word,
        solve=lambda word: word[::-1],
        texts=('reverse {0}=', '{0} backwards is ', 'flip: {0} -> ', 'the mirror of {0} reads '),
        chat='Spell {0} from right to left.',
    ),
    'rotate': Kind(
        num_problems=NUM_WORDS,
        draw=_word,
        solve=lambda word: word[1:] + word[0],
        texts=('rotate {0}=', '{0} turned left is ', 'roll: {0} -> ', 'the rotation of {0} reads '),
        chat='Move the first letter of {0} to its end.',
    ),
    'sort': Kind(
        num_problems=NUM_WORDS,
        draw=_word,
        solve=lambda word: ''.join(sorted(word)),
        texts=('sort {0}=', '{0} sorted is ', 'order: {0} -> ', 'the alphabet of {0} reads '),
        chat='Put the letters of {0} in order.',
    ),
    'last_letters': Kind(
        num_problems=NUM_FOUR_WORDS,
        draw=_words,
        solve=lambda words: ''.join(word[-1] for word in words.split()),
        texts=('ends {0}=', '{0} end in ', 'tails: {0} -> ', 'the endings of {0} read '),
        chat='Join the last letters of {0}.',
    ),
}

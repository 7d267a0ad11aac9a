"""Sums of whole numbers, generated from a seed; difficulty is the number of terms and of digits."""

import hashlib
import itertools
import random

from jaxfm.tasks.benchmark import Benchmark, Example
from jaxfm.tasks.final_answers import final_number

# Draws without a new problem, after which a difficulty is taken to have no more.
PATIENCE = 1000


class Arithmetic(Benchmark):
    """Problems in equal numbers per difficulty, whose group is '<terms>x<digits>', such as '3x2'.

    A hash of the terms decides whether a problem is in the split `train` or `test`, so the two
    never share one, whatever the seeds. Examples are always from `train`.
    """

    name = 'arithmetic'
    ends = ('Question:',)
    shots_by_group = True

    def read_examples(self) -> list[Example]:
        """The problems, taking the difficulties in turn; fewer where there are not so many."""
        config = self.config
        turns = [self._draw(*level, config.split) for level in _levels(config)]
        in_turn = (one for turn in itertools.zip_longest(*turns) for one in turn if one)
        return list(itertools.islice(in_turn, config.num_prompts))

    def read_shots(self) -> list[Example]:
        """Problems of the split `train`, one more than needed."""
        count, levels = self.config.shots + 1, _levels(self.config)
        drawn = (itertools.islice(self._draw(*level, 'train'), count) for level in levels)
        return list(itertools.chain(*drawn))

    def answer(self, prompt, completion: str) -> str | None:
        """The number that the completion ends up with, in a normal form."""
        return final_number(self.cut(prompt, completion))

    def _draw(self, terms: int, digits: int, split: str):
        """Yields different problems of one difficulty until no new one is found."""
        group = f'{terms}x{digits}'
        rng, seen, misses = random.Random(f'{self.config.seed} {group} {split}'), set(), 0
        lowest = 0 if digits == 1 else 10 ** (digits - 1)
        while misses < PATIENCE:
            numbers = tuple(rng.randrange(lowest, 10**digits) for _ in range(terms))
            problem = ' + '.join(map(str, numbers))
            if problem in seen or _split_of(problem) != split:
                misses += 1
                continue
            seen.add(problem)
            misses = 0
            yield self._example(problem, sum(numbers), group)

    def _example(self, problem: str, total: int, group: str) -> Example:
        question = self.config.question.replace('{sum}', problem)
        worked = f'{self.config.separator}{total}'
        return Example(question, worked, str(total), group=group, id=f'arithmetic:{problem}')


def _levels(config) -> list[tuple[int, int]]:
    return [(terms, digits) for digits in config.digits for terms in config.terms]


def _split_of(problem: str) -> str:
    """One problem of four is in the test split."""
    return 'test' if hashlib.sha256(problem.encode()).digest()[0] < 64 else 'train'

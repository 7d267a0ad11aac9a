"""HumanEval and MBPP: Python programs judged by running their tests. No security boundary.

See `execution.py` for the limits of a program.
"""

import re

from jaxfm.errors import DataError
from jaxfm.tasks.base import Task
from jaxfm.tasks.benchmark import Benchmark, Example, Question
from jaxfm.tasks.execution import Result, run_program
from jaxfm.tasks.files import BadRow, Row

BLOCK = re.compile(r'```(?:[Pp]ython3?|py)?[ \t]*\n(.*?)(?:```|\Z)', re.DOTALL)


class Programs(Benchmark):
    """A benchmark whose `gold` is a function from completion to program with tests."""

    # Two programs are seldom the same text, so there is nothing to vote on.
    answer = Task.answer

    def evaluate(self, prompt: Question, completion: str) -> float:
        """1.0 if the program passes its tests within the limits; else 0.0."""
        return float(self.run(prompt, completion).passed)

    def run(self, prompt: Question, completion: str) -> Result:
        """Runs the completed program with its tests."""
        source = self.program(prompt, completion)
        return run_program(source, self.config.seconds, self.config.memory_mb)

    def program(self, prompt: Question, completion: str) -> str:
        """The whole program: the completed code, then the tests."""
        raise NotImplementedError


def last_block(text: str) -> str | None:
    """The code of the last fenced block; None if there is none."""
    found = BLOCK.findall(text)
    return found[-1] if found else None


class HumanEval(Programs):
    """HumanEval (Chen et al. 2021): the body of a function after its signature and docstring.

    A chat's answer is its last code block: the whole function, or only the body.
    """

    name = 'humaneval'
    files = ('HumanEval',)
    fields = {
        'id': ('task_id',),
        'prompt': ('prompt',),
        'entry_point': ('entry_point',),
        'solution': ('canonical_solution',),
        'test': ('test',),
    }
    optional = ('solution',)
    ends = ('\nclass', '\ndef', '\n#', '\nif', '\nprint')

    def parse(self, row: Row) -> Example:
        header, name = row.text('prompt'), row.text('entry_point')
        test = f'{row.text("test")}\ncheck({name})\n'
        asked = header
        if self.config.chat:
            asked = (
                'Write a solution to the following problem and make sure that it passes the tests:'
                f'\n```python\n{header.strip()}\n```'
            )
        return Example(asked, str(row.get('solution', '')), gold=(header, test))

    def program(self, prompt: Question, completion: str) -> str:
        header, test = prompt.gold
        if not prompt.messages:
            return f'{header}{self.cut(prompt, completion)}\n{test}'
        code = last_block(completion)
        code = completion if code is None else code
        # A whole function comes after the header, whose imports and helpers it may use.
        return f'{header}\n{code}\n{test}'


class Mbpp(Programs):
    """MBPP (Austin et al. 2021): a function from one sentence and its tests.

    In the file of all 974 problems, the test split is task_id 11 to 510, and 1 to 10 are examples,
    of which 2, 3 and 4 come first, as in the paper.
    """

    name = 'mbpp'
    files = ('mbpp', 'sanitized-mbpp', 'test')
    fields = {
        'id': ('task_id',),
        'text': ('text', 'prompt'),
        'code': ('code',),
        'tests': ('test_list',),
        'setup': ('test_setup_code', 'test_imports'),
    }
    optional = ('setup',)
    ends = ('[DONE]',)

    def parse(self, row: Row) -> Example:
        tests = row['tests']
        if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
            raise BadRow(f'tests must be a list of texts, but is {tests!r:.40}')
        setup = row.get('setup', '')
        setup = '\n'.join(setup) if isinstance(setup, list) else setup
        if not isinstance(setup, str):
            raise BadRow(f'setup must be a text or a list of texts, but is {setup!r:.40}')
        question = (
            f'You are an expert Python programmer, and here is your task: {row.text("text")} '
            f'Your code should pass these tests:\n\n{"\n".join(tests)}\n[BEGIN]\n'
        )
        code = row.text('code').replace('\r\n', '\n')
        return Example(question, f'{code}\n[DONE]', gold=(setup, '\n'.join(tests)))

    def read_examples(self) -> list[Example]:
        """The problems of the test split; all of a file whose ids are no numbers.

        Raises:
          DataError: the file has another split.
        """
        examples = super().read_examples()
        test = [one for one in examples if not one.id.isdecimal() or 11 <= int(one.id) <= 510]
        if not test:
            ids = sorted(int(one.id) for one in examples)
            raise DataError(
                f'task mbpp: {self.config.path} has task_id {ids[0]} to {ids[-1]}, but the test '
                'split is 11 to 510: name the file of all problems, or of that split'
            )
        return test

    def read_shots(self) -> list[Example]:
        """Problems 2, 3 and 4, then the others of the first ten, if the file has them."""
        path = self.config.shots_path or self.config.path
        examples = self._read(path, self.files)
        few = [one for one in examples if one.id.isdecimal() and int(one.id) <= 10] or examples
        return sorted(few, key=lambda one: one.id not in ('2', '3', '4'))

    def program(self, prompt: Question, completion: str) -> str:
        setup, tests = prompt.gold
        code = self.cut(prompt, completion)
        if prompt.messages:
            code = last_block(code) or code.partition('[BEGIN]')[2].partition('[DONE]')[0] or code
        # After the code, because a setup may use its classes.
        return f'{code}\n{setup}\n{tests}\n'

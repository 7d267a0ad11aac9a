"""GSM8K and MATH: problems in words whose final answer is checked."""

import threading

from jaxfm.storage.find import extra
from jaxfm.tasks.benchmark import Benchmark, Example
from jaxfm.tasks.files import BadRow, Row
from jaxfm.tasks.final_answers import final_number, last_boxed

# Seconds for reading an answer and for comparing two; math-verify's own default.
SECONDS = 5
# Characters of an answer. Longer ones are no answers, and can keep a parser busy for minutes.
LONGEST = 400


class Gsm8k(Benchmark):
    """GSM8K (Cobbe et al. 2021). Answers are plain numbers, so they need no package to compare."""

    name = 'gsm8k'
    files, shot_files = ('test',), ('train',)
    fields = {'question': ('question',), 'answer': ('answer',)}
    ends = ('Question:',)

    def parse(self, row: Row) -> Example:
        worked = row.text('answer')
        gold = final_number(worked) if '####' in worked else None
        if gold is None:
            raise BadRow("answer must end with '#### NUMBER'")
        return Example(f'Question: {row.text("question")}\nAnswer:', f' {worked}', gold)

    def answer(self, prompt, completion: str) -> str | None:
        """The number that the completion ends up with, in a normal form."""
        return final_number(self.cut(prompt, completion))


class Math(Benchmark):
    """MATH (Hendrycks et al. 2021), with math-verify to compare answers; groups are its types.

    Raises:
      MissingInputError: math-verify is not installed.
    """

    name = 'math'
    files, shot_files = ('test', 'test500'), ('train',)
    fields = {
        'problem': ('problem',),
        'solution': ('solution',),
        'group': ('type', 'subject'),
        'id': ('unique_id',),
    }
    optional = ('group', 'id')
    ends = ('Problem:',)

    def __init__(self, config, documents=()):
        self._verifier = extra('math_verify', 'math')
        super().__init__(config, documents)

    def parse(self, row: Row) -> Example:
        solution = row.text('solution')
        gold = last_boxed(solution)
        if not gold:
            raise BadRow(r'solution has no \boxed{...}')
        question = f'Problem:\n{row.text("problem")}\n\nSolution:'
        return Example(question, f' {solution}', gold, group=row.get('group', ''))

    def evaluate(self, prompt, completion: str) -> float:
        """1.0 if math-verify finds the completion's final answer equal to the solution's."""
        given = self._read_answer(self.cut(prompt, completion))
        gold = self._verifier.parse(f'\\boxed{{{prompt.gold}}}', **_limit('parsing_timeout'))
        return float(self._verifier.verify(gold, given, **_limit('timeout_seconds')))

    def answer(self, prompt, completion: str) -> str | None:
        """The final answer as math-verify reads it, decimals as fractions: '1/2' for 0.5."""
        found = self._read_answer(self.cut(prompt, completion))
        if found and hasattr(found[0], 'atoms'):
            sympy = extra('sympy', 'math')
            exact = {number: sympy.Rational(str(number)) for number in found[0].atoms(sympy.Float)}
            return str(found[0].xreplace(exact))
        return str(found[0]) if found else None

    def _read_answer(self, text: str) -> list:
        boxed = last_boxed(text)
        if boxed is None:
            # Answers come last; what is before only costs time.
            text = text[-LONGEST:]
        elif len(boxed) > LONGEST:
            return []
        else:
            text = f'\\boxed{{{boxed}}}'
        return self._verifier.parse(text, **_limit('parsing_timeout'))


def _limit(name: str) -> dict[str, int | None]:
    """math-verify's time limit, kept by a signal, so that in other threads there is none."""
    is_main = threading.current_thread() is threading.main_thread()
    return {name: SECONDS if is_main else None}

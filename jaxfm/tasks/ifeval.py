"""IFEval (Zhou et al. 2023): instructions that a program can check; all must be followed."""

import difflib
import inspect

from jaxfm.storage.find import extra
from jaxfm.tasks.base import Task
from jaxfm.tasks.benchmark import Benchmark, Example
from jaxfm.tasks.files import BadRow, Row
from jaxfm.tasks.instructions import BY_LANGUAGE, KINDS, variants


class IfEval(Benchmark):
    """The prompt-level score: 1 if all instructions of a prompt are followed.

    `form='strict'` judges the response as it is; `loose` also accepts it without its first line,
    its last line, and stars.

    Raises:
      MissingInputError: a prompt is about languages, and langdetect is not installed.
    """

    name = 'ifeval'
    files = ('input_data', 'input', 'train')
    fields = {
        'id': ('key',),
        'prompt': ('prompt',),
        'instructions': ('instruction_id_list',),
        'arguments': ('kwargs',),
    }
    has_shots = False
    # Responses have no answer to vote on.
    answer = Task.answer

    def parse(self, row: Row) -> Example:
        kinds, arguments = row['instructions'], row['arguments']
        if not isinstance(kinds, list) or not isinstance(arguments, list) or not kinds:
            raise BadRow('instruction_id_list and kwargs must be lists, and not empty')
        if len(kinds) != len(arguments):
            raise BadRow(f'{len(kinds)} instructions, but {len(arguments)} kwargs')
        gold = tuple(_instruction(kind, given) for kind, given in zip(kinds, arguments))
        return Example(row.text('prompt'), '', gold)

    def evaluate(self, prompt, completion: str) -> float:
        """1.0 if the completion follows all instructions; 0.0 if not, or if it is empty."""
        loose = self.config.form == 'loose'
        texts = variants(completion) if loose else [completion]
        texts = [text for text in texts if text.strip()]
        return float(
            all(any(KINDS[kind](text, **given) for text in texts) for kind, given in prompt.gold)
        )


def _instruction(kind: str, given: dict) -> tuple[str, dict]:
    """(kind, its arguments without those that are null). Raises BadRow."""
    if kind not in KINDS:
        close = difflib.get_close_matches(str(kind), KINDS, 1)
        hint = f'; did you mean {close[0]}?' if close else ''
        raise BadRow(f'unknown instruction {kind!r}{hint}')
    given = given if isinstance(given, dict) else {}
    given = {key: value for key, value in given.items() if value is not None}
    wanted = list(inspect.signature(KINDS[kind]).parameters)[1:]
    if set(given) != set(wanted):
        has = ', '.join(given) or 'nothing'
        raise BadRow(f'{kind} takes {", ".join(wanted) or "no arguments"}; kwargs has: {has}')
    if kind in BY_LANGUAGE:
        extra('langdetect', 'ifeval')
    return kind, given

"""A Python tool: runs a program in a process of its own, and shows what it prints.

Each call is a program of its own: nothing is left of the one before. `jaxfm.tasks.execution` tells
what the limits stop and what they do not: they are no security boundary.
"""

from jaxfm.environments.tool import Tool
from jaxfm.tasks.execution import run_program


class Python(Tool):
    """The tool; its config has the marks of a call and the limits of a program."""

    name = 'python'
    argument = 'code'
    description = 'Runs a Python program and shows what it prints.'
    of_argument = 'The whole program, which prints its results.'

    def answer(self, asked: str) -> str:
        """What the program prints, and in a last line the reason if it fails."""
        config = self.config
        shown = config.max_characters
        # One more tells whether there is more. A letter of UTF-8 has up to four bytes.
        result = run_program(asked, config.seconds, config.memory_mb, max_output=4 * (shown + 1))
        printed = result.output
        if len(printed) > shown:
            printed = f'{printed[:shown]}... (cut)'
        parts = [printed.rstrip('\n')] if printed.strip() else []
        if not result.passed:
            parts.append(f'error: {result.reason}')
        return '\n'.join(parts) or 'the program printed nothing'

"""Helpers shared by all command lines: a parser that raises UsageError, and bounded numbers."""

import argparse
import difflib
import math
from collections.abc import Callable

from jaxfm.errors import UsageError


class Parser(argparse.ArgumentParser):
    """Raises UsageError, with the usage line appended, where argparse would exit the process."""

    def parse_args(self, args=None, namespace=None):
        flags, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f'unrecognized arguments: {" ".join(unknown)}{self._suggest(unknown[0])}')
        return flags

    def _suggest(self, argument: str) -> str:
        """'; did you mean --FLAG?' if a flag of this parser is close to the argument."""
        name = argument.partition('=')[0]
        known = [flag for flag in self._option_string_actions if flag.startswith('--')]
        close = difflib.get_close_matches(name, known, 1) if name.startswith('--') else []
        return f'; did you mean {close[0]}?' if close else ''

    def error(self, message):
        raise UsageError(f'{message}\n{self.format_usage().strip()}')


def number(kind: type, least: float, end: float = math.inf) -> Callable:
    """The `type` of a flag for a number in [least, end)."""

    def read(text: str):
        value = kind(text)
        if not least <= value < end:
            wanted = f'at least {least}' if end == math.inf else f'in [{least}, {end})'
            raise argparse.ArgumentTypeError(f'must be {wanted}, got {text}')
        return value

    read.__name__ = kind.__name__  # argparse shows this name if the text is not a number
    return read

"""Helpers shared by all command lines: a parser that raises UsageError, and bounded numbers."""

import argparse
import math
from collections.abc import Callable

from jaxfm.errors import UsageError


class Parser(argparse.ArgumentParser):
    """Raises UsageError, with the usage line appended, where argparse would exit the process."""

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

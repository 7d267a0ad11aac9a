r"""Finds the final answer in a completion: `#### 18`, the last `\boxed{18}`, or the last number."""

import re

# A minus after a digit, a letter or a bracket is an operator. Commas count between groups of three.
NUMBER = re.compile(
    r'(?P<minus>(?<![0-9A-Za-z_)\]}])[-\u2212])?\$?'
    r'(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)'
)
MARK = '####'
BOX = re.compile(r'\\boxed\s*\{')


def final_number(text: str) -> str | None:
    """The number that a text ends up with, in a normal form ('1,250.50' -> '1250.5'), or None.

    The number after the last `####` counts, else the one in the last box, else the last one.
    """
    if MARK in text:
        marked = _numbers(text.rpartition(MARK)[2].split('\n')[0])
        return marked[0] if marked else None
    inside = last_boxed(text)
    found = _numbers(text if inside is None else inside)
    return found[-1] if found else None


def last_boxed(text: str) -> str | None:
    r"""What is inside the last complete \boxed{...}, whose braces may be nested, or None."""
    for match in reversed(list(BOX.finditer(text))):
        depth = 1
        for i in range(match.end(), len(text)):
            # A brace after a backslash is a sign of a set, not of a group.
            if text[i] in '{}' and text[i - 1] != '\\':
                depth += 1 if text[i] == '{' else -1
            if not depth:
                return text[match.end() : i].strip()
    return None


def _numbers(text: str) -> list[str]:
    return [_normal(match) for match in NUMBER.finditer(text)]


def _normal(match: re.Match) -> str:
    # As text: Python refuses to convert numbers of more than 4300 digits.
    whole, _, fraction = match['number'].replace(',', '').partition('.')
    number = f'{whole.lstrip("0") or "0"}.{fraction.rstrip("0")}'.rstrip('.')
    return f'-{number}' if match['minus'] and number != '0' else number

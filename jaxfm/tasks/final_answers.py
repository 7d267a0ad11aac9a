r"""Finds the final answer in a completion: `#### 18`, the last `\boxed{18}`, or the last number.

Of choices it is the one that the completion states ("the answer is B"), or begins with.
"""

import re
from collections.abc import Sequence

# A minus after a digit, a letter or a bracket is an operator. Commas count between groups of three.
NUMBER = re.compile(
    r'(?P<minus>(?<![0-9A-Za-z_)\]}])[-\u2212])?\$?'
    r'(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)'
)
MARK = '####'
# "the answer is", "Answer:"; but not after "I do not think that", "it is not clear whether".
_STATED = re.compile(r'\banswer(?:\W{0,4}is\b:?|\W{0,2}:)', re.IGNORECASE)
_DOUBTED = re.compile(
    r"(?:n['\u2019]t|\bnot)(?: (?:think|believe|say|mean|true|clear|sure|certain))?"
    r'(?: that| if| whether)? the (?:\w+ )?$'
)
# What a choice is written in, and how it ends: "(B)", "**B**", "B, because".
_OPENING = r'[\s(*"\[]*'
_END = r'(?=[ \t]*(?:$|[,;:!?)\]*"\n]|\.(?!\w)|because\b|since\b))'
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


def final_choice(text: str, choices: Sequence[str]) -> str | None:
    """The choice, a letter or a text, that a completion states last, else begins with, or None.

    None also where it is not clear that one choice is meant, such as "A or B", or "A man walks".
    """
    found, is_stated = None, False
    for match in _STATED.finditer(text):
        if _DOUBTED.search(text, 0, match.start()):
            continue
        line = text[match.end() :].lstrip(' *').lstrip().split('\n')[0]
        named = _named(re.split(r'[.!?]\s', line)[0], choices)
        chosen, rest = _leading(line, choices)
        if chosen is not None and not _goes_on(rest, chosen, choices):
            found, is_stated = chosen, True
        elif named:
            found, is_stated = None, True
    if is_stated:
        return found
    chosen, rest = _leading(text, choices)
    others = '|'.join(re.escape(other) for other in choices if other != chosen)
    is_list = others and re.search(rf'\n{_OPENING}(?:{others}){_END}', rest)
    # "A. B. C." names several, too.
    clear = not is_list and not _goes_on(rest.lstrip('.):* '), chosen, choices)
    return chosen if clear else None


def _leading(text: str, choices: Sequence[str]) -> tuple[str | None, str]:
    """-> the longest choice that a text begins with, as whole words, and the text after it."""
    for choice in sorted(choices, key=len, reverse=True):
        end = _END if choice[-1:].isalnum() else ''
        if match := re.match(f'{_OPENING}{re.escape(choice)}{end}', text):
            return choice, text[match.end() :]
    return None, text


def _goes_on(rest: str, chosen: str | None, choices: Sequence[str]) -> bool:
    """Whether the sentence after a choice names another one."""
    return bool(_named(re.split(r'[.!?](?!\w)|\n', rest)[0], choices) - {chosen})


def _named(text: str, choices: Sequence[str]) -> set[str]:
    """The choices that occur in a text as whole words; "A man" has an article, and no choice."""
    article = {'A': r'(?! [a-z])'}
    return {
        choice
        for choice in choices
        if re.search(rf'(?<!\w){re.escape(choice)}(?!\w){article.get(choice, "")}', text)
    }


def _numbers(text: str) -> list[str]:
    return [_normal(match) for match in NUMBER.finditer(text)]


def _normal(match: re.Match) -> str:
    # As text: Python refuses to convert numbers of more than 4300 digits.
    whole, _, fraction = match['number'].replace(',', '').partition('.')
    number = f'{whole.lstrip("0") or "0"}.{fraction.rstrip("0")}'.rstrip('.')
    return f'-{number}' if match['minus'] and number != '0' else number

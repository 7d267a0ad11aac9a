"""The part of a completion that is graded: what comes after the thinking."""

START, END = '<think>', '</think>'


def visible(text: str, start: str = START, end: str = END, begun: bool = False) -> str | None:
    """The text after the last `end`, without leading white space; None if thinking is unclosed.

    A text without thinking is returned as it is.

    begun: the prompt already ends with `start`, so the text begins inside the thinking.
    """
    before, found, rest = text.rpartition(end)
    if start in rest or (begun and not found):
        return None
    return rest.lstrip() if found else text

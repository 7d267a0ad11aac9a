"""Completing Python functions: real headers from held-out files, scored by whether the code parses.

A completion is cut at the first dedent: the first line, outside brackets and strings, whose code
starts no further right than `def`. It scores 1 if the header and the cut completion parse and the
body has at least two statements that do something.
"""

import ast
import dataclasses
import hashlib
import io
import logging
import re
import warnings
from collections.abc import Iterable, Iterator

from jaxfm.errors import DataError
from jaxfm.tasks import PythonFunctionsConfig
from jaxfm.tasks.base import Prompt, Task

log = logging.getLogger('jaxfm')

# The lexemes needed to find the newlines that end statements. The text may stop anywhere, so an
# unterminated string extends to the end of the line, or if triple-quoted, to the end of the text.
LEXEMES = re.compile(
    r"""
    (?P<comment> \#[^\n]* )
  | (?P<long_string> (?P<long> \"{3} | '{3} ) (?: \\. | . )*? (?: (?P=long) | \Z ) )
  | (?P<string> (?P<quote> ["'] ) (?: \\. | [^\\\n] )*? (?: (?P=quote) | (?=\n) | \Z ) )
  | (?P<continuation> \\\r?\n )
  | (?P<newline> \n )
  | (?P<open> [(\[{] )
  | (?P<close> [)\]}] )
  | (?P<colon> : )
    """,
    re.VERBOSE | re.DOTALL,
)
# The indentation of a line, and the first character of its code if it has any.
LINE_START = re.compile(r'([ \t\f]*)([^\s#])?')


@dataclasses.dataclass(frozen=True)
class FunctionPrompt(Prompt):
    """A text that ends with a function header; `header` is that part, with its indentation."""

    header: str = dataclasses.field(kw_only=True)

    @property
    def indentation(self) -> int:
        """Number of columns before `def`."""
        return _column(LINE_START.match(self.header)[1])


class PythonFunctions(Task):
    """The task over texts, which have `.name` and `.text`.

    Raises:
      DataError: no text contains a function.
    """

    continues_documents = True  # a prompt comes from the middle of one, so it has no BOS token

    def __init__(self, config: PythonFunctionsConfig, documents: Iterable):
        found = [
            prompt
            for document in documents
            for prompt in _function_prompts(document.name, document.text, config.context_lines)
        ]
        if not found:
            raise DataError('task python_functions: no Python function in the documents')
        distinct = {}
        for prompt in sorted(found, key=_rank):
            # Several functions may have the same header, which makes only one prompt.
            distinct.setdefault(prompt.text, prompt)
        if len(distinct) < config.num_prompts:
            log.info(
                'task python_functions: found %d function headers, fewer than num_prompts=%d',
                len(distinct),
                config.num_prompts,
            )
        self._prompts = list(distinct.values())[: config.num_prompts]

    def prompts(self) -> list[FunctionPrompt]:
        """The prompts, chosen and ordered by a hash of their file name and line number."""
        return list(self._prompts)

    def evaluate(self, prompt: FunctionPrompt, completion: str) -> float:
        """1.0 if the function parses and at least two of its statements do something; else 0.0."""
        source = prompt.header + completion
        source = source[: _dedent(source, prompt.indentation)]
        function = _parse_function(source, prompt.indentation)
        return float(function is not None and _num_statements(function) >= 2)

    def stop(self, prompt: FunctionPrompt, completion: str) -> bool:
        """Whether the completion has reached the first dedent, where the function ends."""
        return _dedent(prompt.header + completion, prompt.indentation) is not None


def _function_prompts(name: str, text: str, context_lines: int) -> Iterator[FunctionPrompt]:
    tree = _parse(text)
    # Splits lines where Python does; str.splitlines would also split at a form feed.
    lines = io.StringIO(text).readlines()
    for node in ast.walk(tree) if tree else ():
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = node.lineno - 1
        header = _header(''.join(lines[first : node.body[0].lineno]))
        # If the body is on the header's line, there is nothing to complete.
        if header.count('\n') + node.lineno >= node.body[0].lineno:
            continue
        context = ''.join(lines[max(0, first - context_lines) : first])
        if not context_lines:
            header = _without_indentation(header)
        yield FunctionPrompt(id=f'{name}:{node.lineno}', text=context + header, header=header)


def _header(source: str) -> str:
    """The header at the start of `source`, up to and including its colon.

    It does not include the line break: break and indentation may be a single token, which a prompt
    that ends with the break would split.
    """
    for kind, depth, match in _lexemes(source):
        if kind == 'colon' and depth == 0:
            return source[: match.end()]
    return source


def _without_indentation(header: str) -> str:
    indentation = LINE_START.match(header)[1]
    return '\n'.join(line.removeprefix(indentation) for line in header.split('\n'))


def _dedent(source: str, indentation: int) -> int | None:
    """Where the first line after the function starts; None if there is none yet."""
    for kind, depth, match in _lexemes(source):
        if kind == 'newline' and depth == 0:
            start = LINE_START.match(source, match.end())
            if start[2] and _column(start[1]) <= indentation:
                return match.end()
    return None


def _lexemes(source: str) -> Iterator[tuple[str, int, re.Match]]:
    """Yields (kind, bracket depth, match) for every match of LEXEMES, in order."""
    depth = 0
    for match in LEXEMES.finditer(source):
        kind = match.lastgroup
        depth = max(0, depth + (kind == 'open') - (kind == 'close'))
        yield kind, depth, match


def _parse_function(source: str, indentation: int):
    """The single statement of a source indented by `indentation`; None if it is not exactly one."""
    tree = _parse('if True:\n' + source if indentation else source)
    statements = tree.body if tree else []
    if indentation and statements:
        statements = statements[0].body
    return statements[0] if len(statements) == 1 else None


def _parse(source: str) -> ast.Module | None:
    with warnings.catch_warnings():
        # Warnings, such as for invalid escapes, concern the judged text, not this program.
        warnings.simplefilter('ignore')
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def _num_statements(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Number of statements in the body, not counting `pass` and bare constants.

    Bare constants include `...` and docstrings. Nested statements are not counted.
    """
    return sum(
        not isinstance(statement, ast.Pass)
        and not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
        for statement in function.body
    )


def _column(indentation: str) -> int:
    return len(indentation.replace('\f', '').expandtabs(8))


def _rank(prompt: FunctionPrompt) -> bytes:
    return hashlib.sha256(prompt.id.encode()).digest()

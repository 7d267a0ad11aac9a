import ast
import random
import textwrap

import pytest

from jaxfm.data import PythonStdlibConfig
from jaxfm.data.documents import Document
from jaxfm.data.sources.python_stdlib import PythonStdlib
from jaxfm.errors import DataError
from jaxfm.tasks import TASKS, PythonFunctionsConfig
from jaxfm.tasks.base import Prompt
from jaxfm.tasks.python_functions import FunctionPrompt, PythonFunctions

SOURCE = '''\
import os

@decorator
def first(a, b={1: 2}, *, key=lambda x: x) -> dict[str, 'a:b']:  # comment: here
    return a

class Thing:
    """A thing."""
    def method(self,
               other: int = 1):
        x = 1
        return x

    async def later(self): return 1

    async def waits(self):
        def inner(y):
            return y
        return inner
'''
THING = Document('thing.py', SOURCE)


def task(documents=(THING,), **options):
    return PythonFunctions(PythonFunctionsConfig(**options), documents)


def prompt(header='def f(x):'):
    return FunctionPrompt('id', header, header=header)


def score(completion, header='def f(x):'):
    return task().evaluate(prompt(header), completion)


@pytest.fixture(scope='module')
def heldout():
    source = PythonStdlib(PythonStdlibConfig())
    read = [pair for shard in source.shards() for pair in source.read(shard)]
    return [document for is_heldout, document in read if is_heldout]


def test_the_registry_has_the_task():
    entry = TASKS['python_functions']
    assert entry.load() is PythonFunctions and entry.schema is PythonFunctionsConfig


def test_headers_end_with_their_colon_and_lose_their_indentation():
    texts = {one.id: one.text for one in task().prompts()}
    assert texts == {
        'thing.py:4': "def first(a, b={1: 2}, *, key=lambda x: x) -> dict[str, 'a:b']:",
        'thing.py:9': 'def method(self,\n           other: int = 1):',
        'thing.py:16': 'async def waits(self):',
        'thing.py:17': 'def inner(y):',
    }


def test_context_lines_keep_the_indentation_of_the_header():
    texts = {one.id: one for one in task(context_lines=3).prompts()}
    method = texts['thing.py:9']
    assert method.text.startswith('\nclass Thing:\n    """A thing."""\n    def method(')
    assert method.text.endswith(method.header) and method.header.startswith('    def method')
    assert task().evaluate(method, '\n        x = 1\n        return x\n    y = 1\n') == 1.0
    assert task().stop(method, '\n        x = 1\n        return x\n    y')


def test_prompts_are_chosen_by_a_hash_and_not_by_the_order_of_documents(heldout):
    prompts = task(heldout).prompts()
    assert len(prompts) == 64 and len({one.text for one in prompts}) == 64
    assert all(isinstance(one, Prompt) for one in prompts)
    assert len({one.id.split(':')[0] for one in prompts}) > 5
    again = task(random.Random(0).sample(heldout, len(heldout))).prompts()
    assert [one.text for one in again] == [one.text for one in prompts]
    assert task(heldout, num_prompts=10).prompts() == prompts[:10]


def test_real_functions_are_judged_as_ast_judges_them(heldout):
    """Uses the rest of the real file as the completion, which is cut where the function ends."""
    texts = {document.name: document.text for document in heldout}
    every = task(heldout, num_prompts=10_000, context_lines=1).prompts()
    accepted = 0
    for one in every[:100]:
        name, line = one.id.rsplit(':', 1)
        rest = ''.join(texts[name].splitlines(keepends=True)[int(line) - 1 :])
        source = ast.parse(texts[name])
        node = next(n for n in ast.walk(source) if getattr(n, 'lineno', 0) == int(line))
        statements = [
            statement
            for statement in node.body
            if not isinstance(statement, ast.Pass)
            and not isinstance(getattr(statement, 'value', None), ast.Constant)
            or isinstance(statement, ast.Return | ast.Assign)
        ]
        expected = float(len(statements) >= 2)
        assert task().evaluate(one, rest[len(one.header) :]) == expected, one.id
        accepted += expected
    assert 40 < accepted < 90


@pytest.mark.parametrize(
    'indentation, columns',
    [('', 0), ('    ', 4), ('\t', 8), ('   \t', 8), ('\t\t', 16), ('\f  ', 2)],
)
def test_a_tab_reaches_to_the_next_multiple_of_eight_columns(indentation, columns):
    """As Python has it: a tab and eight spaces indent alike."""
    assert prompt(f'{indentation}def f(x):').indentation == columns


GOOD = {
    'two statements': '\n    y = x\n    return y\n',
    'cut at the dedent': '\n    y = x\n    return y\n\ndef g(:\n',
    'code at column 0 that does not parse': '\n    y = x\n    return y\n)))',
    'unfinished last line that parses': '\n    y = x\n    return y.valu',
    'docstring before two statements': '\n    """Doc.\n\nMore.\n    """\n    y = 1\n    return y\n',
    'comment at column 0': '\n    y = x\n# comment\n    return y\n',
    'blank lines': '\n\n\n    y = x\n\n   \n    return y\n',
    'brackets at column 0': '\n    y = f(\n1,\n)\n    return y\n',
    'string at column 0': "\n    y = '''\ntext \\''' # (\n'''\n    return y\n",
    'continued line': '\n    y = 1 + \\\n2\n    return y\n',
    'brackets in strings and comments': '\n    y = "(" # [\n    return y\ndef g',
    'nested function': '\n    def g():\n        return 1\n    return g\n',
    'tabs': '\n\ty = x\n\treturn y\n',
    'one line': ' y = x; return y\n',
    'carriage returns': '\r\n    y = x\r\n    return y\r\nz',
    'a warning': '\n    y = "\\d"\n    return y is 1\n',
}
BAD = {
    'nothing': '',
    'at once a dedent': '\nreturn x\n',
    'one statement': '\n    return x\n',
    'pass and constants': '\n    pass\n    ...\n    1\n    "text"\n    return x\n',
    'two statements inside one': '\n    if x:\n        y = 1\n        return y\n',
    'statements after the dedent': '\n    return x\ny = 1\nz = 2\n',
    'unfinished line': '\n    y = x\n    return (y',
    'unfinished string': '\n    y = x\n    return "y',
    'unclosed bracket before the dedent': '\n    y = f(x\n    return y\n\ndef g():\n    pass\n',
    'inconsistent dedent': '\n        y = x\n    return y\n',
    'not python': '\n    the quick brown\n    fox jumps\n',
    'null byte': '\n    y = 1\n    return "\x00"\n',
    'deep nesting': '\n    y = 1\n    return ' + '(' * 5000,
    'lambda in the header line': ' lambda: 0\n    return 1\n',
}


@pytest.mark.parametrize('name', GOOD)
def test_good_completions_score_one(name):
    assert score(GOOD[name]) == 1.0
    assert task().reward(prompt(), GOOD[name]) == 1.0


@pytest.mark.parametrize('name', BAD)
def test_bad_completions_score_zero(name):
    assert score(BAD[name]) == 0.0


@pytest.mark.parametrize('name', sorted(GOOD.keys() - {'tabs'}))
def test_indentation_of_the_header_changes_no_score(name):
    completion = textwrap.indent(GOOD[name], '    ', lambda line: line.startswith('    '))
    assert score(completion, header='    def f(self):') == 1.0


@pytest.mark.parametrize('completion', [*GOOD.values(), *BAD.values()])
def test_stop_once_true_stays_true_and_keeps_the_score(completion):
    one = prompt()
    stops = [task().stop(one, completion[:i]) for i in range(min(200, len(completion)))]
    if True not in stops:
        return
    first = stops.index(True)
    assert all(stops[first:])
    assert score(completion[:first]) == score(completion)


@pytest.mark.parametrize(
    'completion, stops',
    [
        ('', False),
        ('\n', False),
        ('\n    return x\n', False),
        ('\n    return x\n\n# comment\n', False),
        ('\n    return x\n  y', False),
        ('\n    return x\ny', True),
        ('\n    return x\n\n# comment\ny', True),
        ('\n    return (x\ny', False),
        ('\n    return """x\ny', False),
        ('\n    return "x\ny', True),
    ],
)
def test_stop_waits_for_code_at_the_column_of_def(completion, stops):
    assert task().stop(prompt(), completion) == stops


def test_documents_without_functions_are_bad_data():
    with pytest.raises(DataError, match='no Python function'):
        task([Document('prose.txt', 'It was a dark night.'), Document('lines.py', 'x = 1\n')])

"""Which mistakes are planted, where, and that a seed decides which of them are drawn."""

import ast
from collections import Counter
from pathlib import Path

import pytest

from tools.mutants import draw, find_mutants, list_rooms
from tools.pick_tests import list_files

ROOT = Path(__file__).resolve().parents[2]


def changes(source):
    """{(operator, the source after it)}."""
    text = source.encode()
    return {(m.operator, m.apply(text).decode()) for m in find_mutants('a.py', text)}


@pytest.mark.parametrize(
    'source, operator, after',
    [
        ('x < y', 'comparison', 'x <= y'),
        ('x >= y', 'comparison', 'x > y'),
        ('(x) == (y)', 'comparison', '(x) != (y)'),
        ('x is  not y', 'comparison', 'x is y'),
        ('x not in y', 'comparison', 'x in y'),
        ('x < y <= z', 'comparison', 'x < y < z'),
        ('x + y', 'arithmetic', 'x - y'),
        ('x // y', 'arithmetic', 'x * y'),
        ('(x - y) * z', 'arithmetic', '(x + y) * z'),
        ('x += y', 'arithmetic', 'x -= y'),
        ('x and y or z', 'boolean', 'x or y or z'),
        ('f(not x)', 'boolean', 'f(x)'),
        ('if x < y:\n    z', 'condition', 'if not (x < y):\n    z'),
        ('z if x else y', 'condition', 'z if not (x) else y'),
        ('[x for x in y if x]', 'condition', '[x for x in y if not (x)]'),
        ('x[3]', 'constant', 'x[4]'),
        ('x = 0.5', 'constant', 'x = 1.5'),
        ('f(True)', 'constant', 'f(False)'),
        ('def f(x=1): x', 'default', 'def f(x=2): x'),
        ('def f(*, x=False): x', 'default', 'def f(*, x=True): x'),
        ('def f():\n    return x', 'return', 'def f():\n    return None'),
        ('f(x)', 'statement', 'pass'),
        ('class A:\n    x: int = 3', 'constant', 'class A:\n    x: int = 4'),
        ("'ü' == x", 'comparison', "'ü' != x"),
    ],
)
def test_an_operator_makes_its_change(source, operator, after):
    assert (operator, after) in changes(source)


@pytest.mark.parametrize(
    'source',
    [
        '"""1 + 1 == 2, and not 3."""',
        'def f(x: Literal[1]) -> Literal[2]: x',
        'x: Annotated[int, 3] = y',
        '@cache(maxsize=2)\ndef f(): x',
        '@dataclass(frozen=True)\nclass A(B, flag=True): x',
        'raise Error(x + y, 3)',
        "x = f'{y + 1}'",
        "log.debug('x', 3)",
        'def __repr__(self):\n    return x + y',
        "if __name__ == '__main__':\n    main(1)",
        "'a' + x",
        '[x] * y',
        'x = None',
        'def f(x=None): return',
        'import x',
    ],
)
def test_what_is_for_people_or_could_not_run_is_left_alone(source):
    assert changes(source) == set()


def test_what_is_logged_is_left_alone_but_not_that_it_is():
    assert changes("log.warning('%d', x + 1)") == {('statement', 'pass')}


def test_a_condition_is_negated_once():
    assert len(changes('if not x:\n    y')) == len(changes('if x == y:\n    z')) == 1


def test_a_mutant_says_where_it_is_and_what_its_lines_become():
    source = b'# a comment\nx = f(\n    1,\n    y)\n'
    [mutant] = find_mutants('jaxfm/a.py', source)
    assert (mutant.path, mutant.line, mutant.before, mutant.after) == ('jaxfm/a.py', 3, '1,', '2,')
    [mutant] = find_mutants('a.py', b'def g():\n    return f(\n        y)')
    assert (mutant.before, mutant.after) == ('return f( y)', 'return None')


@pytest.fixture
def tree(tmp_path):
    """The root and the files of a repository with three rooms, one of them small."""
    files = {
        'jaxfm/press.py': 'x = 1',
        'jaxfm/fruit/__init__.py': '',
        'jaxfm/fruit/apple.py': '\n'.join(f'x{n} = {n} + y' for n in range(30)),
        'pallas_kernels/mill/forward.py': '\n'.join(f'f(x < {n})' for n in range(30)),
        'tools/other.py': 'x = 1',
        'jaxfm/fruit/cogs.json': '{}',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path, list(files)


def test_rooms_are_the_directories_of_the_library(tree):
    assert list_rooms(tree[1]) == {
        'jaxfm': ['jaxfm/press.py'],
        'fruit': ['jaxfm/fruit/__init__.py', 'jaxfm/fruit/apple.py'],
        'pallas_kernels': ['pallas_kernels/mill/forward.py'],
    }


def test_a_seed_decides_the_draw_and_a_longer_one_begins_with_it(tree):
    drawn = draw(*tree, seed=0, count=20)
    assert len(set(drawn)) == 20
    assert drawn == draw(*tree, seed=0, count=20) != draw(*tree, seed=1, count=20)
    assert draw(*tree, seed=0, count=40)[:20] == drawn
    assert draw(*reversed_files(tree), seed=0, count=20) == drawn


def reversed_files(tree):
    return tree[0], tree[1][::-1]


def test_every_room_has_its_share_until_it_has_no_more(tree):
    rooms = Counter(m.path.split('/')[1] for m in draw(*tree, seed=3, count=21))
    assert rooms == {'press.py': 1, 'fruit': 10, 'mill': 10}
    everything = draw(*tree, seed=3, count=10**6)
    assert len(everything) == 1 + 60 + 90
    assert {m.path for m in draw(*tree, 0, 9, rooms=['fruit'])} == {'jaxfm/fruit/apple.py'}


def test_mutants_of_this_repository_are_python(tree):
    mutants = draw(ROOT, list_files(ROOT), seed=0, count=30)
    for mutant in mutants:
        source = (ROOT / mutant.path).read_bytes()
        changed = ast.unparse(ast.parse(mutant.apply(source)))
        assert changed != ast.unparse(ast.parse(source))
    assert len({mutant.path for mutant in mutants}) > 15

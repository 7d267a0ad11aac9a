"""Mutants: small mistakes to plant in the source, drawn at random with a seed.

Each operator makes one change after which the source is still valid Python:

    comparison   swaps < and <=, > and >=, == and !=; negates `is` and `in`
    arithmetic   swaps + and -, * and /; // becomes *
    boolean      swaps `and` and `or`; drops a `not`
    condition    negates the condition of an `if`
    constant     adds one to a number; swaps True and False
    default      the same for the default of an argument
    return       returns None instead of a value
    statement    drops a call whose result is not used

These are never changed: docstrings, annotations, decorators, raised exceptions, parts of f-strings,
logged text, `__repr__` and `__str__`. They are mostly text for people, of which tests should not
pin every word.
"""

import ast
import dataclasses
import functools
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

_COMPARISONS = {
    ast.Lt: (r'<', '<='),
    ast.LtE: (r'<=', '<'),
    ast.Gt: (r'>', '>='),
    ast.GtE: (r'>=', '>'),
    ast.Eq: (r'==', '!='),
    ast.NotEq: (r'!=', '=='),
    ast.Is: (r'\bis\b', 'is not'),
    ast.IsNot: (r'\bis\s+not\b', 'is'),
    ast.In: (r'\bin\b', 'not in'),
    ast.NotIn: (r'\bnot\s+in\b', 'in'),
}
_ARITHMETIC = {
    ast.Add: (r'\+', '-'),
    ast.Sub: (r'-', '+'),
    ast.Mult: (r'\*', '/'),
    ast.Div: (r'/', '*'),
    ast.FloorDiv: (r'//', '*'),
}
_BOOLEAN = {ast.And: (r'\band\b', 'or'), ast.Or: (r'\bor\b', 'and')}
# Sequences, which only + and * accept: any other operator would fail at once.
_SEQUENCES = ast.JoinedStr | ast.List | ast.Tuple | ast.ListComp
_SILENT = re.compile(r'log\.debug\b')


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change of one file: `replacement` replaces the bytes from start to stop of the source."""

    path: str
    line: int
    operator: str
    start: int
    stop: int
    replacement: str
    before: str  # the changed lines, joined into one
    after: str

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.replacement.encode() + source[self.stop :]


def draw(
    root: Path, paths: Iterable[str], seed: int, count: int, rooms: Iterable[str] = ()
) -> list[Mutant]:
    """Draws mutants of jaxfm/ and pallas_kernels/: first a package, then a module, line and change.

    Every package gets the same number of mutants, to within one. With the same seed, the first n
    mutants do not depend on `count`. If there are fewer than `count` mutants, returns all of them.

    rooms: the packages, by their names in `list_rooms`; empty for all.
    """
    by_room = {
        room: {path: None for path in modules}
        for room, modules in sorted(list_rooms(paths).items())
        if not rooms or room in rooms
    }
    random_ = random.Random(seed)
    drawn = []
    while len(drawn) < count and any(by_room.values()):
        order = sorted(room for room in by_room if by_room[room])
        random_.shuffle(order)
        drawn += filter(None, [_take(random_, root, by_room[room]) for room in order])
    return drawn[:count]


def list_rooms(paths: Iterable[str]) -> dict[str, list[str]]:
    """{package: its modules} for each directory of jaxfm, 'jaxfm' (the modules directly in it) and
    'pallas_kernels'."""
    found = {}
    for path in sorted(paths):
        parts = path.split('/')
        if parts[0] in ('jaxfm', 'pallas_kernels') and path.endswith('.py'):
            room = parts[1] if parts[0] == 'jaxfm' and len(parts) > 2 else parts[0]
            found.setdefault(room, []).append(path)
    return found


def find_mutants(path: str, source: bytes) -> list[Mutant]:
    """All mutants of a module, in source order."""
    changes = _Finder(source).find_all()
    return list(filter(None, (make_mutant(path, source, *change) for change in changes)))


def make_mutant(
    path: str, source: bytes, operator: str, start: int, stop: int, replacement: str
) -> Mutant | None:
    """The change as a Mutant; None if it gives invalid Python or the same syntax tree."""
    line = source.count(b'\n', 0, start) + 1
    mutant = Mutant(path, line, operator, start, stop, replacement, '', '')
    changed = mutant.apply(source)
    try:
        if ast.dump(ast.parse(changed)) == ast.dump(ast.parse(source)):
            return None
    except SyntaxError:
        return None
    first, end = source.rfind(b'\n', 0, start) + 1, source.find(b'\n', stop)
    rest = len(source) - end if end >= 0 else 0
    before, after = (
        ' '.join(text[first : len(text) - rest].decode().split()) for text in (source, changed)
    )
    return dataclasses.replace(mutant, before=before, after=after)


def _take(random_: random.Random, root: Path, modules: dict[str, dict | None]) -> Mutant | None:
    """Draws one mutant of a package and removes it from `modules`; None if there are no more.

    modules: {path: {line: its changes}, or None if the module has not been read yet}.
    """
    while modules:
        path = random_.choice(sorted(modules))
        source = (root / path).read_bytes()
        if modules[path] is None:
            modules[path] = {}
            for change in _Finder(source).find_all():
                modules[path].setdefault(source.count(b'\n', 0, change[1]), []).append(change)
        if not modules[path]:
            del modules[path]
            continue
        line = random_.choice(sorted(modules[path]))
        changes = modules[path][line]
        change = changes.pop(random_.randrange(len(changes)))
        if not changes:
            del modules[path][line]
        if mutant := make_mutant(path, source, *change):
            return mutant
    return None


class _Finder:
    """Finds (operator, start, stop, replacement) in the syntax tree of one source."""

    def __init__(self, source: bytes):
        self._source = source
        lines = source.splitlines(keepends=True)
        self._starts = [0]
        for line in lines:
            self._starts.append(self._starts[-1] + len(line))

    def find_all(self) -> list[tuple[str, int, int, str]]:
        """All changes of the source, in source order."""
        found = self.find(ast.parse(self._source))
        return sorted(found, key=lambda change: (change[1], change[2], change[0]))

    def find(self, node: ast.AST) -> Iterator[tuple[str, int, int, str]]:
        """All changes inside a node."""
        yield from self._changes(node)
        for child in _children(node):
            yield from self.find(child)

    @functools.singledispatchmethod
    def _changes(self, node) -> Iterator[tuple[str, int, int, str]]:
        """All changes of a node itself, without its children."""
        return iter(())

    @_changes.register
    def _(self, node: ast.Compare):
        sides = [node.left, *node.comparators]
        for operator, left, right in zip(node.ops, sides, sides[1:]):
            yield from self._swap('comparison', _COMPARISONS, operator, left, right)

    @_changes.register
    def _(self, node: ast.BinOp):
        sides = node.left, node.right
        if not any(isinstance(side, _SEQUENCES) or _is_text(side) for side in sides):
            yield from self._swap('arithmetic', _ARITHMETIC, node.op, *sides)

    @_changes.register
    def _(self, node: ast.AugAssign):
        if not isinstance(node.value, _SEQUENCES) and not _is_text(node.value):
            yield from self._swap('arithmetic', _ARITHMETIC, node.op, node.target, node.value)

    @_changes.register
    def _(self, node: ast.BoolOp):
        for left, right in zip(node.values, node.values[1:]):
            yield from self._swap('boolean', _BOOLEAN, node.op, left, right)

    @_changes.register
    def _(self, node: ast.UnaryOp):
        if isinstance(node.op, ast.Not):
            start = self._start(node)
            length = re.match(rb'not\s*', self._source[start:]).end()
            yield 'boolean', start, start + length, ''

    @_changes.register(ast.If)
    @_changes.register(ast.IfExp)
    def _(self, node):
        yield from self._negate(node.test)

    @_changes.register
    def _(self, node: ast.comprehension):
        for test in node.ifs:
            yield from self._negate(test)

    @_changes.register
    def _(self, node: ast.Constant):
        if (value := _another(node)) is not None:
            yield 'constant', self._start(node), self._stop(node), value

    @_changes.register
    def _(self, node: ast.arguments):
        for default in filter(None, [*node.defaults, *node.kw_defaults]):
            if isinstance(default, ast.Constant) and (value := _another(default)) is not None:
                yield 'default', self._start(default), self._stop(default), value

    @_changes.register
    def _(self, node: ast.Return):
        if node.value is not None:
            yield 'return', self._start(node.value), self._stop(node.value), 'None'

    @_changes.register
    def _(self, node: ast.Expr):
        if isinstance(node.value, ast.Call):
            start, stop = self._start(node), self._stop(node)
            if not _SILENT.match(self._source[start:stop].decode()):
                yield 'statement', start, stop, 'pass'

    def _swap(self, name, table, operator, left, right):
        """Replaces an operator between two operands, if it is in the table."""
        if type(operator) not in table:
            return
        pattern, replacement = table[type(operator)]
        start, stop = self._stop(left), self._start(right)
        if found := re.search(pattern.encode(), self._source[start:stop]):
            yield name, start + found.start(), start + found.end(), replacement

    def _negate(self, test: ast.expr):
        """Negates a condition, unless another operator does so: for `not x` and `x == y`."""
        is_opposite = isinstance(test, ast.Compare) and not isinstance(
            test.ops[0], ast.Lt | ast.LtE | ast.Gt | ast.GtE
        )
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not) or is_opposite:
            return
        start, stop = self._start(test), self._stop(test)
        yield 'condition', start, stop, f'not ({self._source[start:stop].decode()})'

    def _start(self, node) -> int:
        return self._starts[node.lineno - 1] + node.col_offset

    def _stop(self, node) -> int:
        return self._starts[node.end_lineno - 1] + node.end_col_offset


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """The children of a node that may be changed."""
    skipped = []
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        if node.name in ('__repr__', '__str__'):
            return
        skipped = [*node.decorator_list, node.returns]
    elif isinstance(node, ast.ClassDef):
        skipped = [*node.decorator_list, *node.bases, *node.keywords]
    elif isinstance(node, ast.arguments):
        # Constant defaults have their own operator.
        defaults = [*node.defaults, *filter(None, node.kw_defaults)]
        yield from (default for default in defaults if not isinstance(default, ast.Constant))
        return
    elif isinstance(node, ast.AnnAssign):
        skipped = [node.annotation]
    elif isinstance(node, ast.Raise | ast.JoinedStr) or _is_main(node) or _is_logged(node):
        return
    yield from (child for child in ast.iter_child_nodes(node) if child not in skipped)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)


def _is_main(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and '__name__' in ast.unparse(node.test)


def _is_logged(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).startswith(('log.', 'logging.'))


def _another(node: ast.Constant) -> str | None:
    """A different value for a number or a boolean; None for any other constant."""
    if isinstance(node.value, bool):
        return repr(not node.value)
    return repr(node.value + 1) if isinstance(node.value, int | float) else None

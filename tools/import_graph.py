"""Which file of the repository reads which, found by parsing: nothing is imported, not even JAX.

A file reads another if it imports it, anywhere in the file, or names it in a string: 'jaxfm.main'
run as a program, 'jaxfm.evals.loss:Loss' in a registry, 'configs/sft.py', 'tiles.json'. Imports in
a program inside a string count too. Docstrings do not count.
"""

import ast
import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

ROOMS = ('jaxfm', 'pallas_kernels', 'tools', 'configs', 'tests')

_FROM = re.compile(r'\bfrom\s+([\w.]+)\s+import\s+([\w, ]+)')
_DOTTED = re.compile(rf'\b(?:{"|".join(ROOMS)})(?:[./]\w+)+')
_FILE = re.compile(r'[\w-]+(?:\.[\w-]+)+')


class Graph:
    """The files of a repository, and which files read each of them.

    root: the root of the repository.
    paths: its files, relative to the root; other files are ignored. A path may be of a deleted
    file: files that still name it count as reading it.
    """

    def __init__(self, root: Path, paths: Iterable[str]):
        self.root = root
        self.paths = frozenset(paths)
        self._modules = {_module_name(path): path for path in self.paths if path.endswith('.py')}
        self._named = {}
        for path in self.paths:
            if not path.endswith('.py') or path.startswith('configs/'):
                self._named.setdefault(PurePosixPath(path).name, set()).add(path)
        self._readers = {path: set() for path in self.paths}
        for path in self.paths:
            for other in self._find_read(path):
                self._readers[other].add(path)

    def tests_of(self, path: str) -> dict[str, int]:
        """{test file: its distance from `path`}, nearest first.

        A test file that reads `path` has distance 1. A helper in tests/ counts as a part of the
        files that read it, except tests/conftest.py, which every test file reads.
        """
        distances, at = {path: 0}, [path]
        while at:
            name = at.pop(0)
            is_helper = _is_helper(name) and name != path
            for reader in self._readers.get(name, ()):
                distance = distances[name] + (not is_helper)
                if distance < distances.get(reader, len(self.paths)):
                    distances[reader] = distance
                    at.append(reader)
        found = {name: distance for name, distance in distances.items() if is_test(name)}
        return dict(sorted(found.items(), key=lambda item: (item[1], item[0])))

    def mirrors_of(self, path: str) -> list[str]:
        """The test files that mirror `path` in tests/, nearest first."""
        parts = PurePosixPath(path).with_suffix('').parts
        if parts[0] not in ROOMS[:3] or not path.endswith('.py'):
            return []
        inside = parts[1:] if parts[0] == 'jaxfm' else parts
        folder, name = list(inside[:-1]), inside[-1]
        places = [[*folder, name]]
        if len(folder) > 1 or folder and parts[0] == 'jaxfm':
            # attention/forward -> test_attention_forward, families/llama -> test_families
            places += [[*folder[:-1], f'{folder[-1]}_{name}'], folder]
        paths = ['/'.join(['tests', *place[:-1], f'test_{place[-1]}.py']) for place in places]
        return [path for path in paths if path in self.paths]

    def parse(self, path: str) -> ast.Module | None:
        """The syntax tree of a file; None if the file is gone or is not Python."""
        try:
            return _parse(self.root / path)
        except (FileNotFoundError, SyntaxError):
            return None

    def _find_read(self, path: str) -> set[str]:
        tree = self.parse(path) if path.endswith('.py') else None
        if tree is None:
            return set()
        nodes = list(ast.walk(tree))
        texts = _find_texts(nodes)
        package = list(PurePosixPath(path).with_suffix('').parts[:-1])
        found = {self._resolve(name) for name in _find_names(nodes, texts, package)}
        for file in {name for text in texts for name in _FILE.findall(text)}:
            named = self._named.get(file, set())
            beside = str(PurePosixPath(path).with_name(file))
            found |= {beside} if beside in named else named
        if is_test(path):
            taken = {*texts, *(node.arg for node in nodes if isinstance(node, ast.arg))}
            found |= set(self._find_conftests_used(path, taken))
        return found - {None, path}

    def _resolve(self, name: str) -> str | None:
        """The file of the longest module that a dotted name begins with."""
        parts = name.split('.')
        heads = ('.'.join(parts[:end]) for end in range(len(parts), 0, -1))
        return next((self._modules[head] for head in heads if head in self._modules), None)

    def _find_conftests_used(self, path: str, taken: set[str]) -> Iterator[str]:
        """The conftest.py files above a test file that define a fixture that it uses."""
        for place in self.conftests_of(path):
            conftest = self.parse(place)
            names = find_fixtures(conftest) if conftest else {}
            if taken & names.keys() or any(_is_autouse(node) for node in names.values()):
                yield place

    def conftests_of(self, path: str) -> list[str]:
        """The conftest.py files that apply to a test file, nearest first."""
        places = (f'{parent}/conftest.py' for parent in PurePosixPath(path).parents)
        return [place for place in places if place in self.paths]


def is_test(path: str) -> bool:
    """Whether pytest collects the file."""
    return path.startswith('tests/') and PurePosixPath(path).match('test_*.py')


def find_fixtures(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    """{name: function} for the fixtures that a file defines."""
    return {
        node.name: node
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any('fixture' in ast.unparse(decorator) for decorator in node.decorator_list)
    }


def _is_helper(path: str) -> bool:
    return path.startswith('tests/') and path != 'tests/conftest.py' and not is_test(path)


def _is_autouse(fixture: ast.FunctionDef) -> bool:
    return any('autouse=True' in ast.unparse(decorator) for decorator in fixture.decorator_list)


def _module_name(path: str) -> str:
    return '.'.join(PurePosixPath(path).with_suffix('').parts).removesuffix('.__init__')


@functools.cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes())


def _find_texts(nodes: list[ast.AST]) -> set[str]:
    """All strings except docstrings."""
    alone = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    constants = (n for n in nodes if isinstance(n, ast.Constant) and id(n) not in alone)
    return {node.value for node in constants if isinstance(node.value, str)}


def _find_names(nodes: list[ast.AST], texts: set[str], package: list[str]) -> Iterator[str]:
    """Yields the dotted names of everything that a file imports or names in a string."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = '.'.join([*above, *filter(None, [node.module])])
            yield from (f'{base}.{alias.name}' for alias in node.names)
    for text in texts:
        for base, names in _FROM.findall(text):
            yield from (f'{base}.{name.strip()}' for name in names.split(','))
        yield from (name.replace('/', '.') for name in _DOTTED.findall(text))

"""What is installed with the library is what it imports, no less and no more."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Configs count, because no run is without one.
CORE = ('jaxfm', 'pallas_kernels', 'configs')
# Modules that a dependency brings under another name than its own.
COMES_WITH = {'pydantic_core': 'pydantic', 'jaxlib': 'jax', 'orbax': 'orbax_checkpoint'}


def dependencies() -> set[str]:
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    return {re.match(r'[\w-]+', text)[0].replace('-', '_') for text in project['dependencies']}


def imported(source: str) -> dict[str, bool]:
    """{package of others: whether a line outside of all functions imports it}."""
    tree, found = ast.parse(source), {}
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    late = {id(inner) for function in functions for inner in ast.walk(function)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for package in {name.split('.')[0] for name in names}:
            if package not in {*CORE, *sys.stdlib_module_names}:
                found[package] = found.get(package, False) or id(node) not in late
    return found


def read_core() -> dict[str, dict[str, bool]]:
    paths = sorted(path for room in CORE for path in (ROOT / room).rglob('*.py'))
    return {str(path.relative_to(ROOT)): imported(path.read_text()) for path in paths}


def unused(core: dict, installed: set[str]) -> set[str]:
    """Dependencies that no file imports, not even inside a function."""
    return installed - {COMES_WITH.get(name, name) for found in core.values() for name in found}


def undeclared(core: dict, installed: set[str]) -> set[tuple[str, str]]:
    """(file, package) of every import of a module that is in no dependency."""
    return {
        (path, name)
        for path, found in core.items()
        for name, is_early in found.items()
        if is_early and COMES_WITH.get(name, name) not in installed
    }


def test_the_core_imports_every_dependency():
    assert unused(read_core(), dependencies()) == set()


def test_what_a_module_of_the_core_imports_is_a_dependency():
    assert undeclared(read_core(), dependencies()) == set()


def test_constraints_pin_every_dependency():
    pins = {
        line.partition('==')[0].lower().replace('-', '_')
        for line in (ROOT / 'constraints.txt').read_text().splitlines()
    }
    assert dependencies() <= pins


@pytest.mark.parametrize(
    'source, is_early',
    [
        ('import a.b', True),
        ('from a import b', True),
        ('if x:\n    import a', True),
        ('class X:\n    import a', True),
        ('def f():\n    import a', False),
        ('class X:\n    async def f(self):\n        from a.b import c', False),
        ('import a\ndef f():\n    import a', True),
    ],
)
def test_an_import_is_found(source, is_early):
    assert imported(source) == {'a': is_early}


def test_our_own_and_the_standard_library_are_none_of_them():
    assert imported('import os.path\nfrom jaxfm import main\nfrom . import x') == {}


def test_what_is_unused_or_undeclared_is_found():
    core = {'x.py': {'a': True, 'b': False, 'pydantic_core': True}}
    assert unused(core, {'a', 'b', 'c', 'pydantic'}) == {'c'}
    assert undeclared(core, {'a'}) == {('x.py', 'pydantic_core')}

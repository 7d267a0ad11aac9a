"""Kernel tests are left out only if they passed with exactly the present sources and versions."""

import ast

import pytest

from tests import kept

ROOT = kept.ROOT


class Config:
    """The parts of pytest's config that the plugin uses."""

    def __init__(self, *args):
        self.args = list(args)
        self.hook = self
        self.deselected = []

    def getini(self, name):
        return {'testpaths': ['tests']}[name]

    def pytest_deselected(self, items):
        self.deselected += [item.nodeid for item in items]


class Item:
    def __init__(self, name):
        self.nodeid = f'{kept.KERNEL_TESTS}/{name}'


class Report(Item):
    def __init__(self, name, outcome='passed', when='call'):
        super().__init__(name)
        self.passed, self.when = outcome == 'passed', when


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('JAXFM_TEST_CACHE', str(tmp_path))
    monkeypatch.delenv('JAXFM_TEST_COLD', raising=False)


def session(*reports) -> kept.KernelTests:
    """Runs the plugin through a session with these reports."""
    plugin = kept.KernelTests()
    for report in reports:
        plugin.pytest_runtest_logreport(report)
    plugin.pytest_sessionfinish()
    return plugin


def left_out(*args) -> list[str]:
    config, items = Config(*args), [Item('a'), Item('b'), Item('c')]
    kept.KernelTests().pytest_collection_modifyitems(config, items)
    assert len(items) + len(config.deselected) == 3
    return [name.rpartition('/')[2] for name in config.deselected]


def test_tests_that_passed_are_left_out_of_a_session_over_all_tests():
    assert left_out('tests') == []
    session(Report('a'), Report('b', 'failed'), Report('c'), Report('c', 'failed', 'teardown'))
    assert left_out('tests') == ['a']
    session(Report('b'))
    assert left_out('tests') == ['a', 'b']


def test_a_skip_does_not_count_as_passed():
    session(Report('a', 'skipped', 'setup'), Report('a', 'passed', 'teardown'))
    assert left_out('tests') == []


def test_tests_that_are_named_run():
    session(Report('a'))
    assert left_out('tests/pallas_kernels') == []


def test_a_cold_session_neither_reads_nor_writes(monkeypatch):
    session(Report('a'))
    monkeypatch.setenv('JAXFM_TEST_COLD', '1')
    assert left_out('tests') == []
    session(Report('b'))
    monkeypatch.delenv('JAXFM_TEST_COLD')
    assert left_out('tests') == ['a']


@pytest.mark.parametrize('change', ['source', 'version'])
def test_another_source_or_version_runs_them_again(monkeypatch, tmp_path, change):
    session(Report('a'))
    if change == 'source':
        source = tmp_path / 'more.py'
        source.write_text('')
        monkeypatch.setattr(kept, 'ROOT', tmp_path)
        monkeypatch.setattr(kept, 'KERNEL_SOURCES', ('more.py',))
        session(Report('a'))
        assert left_out('tests') == ['a']
        source.write_text('# changed')
    else:
        monkeypatch.setattr(kept.metadata, 'version', lambda name: 'another')
    assert left_out('tests') == []


def imports(path) -> set[str]:
    """The modules that a file imports, as paths without .py from the root of the repository."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f'{node.module}.{alias.name}' for alias in node.names}
    return {name.replace('.', '/') for name in found}


def test_every_module_that_kernel_tests_import_counts():
    for path in (ROOT / kept.KERNEL_TESTS).rglob('*.py'):
        for name in imports(path):
            files = [f for f in (ROOT / f'{name}.py', ROOT / name / '__init__.py') if f.exists()]
            for file in files:
                where = file.relative_to(ROOT).as_posix()
                counts = any(where.startswith(source) for source in kept.KERNEL_SOURCES)
                assert counts or where in ('tests/__init__.py', 'tools/__init__.py'), (path, where)

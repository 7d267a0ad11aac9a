"""Which tests a change concerns: by place, by import, by name in a string; and what is left out."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools import pick_tests
from tools.import_graph import Graph

ROOT = Path(__file__).resolve().parents[2]
# A small repository, with one edge of each kind.
FILES = {
    'jaxfm/__init__.py': '',
    'jaxfm/stones.py': '"""Nobody but apple reads this; jaxfm.deep is only a word here."""',
    'jaxfm/fruit/__init__.py': "SOURCES = {'plum': 'jaxfm.fruit.plum:Plum'}",
    'jaxfm/fruit/apple.py': 'from ..stones import RunError\nfrom . import pear',
    'jaxfm/fruit/pear.py': 'x = 1',
    'jaxfm/fruit/plum.py': '',
    'jaxfm/press.py': 'def main():\n    from jaxfm.deep import inner',
    'jaxfm/deep.py': '',
    'jaxfm/trees/oak.py': '',
    'pallas_kernels/mill/forward.py': '',
    'pallas_kernels/mill/cogs.py': "PATH = 'cogs.json'",
    'pallas_kernels/mill/cogs.json': '{}',
    'pallas_kernels/norm/cogs.json': '{}',
    'configs/jam.py': '',
    'NOTES.md': '',
    'tests/conftest.py': (
        'import pytest\nfrom jaxfm import stones\n@pytest.fixture\ndef tiny():\n    pass\n'
        '@pytest.fixture\ndef place():\n    pass'
    ),
    'tests/helper.py': 'import jaxfm.fruit.pear',
    'tests/trees/conftest.py': '@pytest.fixture(autouse=True)\ndef quick():\n    pass',
    'tests/trees/test_oak.py': 'def test_it():\n    pass',
    'tests/fruit/test_apple.py': 'def test_it():\n    pass',
    'tests/fruit/test_both.py': 'from jaxfm.fruit.apple import Apple\nfrom tests import helper',
    'tests/test_program.py': "command = ['-m', 'jaxfm.press', '--config', 'configs/jam.py']",
    'tests/test_text.py': "PROGRAM = '''\nfrom jaxfm.fruit import pear, apple\n'''",
    'tests/test_registry.py': "name = 'jaxfm.fruit.plum:Plum'",
    'tests/test_trees.py': 'def test_it():\n    pass',
    'tests/test_place.py': 'def test_it(place):\n    pass',
    'tests/test_words.py': '"""jaxfm.stones and NOTES.md stand here as words."""',
    'tests/test_notes.py': "path = ROOT / 'NOTES.md'",
    'tests/pallas_kernels/test_mill_forward.py': 'def test_it():\n    pass',
    'tests/pallas_kernels/test_cogs.py': 'import pallas_kernels.mill.cogs',
}


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def git(root, *arguments):
    command = ['git', '-C', root, '-c', 'user.name=a', '-c', 'user.email=a@b', *arguments]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path):
    write(tmp_path, FILES)
    git(tmp_path, 'init', '-q')
    git(tmp_path, 'add', '-A')
    git(tmp_path, 'commit', '-q', '-m', 'first')
    return tmp_path


@pytest.fixture
def picked(tmp_path):
    """(changed file, more files of the repository) -> the test files that are picked."""

    def run(*changed, **more):
        files = FILES | {name.replace('__', '/') + '.py': text for name, text in more.items()}
        write(tmp_path, files)
        return pick_tests.pick(Graph(tmp_path, {*files, *changed}), changed)

    return run


@pytest.mark.parametrize(
    'changed, files',
    [
        ('tests/test_program.py', ['tests/test_program.py']),
        # The mirror first, then who imports it, also in a program that a string holds.
        (
            'jaxfm/fruit/apple.py',
            ['tests/fruit/test_apple.py', 'tests/fruit/test_both.py', 'tests/test_text.py'],
        ),
        # A helper of tests is a part of the file that imports it.
        ('jaxfm/fruit/pear.py', ['tests/fruit/test_both.py', 'tests/test_text.py']),
        ('tests/helper.py', ['tests/fruit/test_both.py']),
        ('jaxfm/press.py', ['tests/test_program.py']),
        ('configs/jam.py', ['tests/test_program.py']),
        ('jaxfm/fruit/plum.py', ['tests/test_registry.py']),
        # Nobody tests it: those that are nearest by imports.
        ('jaxfm/deep.py', ['tests/test_program.py']),
        ('jaxfm/trees/oak.py', ['tests/trees/test_oak.py', 'tests/test_trees.py']),
        (
            'pallas_kernels/mill/forward.py',
            ['tests/pallas_kernels/test_mill_forward.py'],
        ),
        ('pallas_kernels/mill/cogs.json', ['tests/pallas_kernels/test_cogs.py']),
        ('pallas_kernels/norm/cogs.json', []),
        ('tests/conftest.py', ['tests/test_place.py']),
        ('tests/trees/conftest.py', ['tests/trees/test_oak.py']),
        ('NOTES.md', ['tests/test_notes.py']),
        ('jaxfm/gone.py', []),
        ('tests/test_gone.py', []),
    ],
)
def test_a_change_picks_the_tests_that_it_concerns(picked, changed, files):
    assert list(picked(changed).files) == files


def test_every_test_file_is_picked_once_and_says_why(picked):
    found = picked('jaxfm/fruit/pear.py', 'jaxfm/fruit/apple.py', 'tests/test_text.py')
    assert found.files == {
        'tests/test_text.py': 'changed',
        'tests/fruit/test_both.py': 'reads jaxfm/fruit/pear.py',
        'tests/fruit/test_apple.py': 'mirrors jaxfm/fruit/apple.py',
    }


def test_a_deleted_module_picks_the_tests_that_still_name_it(picked):
    found = picked('jaxfm/fruit/lost.py', tests__test_lost='from jaxfm.fruit.lost import Lost')
    assert list(found.files) == ['tests/test_lost.py']


LONG = """
import pytest
from jaxfm.fruit import apple

@pytest.fixture
def run(tiny):
    pass

def test_quick(place):
    pass

def test_direct(tiny):
    pass

def test_through_a_fixture(run):
    pass

@pytest.mark.usefixtures('run')
def test_by_a_mark():
    pass
"""


def test_whole_runs_are_left_out_and_the_rest_of_their_file_is_not(picked):
    found = picked('jaxfm/fruit/apple.py', tests__fruit__test_apple=LONG)
    assert 'tests/fruit/test_apple.py' in found.files
    left_out = [f'tests/fruit/test_apple.py::test_{n}' for n in ('direct', 'through_a_fixture')]
    assert list(found.left_out) == [*left_out, 'tests/fruit/test_apple.py::test_by_a_mark']
    assert found.arguments(Path())[:3] == [f'--deselect={name}' for name in found.left_out]
    assert '  tests/fruit/test_apple.py  (3 of its tests: fixture tiny)' in pick_tests.describe(
        found
    )


def test_a_file_of_whole_runs_alone_is_left_out_unless_it_is_changed(picked, monkeypatch):
    only = LONG.replace('def test_quick', 'def quick')
    found = picked('jaxfm/fruit/apple.py', tests__fruit__test_apple=only)
    assert found.left_out == {'tests/fruit/test_apple.py': 'every test: fixture tiny'}
    assert 'tests/fruit/test_apple.py' not in found.files
    found = picked('tests/fruit/test_apple.py', tests__fruit__test_apple=only)
    assert found.files == {'tests/fruit/test_apple.py': 'changed'} and not found.left_out
    monkeypatch.setattr(pick_tests, 'LONG_FILES', {'tests/test_text.py'})
    assert 'tests/test_text.py' in picked('jaxfm/fruit/apple.py').left_out


def test_what_changed_is_what_git_says_with_untracked_and_deleted_files(repository):
    write(repository, {'jaxfm/new one.py': '', 'jaxfm/deep.py': 'x = 2', '.gitignore': 'out'})
    write(repository, {'out': 'ignored'})
    (repository / 'jaxfm/press.py').unlink()
    changed = ['.gitignore', 'jaxfm/deep.py', 'jaxfm/new one.py', 'jaxfm/press.py']
    assert pick_tests.list_changes(repository, 'HEAD') == changed
    git(repository, 'add', '-A')
    git(repository, 'commit', '-q', '-m', 'second')
    assert pick_tests.list_changes(repository, 'HEAD') == []
    assert pick_tests.list_changes(repository, 'HEAD~1') == changed


def test_the_picked_files_run_and_the_exit_code_is_that_of_pytest(repository, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(pytest, 'main', lambda arguments: calls.append(arguments) or 1)
    assert pick_tests.main([], repository) == 0  # nothing is changed
    write(repository, {'jaxfm/deep.py': 'x = 2'})
    assert pick_tests.main(['--list'], repository) == 0
    assert not calls and 'tests/test_program.py  (2 imports from' in capsys.readouterr().out
    assert pick_tests.main(['--', '-k', 'apple'], repository) == 1
    file = f'{repository}/tests/test_program.py'
    assert calls == [['-x', '-q', f'--rootdir={repository}', file, '-k', 'apple']]


def test_an_unknown_commit_is_one_clear_message(repository, capsys):
    assert pick_tests.main(['--since', 'nothing'], repository) == 64
    assert "error: fatal: bad revision 'nothing'" in capsys.readouterr().err


def test_picking_imports_no_jax():
    program = (
        'import sys; from tools import pick_tests; pick_tests.main(["--list"]); '
        'sys.exit(bool({"jax", "numpy", "pytest"} & set(sys.modules)))'
    )
    subprocess.run([sys.executable, '-c', program], check=True, cwd=ROOT, capture_output=True)


def test_the_long_files_are_there():
    assert all((ROOT / name).exists() for name in pick_tests.LONG_FILES)


def test_fixtures_that_take_long_are_those_of_the_session():
    text = (ROOT / 'tests/conftest.py').read_text()
    assert all(f'def {name}(' in text for name in pick_tests.LONG_FIXTURES)

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
    'jaxfm/errors.py': '"""Nobody but order reads this; jaxfm.deep is only a word here."""',
    'jaxfm/data/__init__.py': "SOURCES = {'files': 'jaxfm.data.files:Files'}",
    'jaxfm/data/order.py': 'from ..errors import RunError\nfrom . import mixture',
    'jaxfm/data/mixture.py': 'x = 1',
    'jaxfm/data/files.py': '',
    'jaxfm/main.py': 'def main():\n    from jaxfm.deep import inner',
    'jaxfm/deep.py': '',
    'jaxfm/families/llama.py': '',
    'pallas_kernels/attention/forward.py': '',
    'pallas_kernels/attention/tiles.py': "PATH = 'tiles.json'",
    'pallas_kernels/attention/tiles.json': '{}',
    'pallas_kernels/norm/tiles.json': '{}',
    'configs/sft.py': '',
    'README.md': '',
    'tests/conftest.py': (
        'import pytest\nfrom jaxfm import errors\n@pytest.fixture\ndef tiny():\n    pass\n'
        '@pytest.fixture\ndef place():\n    pass'
    ),
    'tests/helper.py': 'import jaxfm.data.mixture',
    'tests/families/conftest.py': '@pytest.fixture(autouse=True)\ndef quick():\n    pass',
    'tests/families/test_llama.py': 'def test_it():\n    pass',
    'tests/data/test_order.py': 'def test_it():\n    pass',
    'tests/data/test_both.py': 'from jaxfm.data.order import Order\nfrom tests import helper',
    'tests/test_program.py': "command = ['-m', 'jaxfm.main', '--config', 'configs/sft.py']",
    'tests/test_text.py': "PROGRAM = '''\nfrom jaxfm.data import mixture, order\n'''",
    'tests/test_registry.py': "name = 'jaxfm.data.files:Files'",
    'tests/test_families.py': 'def test_it():\n    pass',
    'tests/test_place.py': 'def test_it(place):\n    pass',
    'tests/test_words.py': '"""jaxfm.errors and README.md stand here as words."""',
    'tests/test_readme.py': "path = ROOT / 'README.md'",
    'tests/pallas_kernels/test_attention_forward.py': 'def test_it():\n    pass',
    'tests/pallas_kernels/test_tiles.py': 'import pallas_kernels.attention.tiles',
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
            'jaxfm/data/order.py',
            ['tests/data/test_order.py', 'tests/data/test_both.py', 'tests/test_text.py'],
        ),
        # A helper of tests is a part of the file that imports it.
        ('jaxfm/data/mixture.py', ['tests/data/test_both.py', 'tests/test_text.py']),
        ('tests/helper.py', ['tests/data/test_both.py']),
        ('jaxfm/main.py', ['tests/test_program.py']),
        ('configs/sft.py', ['tests/test_program.py']),
        ('jaxfm/data/files.py', ['tests/test_registry.py']),
        # Nobody tests it: those that are nearest by imports.
        ('jaxfm/deep.py', ['tests/test_program.py']),
        ('jaxfm/families/llama.py', ['tests/families/test_llama.py', 'tests/test_families.py']),
        (
            'pallas_kernels/attention/forward.py',
            ['tests/pallas_kernels/test_attention_forward.py'],
        ),
        ('pallas_kernels/attention/tiles.json', ['tests/pallas_kernels/test_tiles.py']),
        ('pallas_kernels/norm/tiles.json', []),
        ('tests/conftest.py', ['tests/test_place.py']),
        ('tests/families/conftest.py', ['tests/families/test_llama.py']),
        ('README.md', ['tests/test_readme.py']),
        ('jaxfm/gone.py', []),
        ('tests/test_gone.py', []),
    ],
)
def test_a_change_picks_the_tests_that_it_concerns(picked, changed, files):
    assert list(picked(changed).files) == files


def test_every_test_file_is_picked_once_and_says_why(picked):
    found = picked('jaxfm/data/mixture.py', 'jaxfm/data/order.py', 'tests/test_text.py')
    assert found.files == {
        'tests/test_text.py': 'changed',
        'tests/data/test_both.py': 'reads jaxfm/data/mixture.py',
        'tests/data/test_order.py': 'mirrors jaxfm/data/order.py',
    }


def test_a_deleted_module_picks_the_tests_that_still_name_it(picked):
    found = picked('jaxfm/data/lost.py', tests__test_lost='from jaxfm.data.lost import Lost')
    assert list(found.files) == ['tests/test_lost.py']


LONG = """
import pytest
from jaxfm.data import order

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
    found = picked('jaxfm/data/order.py', tests__data__test_order=LONG)
    assert 'tests/data/test_order.py' in found.files
    left_out = [f'tests/data/test_order.py::test_{n}' for n in ('direct', 'through_a_fixture')]
    assert list(found.left_out) == [*left_out, 'tests/data/test_order.py::test_by_a_mark']
    assert found.arguments(Path())[:3] == [f'--deselect={name}' for name in found.left_out]
    assert '  tests/data/test_order.py  (3 some tests: takes tiny)' in pick_tests.describe(found)


def test_a_file_of_whole_runs_alone_is_left_out_unless_it_is_changed(picked, monkeypatch):
    only = LONG.replace('def test_quick', 'def quick')
    found = picked('jaxfm/data/order.py', tests__data__test_order=only)
    assert found.left_out == {'tests/data/test_order.py': 'every test takes tiny'}
    assert 'tests/data/test_order.py' not in found.files
    found = picked('tests/data/test_order.py', tests__data__test_order=only)
    assert found.files == {'tests/data/test_order.py': 'changed'} and not found.left_out
    monkeypatch.setattr(pick_tests, 'LONG_FILES', {'tests/test_text.py'})
    assert 'tests/test_text.py' in picked('jaxfm/data/order.py').left_out


def test_what_changed_is_what_git_says_with_untracked_and_deleted_files(repository):
    write(repository, {'jaxfm/new one.py': '', 'jaxfm/deep.py': 'x = 2', '.gitignore': 'out'})
    write(repository, {'out': 'ignored'})
    (repository / 'jaxfm/main.py').unlink()
    changed = ['.gitignore', 'jaxfm/deep.py', 'jaxfm/main.py', 'jaxfm/new one.py']
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
    assert pick_tests.main(['--', '-k', 'order'], repository) == 1
    file = f'{repository}/tests/test_program.py'
    assert calls == [['-x', '-q', f'--rootdir={repository}', file, '-k', 'order']]


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

import sysconfig
from pathlib import Path

import pytest

from jaxfm.data import PythonStdlibConfig
from jaxfm.data.sources import python_stdlib
from jaxfm.data.sources.python_stdlib import PythonStdlib
from jaxfm.errors import MissingInputError


def documents(source):
    return [one for shard in source.shards() for one in source.read(shard)]


@pytest.fixture(scope='module')
def library():
    return PythonStdlib(PythonStdlibConfig())


def test_the_library_has_no_tests_tables_or_installed_packages(library):
    names = [file.name for file, _ in library.files()]
    assert {'ast.py', 'json/decoder.py', 'asyncio/events.py'} <= set(names)
    directories = {part for name in names for part in Path(name).parts[:-1]}
    assert not directories & python_stdlib.EXCLUDED_DIRECTORIES
    assert not any('_sysconfigdata' in name for name in names)
    assert names == sorted(names)


def test_heldout_files_of_the_library_are_about_a_twentieth(library):
    sides = [side for side, _ in documents(library)]
    assert 0.02 < sum(sides) / len(sides) < 0.1


def test_the_side_of_a_file_does_not_depend_on_where_the_library_is(tmp_path, monkeypatch):
    names = ['a.py', 'b.py', 'pack/c.py', 'pack/d.py', 'e.py', 'f.py']
    found = []
    for root in (tmp_path / 'one', tmp_path / 'other'):
        for name in [*names, 'test/skipped.py', 'pack/__pycache__/skipped.py', 'skipped.txt']:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f'name = {name!r}\n')
        (root / 'empty.py').touch()
        (root / 'latin.py').write_bytes(b'# \xe9\n')
        monkeypatch.setattr(sysconfig, 'get_path', lambda _, root=root: str(root))
        source = PythonStdlib(PythonStdlibConfig(heldout_fraction=0.5))
        found.append(documents(source))
        assert sorted(document.name for _, document in found[-1]) == sorted(names)
        assert sorted(source.bad_records) == ['empty.py', 'latin.py']
    assert found[0] == found[1]
    assert {side for side, _ in found[0]} == {False, True}


def test_a_library_without_files_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, 'get_path', lambda _: str(tmp_path))
    with pytest.raises(MissingInputError, match=f'{tmp_path} has no .py files'):
        PythonStdlib(PythonStdlibConfig()).files()

import os
import sysconfig
from pathlib import Path

import pytest

from jaxfm.data import PythonStdlibConfig, TextConfig, sources
from jaxfm.errors import DataError, MissingInputError, PermissionDeniedError


def survey(*files, **options):
    return sources.Text(TextConfig(files=[str(file) for file in files], **options)).survey()


def write(directory, **texts):
    for name, text in texts.items():
        content = text if isinstance(text, bytes) else text.encode()
        (directory / f'{name}.txt').write_bytes(content)


def read(documents):
    return [document.read() for document in documents]


@pytest.fixture(scope='module')
def library():
    return sources.PythonStdlib(PythonStdlibConfig()).survey()


def test_the_library_has_no_tests_tables_or_installed_packages(library):
    names = [document.name for document in library.train + library.heldout]
    assert {'ast.py', 'json/decoder.py', 'asyncio/events.py'} <= set(names)
    directories = {part for name in names for part in Path(name).parts[:-1]}
    assert not directories & sources.EXCLUDED_DIRECTORIES
    assert not any('_sysconfigdata' in name for name in names)


def test_heldout_files_of_the_library_are_about_a_twentieth_and_no_text_is_on_both_sides(library):
    total = len(library.train) + len(library.heldout)
    assert 0.02 < len(library.heldout) / total < 0.1
    digests = [document.digest for document in library.train + library.heldout]
    assert len(set(digests)) == total
    assert [d.name for d in library.train] == sorted(d.name for d in library.train)


def test_the_side_of_a_file_of_the_library_does_not_depend_on_where_the_library_is(
    tmp_path, monkeypatch
):
    names = ['a.py', 'b.py', 'pack/c.py', 'pack/d.py', 'e.py', 'f.py']
    fingerprints = []
    for root in (tmp_path / 'one', tmp_path / 'other'):
        for name in [*names, 'test/skipped.py', 'pack/__pycache__/skipped.py', 'skipped.txt']:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f'name = {name!r}\n')
        (root / 'empty.py').touch()
        (root / 'latin.py').write_bytes(b'# \xe9\n')
        monkeypatch.setattr(sysconfig, 'get_path', lambda _, root=root: str(root))
        found = sources.PythonStdlib(PythonStdlibConfig(heldout_fraction=0.5)).survey()
        assert sorted(d.name for d in found.train + found.heldout) == sorted(names)
        assert found.skipped == 2
        fingerprints.append(found.fingerprint)
    assert fingerprints[0] == fingerprints[1]


def test_files_come_in_the_order_of_their_names_and_duplicates_are_dropped(tmp_path):
    write(tmp_path, b='two', a='one', c='one', d='three', held='last', held2='two')
    found = survey(tmp_path / '*.txt', heldout_files=[f'{tmp_path}/held*.txt'])
    # 'two' is held out, so the train file with the same text goes.
    assert read(found.train) == ['one', 'three']
    assert read(found.heldout) == ['last', 'two']
    assert found.duplicates == 2


def test_the_fingerprint_changes_with_one_byte_and_not_with_the_place(tmp_path):
    fingerprints = []
    for name, last in (('one', 'x'), ('other', 'x'), ('changed', 'y')):
        (tmp_path / name).mkdir()
        write(tmp_path / name, a='a\n' * 50, b='b\n' * 50 + last)
        fingerprints.append(survey(tmp_path / name / '*.txt').fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_relative_globs_and_plain_paths_give_the_same_documents(tmp_path, monkeypatch):
    write(tmp_path, a='a\n' * 50, b='b\n' * 50)
    monkeypatch.chdir(tmp_path)
    expected = survey(tmp_path / '*.txt').fingerprint
    assert survey('*.txt').fingerprint == expected
    assert survey('b.txt', 'a.txt', './a.txt').fingerprint == expected


def test_the_tail_of_a_single_file_is_held_out_at_a_line_and_the_log_says_so(tmp_path, caplog):
    text = ''.join(f'line {i} é\n' for i in range(100))
    write(tmp_path, only=text)
    with caplog.at_level('INFO', logger='jaxfm'):
        found = survey(tmp_path / 'only.txt', heldout_fraction=0.1)
    (train,), (heldout,) = read(found.train), read(found.heldout)
    assert train + heldout == text
    assert heldout.startswith('line ') and 0.08 < len(heldout) / len(text) < 0.12
    assert 'last 0.1 of each is held out' in caplog.text


def test_the_tail_of_a_file_of_one_line_is_cut_between_characters(tmp_path):
    for text in ('漢字' * 20, 'é' * 3, '\U0001f600' * 5):
        write(tmp_path, only=text)
        found = survey(tmp_path / 'only.txt', heldout_fraction=0.3)
        (train,), (heldout,) = read(found.train), read(found.heldout)
        assert train and heldout and train + heldout == text


@pytest.mark.parametrize(
    'pattern, said',
    [
        ('{}/missing/*.txt', 'nearest directory is {}'),
        ('{}/a.text', 'nearest directory is {}'),
        ('{}/**/*.md', 'nearest directory is {}'),
        ('{}', 'is a directory'),
    ],
)
def test_a_glob_that_matches_nothing_is_named(tmp_path, pattern, said):
    write(tmp_path, a='text')
    pattern = pattern.format(tmp_path)
    with pytest.raises(MissingInputError) as error:
        survey(pattern)
    assert pattern in str(error.value) and said.format(tmp_path) in str(error.value)


def test_heldout_globs_that_match_nothing_are_an_error_too(tmp_path):
    write(tmp_path, a='text')
    with pytest.raises(MissingInputError, match='nothing.txt'):
        survey(tmp_path / '*.txt', heldout_files=[f'{tmp_path}/nothing.txt'])


def test_an_empty_file_is_named(tmp_path):
    write(tmp_path, a='text', b='  \n')
    with pytest.raises(DataError, match='b.txt is empty'):
        survey(tmp_path / '*.txt')


def test_invalid_utf8_is_named_with_its_offset(tmp_path):
    write(tmp_path, a='text', b='é'.encode() + b'ab\xff')
    with pytest.raises(DataError, match='b.txt is not UTF-8: byte 0xff at offset 4'):
        survey(tmp_path / '*.txt')


def test_an_unreadable_file_is_a_matter_of_permission(tmp_path, monkeypatch):
    write(tmp_path, a='text')

    def refuse(path):
        raise PermissionError(13, 'Permission denied', os.fspath(path))

    # A mode would not stop root, who runs some test machines.
    monkeypatch.setattr(Path, 'read_bytes', refuse)
    with pytest.raises(PermissionDeniedError, match='a.txt'):
        survey(tmp_path / '*.txt')


def test_all_files_held_out_is_an_error(tmp_path):
    write(tmp_path, a='text')
    with pytest.raises(DataError, match='none is left to train on'):
        survey(tmp_path / '*.txt', heldout_files=[f'{tmp_path}/*.txt'])


def test_a_file_that_changes_after_the_survey_is_noticed(tmp_path):
    write(tmp_path, a='text\n' * 50, b='other\n' * 50)
    found = survey(tmp_path / '*.txt')
    write(tmp_path, a='tExt\n' * 50, b='0ther\n' * 50)
    with pytest.raises(DataError, match='has changed'):
        found.train[0].read()

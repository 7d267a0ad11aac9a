"""Atomic writes: no error and no kill leaves a partial file or directory under its name."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from jaxfm.storage import whole
from jaxfm.storage.whole import (
    make_directory,
    publish,
    remove_directory,
    write_directory,
    write_file,
)

KILLED = """
import os, signal, sys
from pathlib import Path
from jaxfm.storage import whole

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

path = Path(sys.argv[2])
if sys.argv[1] == 'file':
    os.replace = die
    with whole.write_file(path) as file:
        file.write(b'new')
else:
    whole.publish = die
    with whole.write_directory(path) as directory:
        (directory / 'one').write_bytes(b'new')
"""


def kill_before_rename(kind, path):
    run = subprocess.run([sys.executable, '-c', KILLED, kind, str(path)])
    assert run.returncode == -signal.SIGKILL


def test_a_file_is_replaced_only_when_complete(tmp_path):
    path = tmp_path / 'a.json'
    path.write_bytes(b'old')
    with write_file(path) as file:
        file.write(b'new')
        assert path.read_bytes() == b'old'
    assert path.read_bytes() == b'new'
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_before_the_rename_leaves_the_old_file(tmp_path):
    path = tmp_path / 'a.json'
    path.write_bytes(b'old')
    kill_before_rename('file', path)
    assert path.read_bytes() == b'old'
    # The next write ignores the temporary file that was left.
    with write_file(path) as file:
        file.write(b'next')
    assert path.read_bytes() == b'next'


def test_an_error_removes_the_temporary_file_and_keeps_the_old_one(tmp_path):
    path = tmp_path / 'a.json'
    path.write_bytes(b'old')
    with pytest.raises(ZeroDivisionError), write_file(path) as file:
        file.write(b'half')
        raise ZeroDivisionError
    assert path.read_bytes() == b'old'
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_fsynced_before_it_is_renamed(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda fd: calls.append(os.fstat(fd).st_size) or fsync(fd))
    monkeypatch.setattr(os, 'replace', lambda *names: calls.append('renamed') or replace(*names))
    with write_file(tmp_path / 'a.json') as file:
        file.write(b'four')
    assert calls == [4, 'renamed']


def test_an_exclusive_file_is_not_replaced(tmp_path):
    path = tmp_path / 'a.json'
    with write_file(path, exclusive=True) as file:
        file.write(b'first')
    with pytest.raises(FileExistsError), write_file(path, exclusive=True) as file:
        file.write(b'second')
    assert path.read_bytes() == b'first'
    assert list(tmp_path.iterdir()) == [path]


def test_the_error_that_is_raised_is_the_first_one(tmp_path):
    (tmp_path / 'a').write_bytes(b'no directory')
    with pytest.raises(NotADirectoryError), write_file(tmp_path / 'a' / 'b'):
        pass


def test_concurrent_writers_leave_the_content_of_one_of_them(tmp_path):
    path, barrier = tmp_path / 'a.json', threading.Barrier(8)

    def write(value):
        with write_file(path) as file:
            file.write(bytes([value]) * 1000)
            barrier.wait()

    threads = [threading.Thread(target=write, args=(value,)) for value in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = path.read_bytes()
    assert len(content) == 1000 and len(set(content)) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_gets_its_name_only_when_complete(tmp_path):
    directory = tmp_path / 'cache'
    with write_directory(directory) as temporary:
        (temporary / 'one').write_text('1')
        assert not directory.exists()
    assert (directory / 'one').read_text() == '1'
    assert list(tmp_path.iterdir()) == [directory]


def test_a_kill_before_the_rename_leaves_no_directory(tmp_path):
    kill_before_rename('directory', tmp_path / 'cache')
    assert not (tmp_path / 'cache').exists()


@pytest.mark.parametrize('within', ['', 'partial'])
def test_an_error_removes_the_temporary_directory(tmp_path, within):
    place = tmp_path / within
    place.mkdir(exist_ok=True)
    with pytest.raises(ZeroDivisionError), write_directory(tmp_path / 'cache', place) as temporary:
        assert temporary.parent == place
        (temporary / 'one').write_text('1')
        raise ZeroDivisionError
    assert list(place.iterdir()) == []


def test_a_missing_parent_directory_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), write_directory(tmp_path / 'gone' / 'part'):
        pass
    assert list(tmp_path.iterdir()) == []


def test_if_two_processes_make_a_directory_the_first_is_kept(tmp_path):
    directory = tmp_path / 'cache'
    with write_directory(directory) as second:
        (second / 'by').write_text('second')
        with write_directory(directory) as first:
            (first / 'by').write_text('first')
    assert (directory / 'by').read_text() == 'first'
    assert list(tmp_path.iterdir()) == [directory]


def test_a_failed_publish_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / 'none', tmp_path / 'cache')


def test_a_removed_directory_loses_its_name_first(tmp_path, monkeypatch):
    directory = tmp_path / 'cache'
    directory.mkdir()

    def stop(path):
        assert not directory.exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(whole.shutil, 'rmtree', stop)
        remove_directory(directory)
    directory.mkdir()
    remove_directory(directory)
    assert not directory.exists()


def test_every_directory_that_is_made_is_synced_in_its_parent(tmp_path, monkeypatch):
    """Otherwise a power cut could take the directory of a checkpoint and leave nothing of it."""
    synced = []
    monkeypatch.setattr(whole, 'sync_directory', synced.append)
    make_directory(tmp_path / 'run' / 'checkpoints' / '7')
    assert (tmp_path / 'run' / 'checkpoints' / '7').is_dir()
    assert synced == [tmp_path, tmp_path / 'run', tmp_path / 'run' / 'checkpoints']
    make_directory(tmp_path / 'run' / 'checkpoints' / '7')
    assert len(synced) == 3

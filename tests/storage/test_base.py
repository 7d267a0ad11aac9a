"""The storage contract: a directory, a bucket on a real server and one in memory behave alike."""

import contextlib
import errno
import os
import shutil
import tempfile
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tensorstore as ts

from jaxfm.errors import (
    ConfigError,
    MissingInputError,
    PermissionDeniedError,
    StorageError,
    UnavailableError,
)
from jaxfm.storage import open_storage, s3
from jaxfm.storage.posix import PosixStorage
from tests.fault_proxy import Fault, LoseReply, Status, is_write


def at_moto(request, monkeypatch):
    for name in [name for name in os.environ if name.startswith('AWS_')]:
        monkeypatch.delenv(name)
    monkeypatch.setenv('AWS_ENDPOINT_URL', request.getfixturevalue('moto_server'))
    monkeypatch.setenv('AWS_ACCESS_KEY_ID', 'anyone')
    monkeypatch.setenv('AWS_SECRET_ACCESS_KEY', 'anything')


@pytest.fixture(params=['disk', 's3', 'moto'])
def place(request, tmp_path, monkeypatch):
    """A storage with nothing in it."""
    if request.param == 'disk':
        return str(tmp_path / 'run')
    if request.param == 's3':
        request.getfixturevalue('s3_environment')
    else:
        at_moto(request, monkeypatch)
    return f's3://bucket/{uuid.uuid4().hex}/run'


@pytest.fixture
def storage(place):
    return open_storage(place)


@pytest.fixture
def disk(tmp_path):
    return PosixStorage(tmp_path / 'run')


@pytest.fixture
def bucket(s3_environment):
    return open_storage(f's3://bucket/{uuid.uuid4().hex}')


def sizes(storage, prefix=''):
    return {name: stored.size for name, stored in storage.list(prefix).items()}


# The contract.


def test_a_new_place_is_empty_and_readable(storage):
    storage.check_readable()
    assert storage.list() == storage.list('7') == {}
    assert list(storage.empty_directories()) == []
    with pytest.raises(FileNotFoundError):
        storage.read('7/commit.json')
    storage.remove('7')


def test_prepare_leaves_no_files_behind(storage):
    storage.prepare()
    storage.prepare()
    assert storage.list() == {}
    storage.check_readable()


@pytest.mark.parametrize('data', [b'', b'\x00\xff\n\r\n', os.urandom(3_000_000)])
def test_what_is_written_is_read(storage, data):
    storage.write('7/attempt/manifest.json', data)
    assert storage.read('7/attempt/manifest.json') == data
    assert sizes(storage) == {'7/attempt/manifest.json': len(data)}


@pytest.mark.parametrize('name', ['a b/c+d', 'größe/ü', '100%/a=b&c', 'x/.hidden'])
def test_any_name_will_do(storage, name):
    storage.write(name, b'data')
    assert storage.read(name) == b'data'
    assert sizes(storage, name.split('/')[0]) == {name: 4}
    storage.remove(name)
    assert storage.list() == {}


def test_a_write_replaces_what_was_there(storage):
    storage.write('lease/1.json', b'longer than the next')
    storage.write('lease/1.json', b'next')
    assert storage.read('lease/1.json') == b'next'
    assert sizes(storage) == {'lease/1.json': 4}


def test_an_exclusive_write_replaces_nothing(storage):
    storage.write('lease/1.json', b'first', exclusive=True)
    with pytest.raises(FileExistsError):
        storage.write('lease/1.json', b'second', exclusive=True)
    assert storage.read('lease/1.json') == b'first'
    assert sizes(storage) == {'lease/1.json': 5}
    storage.remove('lease/1.json')
    storage.write('lease/1.json', b'second', exclusive=True)
    assert storage.read('lease/1.json') == b'second'


def test_one_of_many_concurrent_exclusive_writes_wins(storage):
    barrier = threading.Barrier(8)

    def write(index):
        barrier.wait()
        try:
            storage.write('lease/1.json', f'{index}'.encode(), exclusive=True)
            return index
        except FileExistsError:
            return None

    with ThreadPoolExecutor(8) as pool:
        (winner,) = [index for index in pool.map(write, range(8)) if index is not None]
    assert storage.read('lease/1.json') == f'{winner}'.encode()


def test_nobody_reads_half_a_write(storage):
    contents = [bytes([letter]) * 300_000 for letter in b'ab']
    storage.write('file', contents[0])
    done = threading.Event()

    def write():
        for index in range(30):
            storage.write('file', contents[index % 2])
        done.set()

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        while not done.is_set() and not writing.done():
            assert storage.read('file') in contents
        writing.result()


def test_a_listing_matches_directories_not_name_prefixes(storage):
    names = ['7/commit.json', '7/a/state/d/x', '70/commit.json', '7.json', 'lease/1.json']
    for name in names:
        storage.write(name, name.encode())
    assert sizes(storage) == {name: len(name) for name in names}
    assert storage.list('7').keys() == {'7/commit.json', '7/a/state/d/x'}
    assert storage.list('7/a/state').keys() == {'7/a/state/d/x'}
    assert all(stored.modified > 1e9 for stored in storage.list().values())


def test_removing_a_directory_removes_its_contents_and_nothing_else(storage):
    names = ['7/commit.json', '7/a/state/d/x', '70/commit.json', '7.json']
    for name in names:
        storage.write(name, b'data')
    storage.remove('7/commit.json')
    assert storage.list().keys() == {'7/a/state/d/x', '70/commit.json', '7.json'}
    storage.remove('7')
    storage.remove('7')
    assert storage.list().keys() == {'70/commit.json', '7.json'}
    storage.write('7/commit.json', b'again', exclusive=True)


def test_two_places_side_by_side_share_nothing(storage, place):
    beside = open_storage(f'{place}-2')
    storage.write('7/commit.json', b'one')
    beside.write('7/commit.json', b'two', exclusive=True)
    beside.write('8/commit.json', b'two')
    assert storage.list().keys() == {'7/commit.json'}
    beside.remove('7')
    assert storage.read('7/commit.json') == b'one'


def test_a_place_is_the_same_with_a_slash_at_its_end(storage, place):
    storage.write('7/commit.json', b'data')
    again = open_storage(f'{place}/')
    assert again.root == storage.root == place
    assert again.read('7/commit.json') == b'data'


def test_tensorstore_sees_the_same_files(storage):
    storage.write('7/a/state/by/storage', b'one')
    kvstore = ts.KvStore.open(storage.kvstore('7/a/state')).result()
    kvstore.write('by/tensorstore', b'three').result()
    assert kvstore.read('by/storage').result().value == b'one'
    assert sorted(kvstore.list().result()) == [b'by/storage', b'by/tensorstore']
    assert sizes(storage) == {'7/a/state/by/storage': 3, '7/a/state/by/tensorstore': 5}


# A disk.


def test_a_url_with_another_scheme_is_rejected():
    with pytest.raises(ConfigError, match='want a directory path or s3://bucket/prefix'):
        open_storage('gs://bucket/run')
    with pytest.raises(ConfigError, match='want s3://bucket/prefix'):
        open_storage('s3://')


def test_free_bytes_are_known_before_the_directory_exists(disk, tmp_path):
    assert abs(disk.free_bytes() - shutil.disk_usage(tmp_path).free) < 2**30


def test_a_file_instead_of_the_directory_is_an_error(disk):
    disk.directory.write_text('a file')
    for storage in (disk, PosixStorage(disk.directory / 'below')):
        for use in (
            storage.prepare,
            storage.check_readable,
            lambda storage=storage: storage.write('lease/1.json', b'', exclusive=True),
            lambda storage=storage: storage.read('lease/1.json'),
        ):
            with pytest.raises(ConfigError, match='is not a directory'):
                use()
    assert disk.directory.read_text() == 'a file'


def test_a_file_instead_of_a_step_directory_is_not_taken_for_a_commit(disk):
    disk.write('7', b'notes')
    for exclusive in (True, False):
        with pytest.raises(ConfigError, match='run/7 is not a directory'):
            disk.write('7/commit.json', b'', exclusive=exclusive)


def test_a_failed_write_keeps_the_old_content(disk, monkeypatch):
    disk.write('lease/1.json', b'old')

    def full(descriptor):
        raise OSError(errno.ENOSPC, 'No space left on device')

    for exclusive, name in ((False, 'lease/1.json'), (True, 'lease/2.json')):
        with monkeypatch.context() as patch, pytest.raises(StorageError, match='is full: No space'):
            patch.setattr(os, 'fsync', full)
            disk.write(name, b'new', exclusive=exclusive)
    assert sizes(disk) == {'lease/1.json': 3}
    assert disk.read('lease/1.json') == b'old'


@pytest.mark.parametrize('exclusive', [False, True])
def test_a_new_name_is_on_the_disk_when_a_write_returns(disk, monkeypatch, exclusive):
    """A name outlives a power cut only if its directory is synced after the rename."""
    path, fsync, synced = disk.directory / '7/commit.json', os.fsync, []
    disk.write('7/manifest.json', b'data')

    def note(descriptor):
        is_directory = os.path.samestat(os.fstat(descriptor), path.parent.stat())
        synced.append(('directory' if is_directory else 'file', path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, 'fsync', note)
    disk.write('7/commit.json', b'data', exclusive=exclusive)
    assert synced == [('file', False), ('directory', True)]


def test_removing_the_last_file_removes_its_directory(disk):
    disk.write('7/a/x', b'')
    disk.write('7/y', b'')
    disk.remove('7/a/x')
    assert os.listdir(disk.directory / '7') == ['y']
    disk.remove('7/y')
    assert os.listdir(disk.directory) == []


def test_a_directory_just_removed_by_another_process_is_recreated(disk, monkeypatch):
    disk.prepare()
    mkdir = Path.mkdir

    def removed_at_once(path, *arguments, **options):
        monkeypatch.undo()
        mkdir(path, *arguments, **options)
        path.rmdir()

    monkeypatch.setattr(Path, 'mkdir', removed_at_once)
    disk.write('lease/2.json', b'data', exclusive=True)
    assert disk.read('lease/2.json') == b'data'


def test_empty_directories_are_listed(disk):
    disk.write('7/a/state/d/x', b'')
    for name in ('7/b/state', '8', '7/a/none'):
        (disk.directory / name).mkdir(parents=True)
    assert set(disk.empty_directories()) == {'7/b', '7/b/state', '8', '7/a/none'}


@pytest.fixture
def foreign():
    """A directory of another user, with a file and a step; root acts as yet another user."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    user = os.geteuid()
    storage = PosixStorage(directory / 'run')
    storage.write('7/commit.json', b'data')
    storage.write('8/commit.json', b'data')
    if user == 0:
        os.seteuid(65534)

    def allow(mode, *names):
        os.seteuid(user)
        for name in names:
            (storage.directory / name).chmod(mode)
        if user == 0:
            os.seteuid(65534)

    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory)
        stack.callback(lambda: allow(0o755, '', '7', '8') or os.seteuid(user))
        yield storage, allow


def test_a_read_only_directory_can_be_read_but_not_written(foreign):
    storage, allow = foreign
    allow(0o555, '7', '8', '')
    assert storage.read('7/commit.json') == b'data'
    assert storage.list().keys() == {'7/commit.json', '8/commit.json'}
    storage.check_readable()
    for use in (
        storage.prepare,
        lambda: storage.write('9/commit.json', b''),
        lambda: storage.write('7/commit.json', b'', exclusive=True),
        lambda: storage.remove('7/commit.json'),
        lambda: storage.remove('7'),
    ):
        with pytest.raises(PermissionDeniedError, match='run cannot be written: Permission denied'):
            use()


def test_an_unreadable_directory_is_neither_empty_nor_missing(foreign):
    storage, allow = foreign
    allow(0o000, '8')
    for use in (storage.list, lambda: storage.read('8/commit.json')):
        with pytest.raises(PermissionDeniedError, match='run cannot be read: Permission denied'):
            use()
    allow(0o000, '')
    for use in (storage.list, storage.check_readable, lambda: storage.read('7/commit.json')):
        with pytest.raises(PermissionDeniedError, match='run cannot be read: Permission denied'):
            use()
    with pytest.raises(PermissionDeniedError, match='below cannot be read: Permission denied'):
        PosixStorage(storage.directory / 'deep' / 'below').free_bytes()


# S3.


@pytest.mark.parametrize('server', ['s3', 'moto'])
def test_many_objects_are_listed_and_deleted_page_by_page(request, monkeypatch, server):
    if server == 's3':
        request.getfixturevalue('s3_environment')
    else:
        at_moto(request, monkeypatch)
    storage = open_storage(f's3://bucket/{uuid.uuid4().hex}')
    call, calls = storage._call, []

    def in_small_pages(operation, **arguments):
        calls.append(operation)
        return call(operation, **arguments, **{'MaxKeys': 2} if 'list' in operation else {})

    monkeypatch.setattr(storage, '_call', in_small_pages)
    monkeypatch.setattr('jaxfm.storage.s3._MOST_DELETED', 3)
    names = {f'7/{index}' for index in range(7)}
    for name in [*names, '8/0']:
        storage.write(name, b'data')
    assert storage.list('7').keys() == names
    assert calls.count('list_objects_v2') == 4
    storage.remove('7')
    assert calls.count('delete_objects') == 3
    assert storage.list().keys() == {'8/0'}


def test_an_exclusive_write_whose_reply_is_lost_counts_as_ours(bucket, fault_proxy, monkeypatch):
    monkeypatch.setenv('AWS_ENDPOINT_URL', fault_proxy.endpoint)
    behind = open_storage(bucket.root)
    fault = fault_proxy.add(Fault(LoseReply(), when=is_write, times=1))
    behind.write('lease/1.json', b'ours', exclusive=True)
    assert fault.hits == 1 and fault_proxy.counts['PUT', 412] == 1
    assert bucket.read('lease/1.json') == b'ours'
    with pytest.raises(FileExistsError):
        bucket.write('lease/1.json', b'theirs', exclusive=True)


def test_a_second_exclusive_write_whose_reply_is_lost_does_not_count_as_ours(
    bucket, fault_proxy, monkeypatch
):
    monkeypatch.setenv('AWS_ENDPOINT_URL', fault_proxy.endpoint)
    bucket.write('lease/1.json', b'theirs')
    fault_proxy.add(Fault(LoseReply(), when=is_write, times=1))
    with pytest.raises(FileExistsError):
        open_storage(bucket.root).write('lease/1.json', b'ours', exclusive=True)
    assert bucket.read('lease/1.json') == b'theirs'


def test_retried_requests_are_counted(bucket, fault_proxy, monkeypatch):
    monkeypatch.setenv('AWS_ENDPOINT_URL', fault_proxy.endpoint)
    behind = open_storage(bucket.root)
    before = behind.retries()
    fault_proxy.add(Fault(Status(503), when=is_write, times=2))
    behind.write('7/commit.json', b'data')
    assert behind.retries() == before + 2


def test_read_only_credentials_read_and_write_nothing(bucket, monkeypatch):
    bucket.write('7/commit.json', b'data')
    monkeypatch.setenv('AWS_ACCESS_KEY_ID', 'reader')
    reader = open_storage(bucket.root)
    reader.check_readable()
    assert reader.read('7/commit.json') == b'data'
    assert reader.list().keys() == {'7/commit.json'}
    for use in (
        reader.prepare,
        lambda: reader.write('8/commit.json', b'', exclusive=True),
        lambda: reader.remove('7'),
    ):
        with pytest.raises((PermissionDeniedError, StorageError)) as caught:
            use()
        assert 'Access Denied' in str(caught.value) or 'AccessDenied' in str(caught.value)
    assert bucket.list().keys() == {'7/commit.json'}


@pytest.mark.parametrize(
    ('variable', 'value'), [('AWS_ACCESS_KEY_ID', 'other'), ('AWS_SECRET_ACCESS_KEY', 'wrong')]
)
def test_credentials_without_read_access_get_a_permission_error(
    bucket, monkeypatch, variable, value
):
    bucket.write('7/commit.json', b'data')
    monkeypatch.setenv(variable, value)
    stranger = open_storage(bucket.root)
    for use in (stranger.check_readable, stranger.list, lambda: stranger.read('7/commit.json')):
        with pytest.raises(PermissionDeniedError, match='no permission to use bucket bucket at '):
            use()


def test_a_missing_bucket_is_a_missing_input(s3_environment):
    storage = open_storage('s3://no-such-bucket/run')
    for use in (storage.check_readable, storage.list, lambda: storage.read('x')):
        with pytest.raises(MissingInputError, match='there is no bucket no-such-bucket at http'):
            use()


def test_a_missing_server_is_unavailable(s3_environment, monkeypatch):
    monkeypatch.setattr('jaxfm.storage.s3.TRIES', 1)
    monkeypatch.setenv('AWS_ENDPOINT_URL', 'http://127.0.0.1:9')
    storage = open_storage('s3://bucket/run')
    for use in (storage.list, lambda: storage.read('x'), storage.prepare):
        with pytest.raises(UnavailableError, match='at http://127.0.0.1:9 cannot be reached'):
            use()


def test_a_path_is_the_same_for_tensorstore_in_every_locale(tmp_path, monkeypatch):
    assert PosixStorage(tmp_path / 'ü').kvstore('1')['path'] == f'{tmp_path}/ü/1/'
    monkeypatch.setattr(os, 'fsencode', lambda path: str(path).encode('ascii', 'surrogateescape'))
    assert PosixStorage(tmp_path / '\udcc3\udcbc').kvstore('1')['path'] == f'{tmp_path}/ü/1/'
    with pytest.raises(ConfigError, match='is not UTF-8, which TensorStore needs'):
        PosixStorage(tmp_path / '\udcfc')


def test_credentials_are_private_where_the_system_has_no_files_in_memory(monkeypatch):
    monkeypatch.delattr(os, 'memfd_create')  # macOS
    descriptor, path = s3._open_private_file()
    try:
        assert os.stat(path).st_mode & 0o077 == 0
        os.pwrite(descriptor, b'secret', 0)
        assert Path(path).read_bytes() == b'secret'
    finally:
        s3._remove_private_file(path)
        os.close(descriptor)
    assert not os.path.exists(path)

import gzip
import io
import os
import socket
import time

import pytest

from jaxfm.data import FilesConfig
from jaxfm.data.sources.files import Files
from jaxfm.errors import DataError, MissingInputError, PermissionDeniedError, UnavailableError
from jaxfm.storage import find
from tests.runs import PATIENCE

TEXT = ''.join(f'{{"text": "line {i} é"}}\n' for i in range(5000)).encode()


def found(*patterns):
    return find.find([str(pattern) for pattern in patterns], 'config.data.path')


def read(file):
    with file.open() as stream:
        return stream.read()


def zstd(*contents):
    zstandard = pytest.importorskip('zstandard')
    return b''.join(zstandard.ZstdCompressor().compress(content) for content in contents)


def test_compressed_files_read_as_their_contents(tmp_path):
    (tmp_path / 'a.jsonl').write_bytes(TEXT)
    (tmp_path / 'b.jsonl.gz').write_bytes(gzip.compress(TEXT))
    (tmp_path / 'c.jsonl.zst').write_bytes(zstd(TEXT))
    (tmp_path / 'd.jsonl.zst').write_bytes(zstd(TEXT[:1000], TEXT[1000:]))
    files = found(tmp_path / '*')
    assert [file.suffix for file in files] == ['.jsonl'] * 4
    assert [read(file) for file in files] == [TEXT] * 4


@pytest.mark.parametrize('suffix', ['gz', 'zst'])
def test_a_truncated_compressed_file_is_an_error(tmp_path, suffix):
    content = gzip.compress(TEXT) if suffix == 'gz' else zstd(TEXT)
    for length in (len(content) - 1, len(content) // 2, 10):
        (tmp_path / f'a.jsonl.{suffix}').write_bytes(content[:length])
        with pytest.raises(DataError, match=f'a.jsonl.{suffix} is damaged or cut off'):
            read(*found(tmp_path / f'a.jsonl.{suffix}'))


@pytest.mark.parametrize('suffix', ['gz', 'zst'])
def test_an_uncompressed_file_with_a_compression_suffix_is_an_error(tmp_path, suffix):
    pytest.importorskip('zstandard')
    (tmp_path / f'a.{suffix}').write_bytes(TEXT)
    with pytest.raises(DataError, match=f'a.{suffix} is damaged'):
        read(*found(tmp_path / f'a.{suffix}'))


@pytest.mark.parametrize(
    'pattern, said',
    [
        ('{}/missing/*.txt', 'nearest existing directory is {}'),
        ('{}/a.text', 'nearest existing directory is {}'),
        ('{}/**/*.md', 'nearest existing directory is {}'),
        ('{}', 'is a directory'),
    ],
)
def test_a_glob_that_matches_nothing_is_named(tmp_path, pattern, said):
    (tmp_path / 'a.txt').write_text('text')
    pattern = pattern.format(tmp_path)
    with pytest.raises(MissingInputError) as error:
        found(pattern)
    assert pattern in str(error.value) and said.format(tmp_path) in str(error.value)
    assert str(error.value).startswith('config.data.path: ')


def test_names_are_relative_to_the_part_before_wildcards_and_unique(tmp_path):
    for name in ('one/deep/a.txt', 'one/b.txt', 'two/b.txt'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [file.name for file in found(f'{tmp_path}/one/**/*.txt')] == ['b.txt', 'deep/a.txt']
    both = found(f'{tmp_path}/one/**/*.txt', f'{tmp_path}/two/*', f'{tmp_path}/one/b.txt')
    assert {file.name for file in both} == {
        'deep/a.txt',
        f'{tmp_path}/one/b.txt',
        f'{tmp_path}/two/b.txt',
    }


def test_a_file_that_changes_while_it_is_in_use_is_noticed(tmp_path):
    path = tmp_path / 'a.txt'
    path.write_text('text')
    (file,) = found(path)
    path.write_text('tExt')
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match='a.txt has changed'):
        read(file)
    path.unlink()
    with pytest.raises(MissingInputError, match='a.txt cannot be read: No such file'):
        read(file)


def test_an_unreadable_file_is_a_permission_error(tmp_path, monkeypatch):
    (tmp_path / 'a.txt').write_text('text')
    (file,) = found(tmp_path / 'a.txt')

    # File modes do not stop root, as which some test machines run.
    def refuse(*_, **__):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(io, 'open', refuse)
    monkeypatch.setattr('builtins.open', refuse)
    with pytest.raises(PermissionDeniedError, match='a.txt'):
        read(file)


def test_a_missing_package_is_named_with_the_install_command():
    with pytest.raises(MissingInputError, match=r"needs the package no_such: pip.*'jaxfm\[data\]'"):
        find.extra('no_such.module')


def test_a_bucket_reads_as_a_directory_does(s3, tmp_path):
    contents = {'web/a.jsonl': TEXT, 'web/more/b.jsonl.gz': gzip.compress(TEXT), 'web/c.md': b'#'}
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
        s3.pipe(f'bucket/{name}', content)
    for pattern in ('web/**/*.jsonl*', 'web/a.jsonl', 'web/*.jsonl'):
        here, there = found(tmp_path / pattern), found(f's3://bucket/{pattern}')
        assert [file.name for file in there] == [file.name for file in here]
        assert [read(file) for file in there] == [read(file) for file in here]
    before = found('s3://bucket/web/a.jsonl')
    s3.pipe('bucket/web/a.jsonl', TEXT.replace(b'line 7', b'line 8'))
    assert found('s3://bucket/web/a.jsonl')[0].stamp != before[0].stamp


def test_records_in_a_bucket_are_those_on_disk_in_every_format(s3, tmp_path, monkeypatch):
    monkeypatch.setattr('jaxfm.data.sources.formats.SHARD_BYTES', 30_000)
    pyarrow = pytest.importorskip('pyarrow')
    parquet = pytest.importorskip('pyarrow.parquet')
    writer = pytest.importorskip('array_record.python.array_record_module').ArrayRecordWriter
    table = pyarrow.table({'text': [f'row {i}' for i in range(3000)]})
    parquet.write_table(table, tmp_path / 'a.parquet', row_group_size=700)
    records = writer(str(tmp_path / 'b.array_record'), 'group_size:1')
    for i in range(100):
        records.write(f'{{"text": "record {i}"}}'.encode())
    records.close()
    (tmp_path / 'c.jsonl').write_bytes(TEXT)
    (tmp_path / 'd.jsonl.zst').write_bytes(zstd(TEXT))
    for path in sorted(tmp_path.iterdir()):
        s3.put(str(path), f'bucket/formats/{path.name}')
        here, there = (
            Files(FilesConfig(path=f'{place}/{path.name}'))
            for place in (tmp_path, 's3://bucket/formats')
        )
        expected = [one for shard in here.shards() for one in here.read(shard)]
        assert [one for shard in there.shards() for one in there.read(shard)] == expected
        assert len(expected) == {'a': 3000, 'b': 100}.get(path.name[0], 5000)


@pytest.mark.parametrize(
    'pattern, said',
    [
        ('s3://absent/*.jsonl', 'bucket absent at http://127'),
        ('s3://bucket/absent/*.jsonl', "no object matches 's3://bucket/absent"),
        ('s3://bucket/absent.jsonl', "no object matches 's3://bucket/absent.jsonl'"),
    ],
)
def test_a_missing_object_is_named_with_the_endpoint(s3, pattern, said):
    with pytest.raises(MissingInputError, match=said) as error:
        found(pattern)
    assert 'http://127.0.0.1' in str(error.value)


@pytest.mark.parametrize('pattern', ['s3://bucket/started', 's3://bucket/*'])
@pytest.mark.parametrize('key, secret', [('key', 'wrong'), ('other', 'secret'), ('none', 'none')])
def test_a_key_without_read_access_is_a_permission_error(s3, monkeypatch, key, secret, pattern):
    monkeypatch.setenv('AWS_ACCESS_KEY_ID', key)
    monkeypatch.setenv('AWS_SECRET_ACCESS_KEY', secret)
    with pytest.raises(PermissionDeniedError, match='bucket bucket at http://127.0.0.1'):
        found(pattern)


def test_missing_credentials_are_a_permission_error(s3, monkeypatch):
    monkeypatch.delenv('AWS_ACCESS_KEY_ID')
    monkeypatch.delenv('AWS_SECRET_ACCESS_KEY')
    with pytest.raises(PermissionDeniedError, match='no credentials for bucket bucket'):
        found('s3://bucket/started')


def test_a_truncated_or_deleted_object_is_named(s3):
    s3.pipe('bucket/cut.jsonl.gz', gzip.compress(TEXT)[:-9])
    (file,) = found('s3://bucket/cut.jsonl.gz')
    with pytest.raises(DataError, match='s3://bucket/cut.jsonl.gz is damaged or cut off'):
        read(file)
    s3.rm('bucket/cut.jsonl.gz')
    with pytest.raises(MissingInputError, match='s3://bucket/cut.jsonl.gz does not exist'):
        read(file)


def test_a_missing_server_is_unavailable_at_once(s3, monkeypatch):
    monkeypatch.setenv('AWS_ENDPOINT_URL', 'http://127.0.0.1:9')
    started = time.monotonic()
    with pytest.raises(UnavailableError, match='bucket bucket at http://127.0.0.1:9'):
        found('s3://bucket/*.jsonl')
    assert time.monotonic() - started < PATIENCE / 4


def test_a_server_that_does_not_answer_is_unavailable_after_a_while(s3, monkeypatch):
    monkeypatch.setattr(find, 'READ_TIMEOUT', 1)
    with socket.create_server(('127.0.0.1', 0)) as server:
        monkeypatch.setenv('AWS_ENDPOINT_URL', f'http://127.0.0.1:{server.getsockname()[1]}')
        started = time.monotonic()
        with pytest.raises(UnavailableError, match='cannot be reached'):
            found('s3://bucket/a.jsonl')
        assert time.monotonic() - started < PATIENCE / 4

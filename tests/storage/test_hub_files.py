"""Data on the Hugging Face hub (hf://), with a file system in a directory in its place."""

import gzip
import io
import json
from pathlib import Path

import pytest

from jaxfm.data import FilesConfig
from jaxfm.data.sources.files import Files
from jaxfm.errors import MissingInputError, PermissionDeniedError, UnavailableError
from jaxfm.storage import find

fsspec = pytest.importorskip('fsspec')
huggingface_hub = pytest.importorskip('huggingface_hub')
RECORDS = [{'text': f'record {number}'} for number in range(50)]


class GatedRepoError(Exception):
    """Named as the hub's error, which cannot be made without an answer of it."""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The directory that is served as hf://."""

    class StandIn(fsspec.AbstractFileSystem):
        """The calls of huggingface_hub.HfFileSystem that are used, and the entries it returns."""

        protocol, cachable = 'hf', False

        def ls(self, path, detail=True, **options):
            place = tmp_path / self._strip_protocol(path)
            if 'gated' in place.parts:
                raise GatedRepoError('401')
            if 'offline' in place.parts:
                raise huggingface_hub.errors.OfflineModeIsEnabled('HF_HUB_OFFLINE')
            if not place.exists():
                raise FileNotFoundError(path)
            found = sorted(place.iterdir()) if place.is_dir() else [place]
            entries = [self._entry(each) for each in found]
            return entries if detail else [entry['name'] for entry in entries]

        def _entry(self, path):
            size = path.stat().st_size
            kind = 'directory' if path.is_dir() else 'file'
            name = path.relative_to(tmp_path).as_posix()
            return {'name': name, 'size': size, 'type': kind, 'blob_id': f'blob of {size} bytes'}

        def _open(self, path, mode='rb', block_size=None, **options):
            assert mode == 'rb'
            return io.BytesIO((tmp_path / path).read_bytes())

    monkeypatch.setattr(huggingface_hub, 'HfFileSystem', StandIn)
    find.hub.cache_clear()
    yield tmp_path
    find.hub.cache_clear()


def write(path: Path, records) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = ''.join(json.dumps(record) + '\n' for record in records).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == '.gz' else content)


def read(path, **more):
    source = Files(FilesConfig(path=path, **more))
    pairs = [pair for shard in source.shards() for pair in source.read(shard)]
    return source, [(is_heldout, document.text) for is_heldout, document in pairs]


def test_files_on_the_hub_are_read_as_those_on_disk(hub, tmp_path):
    pyarrow = pytest.importorskip('pyarrow')
    repository = hub / 'datasets' / 'org' / 'name@main'
    write(repository / 'a.jsonl', RECORDS[:20])
    write(repository / 'more' / 'b.jsonl.gz', RECORDS[20:40])
    table = pyarrow.Table.from_pylist(RECORDS[40:])
    pytest.importorskip('pyarrow.parquet').write_table(table, repository / 'more' / 'c.parquet')
    source, pairs = read('hf://datasets/org/name@main/**')
    assert sorted(text for _, text in pairs) == sorted(record['text'] for record in RECORDS)
    _, local = read(f'{repository}/**')
    assert pairs == local
    names = [file.name for file, _ in source.files()]
    assert names == ['a.jsonl', 'more/b.jsonl.gz', 'more/c.parquet']
    before = source.fingerprint()
    write(repository / 'a.jsonl', RECORDS[:19])
    assert read('hf://datasets/org/name@main/**')[0].fingerprint() != before


def test_array_records_are_copied_to_disk_first(hub):
    module = pytest.importorskip('array_record.python.array_record_module')
    path = hub / 'datasets' / 'org' / 'name' / 'a.array_record'
    path.parent.mkdir(parents=True)
    writer = module.ArrayRecordWriter(str(path), 'group_size:1')
    for record in RECORDS:
        writer.write(json.dumps(record).encode())
    writer.close()
    _, pairs = read('hf://datasets/org/name/a.array_record')
    assert [text for _, text in pairs] == [record['text'] for record in RECORDS]


@pytest.mark.parametrize(
    ('path', 'error', 'said'),
    [
        ('datasets/org/name/b*.jsonl', MissingInputError, 'data.path: no file matches .*ORG/NAME'),
        ('datasets/org/other/*.jsonl', MissingInputError, 'other.* is not on the hub, or is priv'),
        ('datasets/org/name', MissingInputError, r'is a directory; .*/\*\*/\*.txt'),
        ('datasets/gated/name/a.jsonl', PermissionDeniedError, 'accept its licence.*HF_TOKEN'),
        ('datasets/offline/name/a.jsonl', UnavailableError, 'cannot be reached .*HF_HUB_OFFLINE'),
    ],
)
def test_what_cannot_be_read_is_told_in_a_line(hub, path, error, said):
    write(hub / 'datasets' / 'org' / 'name' / 'a.jsonl', RECORDS)
    with pytest.raises(error, match=said) as raised:
        read(f'hf://{path}')
    assert '\n' not in str(raised.value)


@pytest.mark.parametrize('path', ['', 'squad', 'datasets', 'datasets/', 'spaces', '*'])
def test_what_is_no_repository_is_told_by_the_real_file_system(path):
    find.hub.cache_clear()
    try:
        with pytest.raises(MissingInputError, match='write hf://datasets/ORG/NAME.@REV') as raised:
            read(f'hf://{path}')
    finally:
        find.hub.cache_clear()
    assert '\n' not in str(raised.value)


def test_without_the_extra_there_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'huggingface_hub', None)
    find.hub.cache_clear()
    with pytest.raises(MissingInputError) as raised:
        read('hf://datasets/org/name/a.jsonl')
    said = "this needs the package huggingface_hub: pip install 'jaxfm[hub]'"
    assert str(raised.value) == said and raised.value.exit_code == 66

"""Documents of a class of the user's own, such as any grain.RandomAccessDataSource."""

import os
import pickle

import grain
import numpy as np
import pydantic
import pytest

from jaxfm import code
from jaxfm.data import DATA, SOURCES, FilesConfig
from jaxfm.data.corpus.build import open_corpus
from jaxfm.data.dataset import open_dataset
from jaxfm.data.sources import files, random_access
from jaxfm.data.sources.random_access import RandomAccess
from jaxfm.errors import ConfigError, DataError, MissingInputError
from jaxfm.registry import OneOf
from jaxfm.tokenizer import BytesConfig
from jaxfm.tokenizer.build import Bytes

MODULE = '''
from pathlib import Path


class Numbers:
    """Texts; with a version of its own."""

    def __init__(self, count, word='word', *, version=''):
        self.count, self.word, self.version = count, word, version
        if version == 'missing':
            open('/no/such/file')
        if version == 'broken':
            raise ValueError('no such version')

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return f'{self.word} {index} ' * (index % 7 + 1)

    def fingerprint(self):
        return self.version


class Elements:
    """The elements that it is given as JSON; those of a list are turned into bytes."""

    fingerprint = 'fixed'

    def __init__(self, elements):
        self.elements = elements

    def __len__(self):
        return len(self.elements)

    def __getitem__(self, index):
        element = self.elements[index]
        return bytes(element) if isinstance(element, list) else element


class Failing(Elements):
    def __getitem__(self, index):
        raise OSError('the disk is gone')


class Any:
    def __init__(self, **more):
        pass

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return 'a' * (1 + index)


class Lines:
    """The lines of a text file, or of several."""

    def __init__(self, path):
        paths = [path] if isinstance(path, str) else path
        texts = [Path(one).read_text(encoding='utf-8') for one in paths]
        self.lines = [line for text in texts for line in text.splitlines()]

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, index):
        return self.lines[index]


def make(count=3):
    return Numbers(count)


class Iterable:
    def __iter__(self):
        return iter('abc')


class Bare:
    pass
'''


@pytest.fixture(scope='module')
def name(tmp_path_factory):
    """The module of the classes."""
    directory = tmp_path_factory.mktemp('mine')
    (directory / 'random_lab.py').write_text(MODULE, 'utf-8')
    code.search_beside(directory)
    return 'random_lab'


@pytest.fixture(scope='module')
def bytes_tokenizer():
    return Bytes(BytesConfig(), ())


def config_of(name, arguments, registry=SOURCES, **more):
    adapter = pydantic.TypeAdapter(OneOf(registry).find_schema(name))
    return adapter.validate_python({'name': name, 'arguments': arguments} | more)


def read(config):
    source = SOURCES.load(config.name)(config)
    return [pair for shard in source.shards() for pair in source.read(shard)]


def test_a_grain_source_needs_no_config_of_its_own(name):
    found = SOURCES.find(f'{name}:Numbers')
    assert found.load() is RandomAccess
    assert isinstance(SOURCES.load(f'{name}:Numbers'), type)
    module = code.import_module(f'{name}:Numbers')
    assert isinstance(module.Numbers(3), grain.sources.RandomAccessDataSource)


def test_a_run_trains_on_it_through_the_cache(name, bytes_tokenizer, tmp_path):
    arguments = {'count': 300, 'word': 'text'}
    config = config_of(f'{name}:Numbers', arguments, DATA, sequence_length=32, batch_size=8)
    data = open_dataset(config, bytes_tokenizer, tmp_path)
    statistics = data.statistics
    assert statistics['train_documents'] + statistics['heldout_documents'] == 300
    text = bytes_tokenizer.decode(data.batches(seed=0).next(None, 0)['tokens'][0].tolist())
    assert 'text' in text
    (made,) = tmp_path.iterdir()
    open_dataset(config, bytes_tokenizer, tmp_path)
    assert [*tmp_path.iterdir()] == [made]


def test_on_the_fly_gives_the_same_documents(name, bytes_tokenizer, tmp_path):
    more = {'sequence_length': 32, 'batch_size': 8, 'tokenize': 'on_the_fly'}
    config = config_of(f'{name}:Numbers', {'count': 300}, DATA, **more)
    batch = open_dataset(config, bytes_tokenizer, tmp_path).batches(seed=0).next(None, 0)
    train = [document.text for is_heldout, document in read(config) if not is_heldout]
    assert bytes_tokenizer.decode(batch['tokens'].ravel().tolist())[:40] in ''.join(train)


def test_text_bytes_and_records_become_the_documents_that_jsonl_has(name, tmp_path):
    chat = [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'ho'}]
    elements = ['a text', list('bytes ü'.encode()), {'body': 'of a record'}]
    fields = {'text': 'body'}
    found = read(config_of(f'{name}:Elements', {'elements': elements}, fields=fields))
    assert [document.text for _, document in found] == ['a text', 'bytes ü', 'of a record']
    assert [document.name for _, document in found] == ['0', '1', '2']
    records = [{'prompt': 'p', 'completion': f'c{i}'} for i in range(4)] + [{'messages': chat}]
    found = read(config_of(f'{name}:Elements', {'elements': records}))
    path = tmp_path / 'records.jsonl'
    path.write_text(''.join(f'{files.json.dumps(record)}\n' for record in records), 'utf-8')
    source = files.Files(FilesConfig(path=str(path)))
    expected = [pair for shard in source.shards() for pair in source.read(shard)]
    assert [(side, d.messages) for side, d in found] == [(side, d.messages) for side, d in expected]


def test_a_hash_of_the_content_decides_what_is_held_out(name, monkeypatch):
    monkeypatch.setattr(random_access, 'SHARD_ELEMENTS', 700)
    found = read(config_of(f'{name}:Numbers', {'count': 2000}, heldout_fraction=0.1))
    assert 150 < sum(side for side, _ in found) < 250 and len(found) == 2000
    again = read(config_of(f'{name}:Numbers', {'count': 1500}, heldout_fraction=0.1))
    assert again == found[:1500]
    few = read(config_of(f'{name}:Numbers', {'count': 4}, heldout_fraction=1e-6))
    assert sum(side for side, _ in few) == 1


def test_the_cache_is_of_this_class_these_arguments_this_length_and_its_fingerprint(name):
    def digest(kind, **arguments):
        return RandomAccess(config_of(f'{name}:{kind}', arguments)).fingerprint()

    first = digest('Numbers', count=3)
    assert digest('Numbers', count=3) == first
    others = [
        digest('Numbers', count=4),
        digest('Numbers', count=3, word='other'),
        digest('Numbers', count=3, version='2'),
        digest('Elements', elements=['a', 'b', 'c']),
        digest('Elements', elements=['a', 'b', 'd']),
    ]
    assert len({first, *others}) == 6


def lines_of(path, bad=None, count=200):
    """Writes lines, all of the same length; that of number `bad` differs."""
    lines = [f'line {n:03} {"other" if n == bad else "texts"}\n' for n in range(count)]
    path.parent.mkdir(exist_ok=True)
    path.write_text(''.join(lines), 'utf-8')


@pytest.mark.parametrize('bad', [0, 40, 199])
@pytest.mark.parametrize('listed', [False, True])
def test_a_file_that_is_written_again_is_read_again(name, tmp_path, listed, bad):
    """As many lines and bytes as before: its time tells, or the elements."""
    path = tmp_path / 'data.txt'
    argument = [str(path)] if listed else str(path)

    def digest():
        return RandomAccess(config_of(f'{name}:Lines', {'path': argument})).fingerprint()

    lines_of(path)
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    first = digest()
    assert digest() == first
    lines_of(path, bad)
    os.utime(path, ns=(times[0], times[1] + (0 if bad in (0, 199) else 1)))
    assert digest() != first


def test_a_relative_path_is_that_of_this_directory(name, tmp_path, monkeypatch):
    digests = set()
    for directory, bad in (('a', None), ('b', 3)):
        lines_of(tmp_path / directory / 'data.txt', bad)
        os.utime(tmp_path / directory / 'data.txt', ns=(0, 0))
        monkeypatch.chdir(tmp_path / directory)
        digests.add(RandomAccess(config_of(f'{name}:Lines', {'path': 'data.txt'})).fingerprint())
    assert len(digests) == 2


def test_elements_that_change_without_a_file_are_noticed(name, bytes_tokenizer, tmp_path):
    module = code.import_module(f'{name}:Numbers')
    config = config_of(f'{name}:Numbers', {'count': 50}, DATA, sequence_length=8, batch_size=8)
    open_dataset(config, bytes_tokenizer, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Numbers, '__getitem__', lambda self, index: f'a new text {index}')
        data = open_dataset(config, bytes_tokenizer, tmp_path)
    train = data.sources[config.name].train
    assert 'new' in bytes_tokenizer.decode(train.tokens[:50].tolist())


ARRAY_RECORDS = 'grain.sources:ArrayRecordDataSource'


def test_array_records_that_are_written_again_are_read_again(tmp_path):
    module = pytest.importorskip('array_record.python.array_record_module')
    path, digests = tmp_path / 'a.array_record', set()
    for word in ('one', 'two'):
        writer = module.ArrayRecordWriter(str(path), 'group_size:1')
        for index in range(20):
            writer.write(f'{word} {index}'.encode())
        writer.close()
        os.utime(path, ns=(0, 0))
        digests.add(RandomAccess(config_of(ARRAY_RECORDS, {'paths': str(path)})).fingerprint())
    assert len(digests) == 2


@pytest.mark.parametrize('listed', [False, True])
def test_a_file_of_array_records_that_is_missing_is_named(tmp_path, listed):
    pytest.importorskip('array_record')
    path = str(tmp_path / 'a.array_record')
    config = config_of(ARRAY_RECORDS, {'paths': [path] if listed else path})
    with pytest.raises(MissingInputError) as raised:
        RandomAccess(config).files()
    assert str(raised.value) == f'{ARRAY_RECORDS}: {path} does not exist'


@pytest.mark.parametrize(
    ('kind', 'said'),
    [
        ('Iterable', 'is not random access .*: it has no __len__ and no __getitem__ .nor an attr'),
        ('Bare', 'is not random access .a grain.RandomAccessDataSource.: it has no __len__'),
        ('Missing', 'has no Missing'),
        ('make', 'random_lab:make is no class, but a function'),
    ],
)
def test_a_class_that_is_no_source_is_refused_in_one_line(name, kind, said):
    for registry in (SOURCES, DATA):
        with pytest.raises(ConfigError, match=said) as raised:
            registry.find(f'{name}:{kind}')
        assert '\n' not in str(raised.value) and raised.value.exit_code == 78


@pytest.mark.parametrize(
    ('kind', 'arguments', 'said'),
    [
        ('Numbers', {'count': 3, 'wrod': 'x'}, 'no such argument: random_lab:Numbers takes count'),
        ('Numbers', {}, "missing a required argument: 'count'"),
        ('Numbers', {'count': 3, 'word': object()}, 'JSON'),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(name, kind, arguments, said):
    with pytest.raises(pydantic.ValidationError, match=said):
        config_of(f'{name}:{kind}', arguments)
    assert config_of(f'{name}:Any', {'whatever': 1}).arguments == {'whatever': 1}


@pytest.mark.parametrize(
    ('element', 'said'),
    [
        (3, 'element 1: a int is not a document: it must be a str, bytes of UTF-8, or a dict'),
        ('  ', 'element 1: it is empty'),
        ([0xFF], 'element 1: its bytes are not UTF-8'),
        ({'body': 'x'}, 'element 1: no text, no messages.*it has: body; set config.data.fields'),
        ('\ud800', 'element 1: not valid Unicode'),
    ],
)
def test_an_element_that_is_no_document_is_named(name, element, said):
    elements = ['one', element, 'two']
    with pytest.raises(DataError, match=said) as raised:
        read(config_of(f'{name}:Elements', {'elements': elements}))
    assert '\n' not in str(raised.value) and 'max_bad_records from 0' in str(raised.value)
    kept = read(config_of(f'{name}:Elements', {'elements': elements}, max_bad_records=1))
    assert [document.text for _, document in kept] == ['one', 'two']


def test_errors_of_the_class_say_where(name, bytes_tokenizer, tmp_path):
    for arguments, error, said in (
        ({'count': 3, 'version': 'broken'}, DataError, r'random_lab.py:\d+: ValueError: no such'),
        ({'count': 3, 'version': 'missing'}, MissingInputError, 'FileNotFoundError: .*no/such/fil'),
        ({'count': 0}, DataError, 'random_lab:Numbers has no elements'),
    ):
        with pytest.raises(error, match=said) as raised:
            open_corpus(config_of(f'{name}:Numbers', arguments), bytes_tokenizer, tmp_path)
        assert '\n' not in str(raised.value)
    with pytest.raises(DataError, match=r'element 0: .*random_lab.py:\d+: OSError: the disk is'):
        read(config_of(f'{name}:Failing', {'elements': ['a']}))


def test_its_config_travels_to_other_processes(name):
    config = config_of(f'{name}:Numbers', {'count': 3}, DATA, sequence_length=32, batch_size=8)
    assert pickle.loads(pickle.dumps(config)) == config
    assert np.isclose(config.heldout_fraction, 0.05)

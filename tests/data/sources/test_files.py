import gzip
import json
import os
import pickle

import pytest

from jaxfm.data import FieldsConfig, FilesConfig
from jaxfm.data.sources.files import Files
from jaxfm.errors import DataError, MissingInputError

RECORDS = [{'text': f'record {i} é'} for i in range(400)]


def source(*paths, **options):
    options = {
        key: list(map(str, value)) if key == 'heldout_path' else value
        for key, value in options.items()
    }
    return Files(FilesConfig(path=[str(path) for path in paths], **options))


def read(made):
    return [one for shard in made.shards() for one in made.read(shard)]


def sides(made):
    """(texts of the train documents, texts of the held-out ones)."""
    found = read(made)
    return [d.text for held, d in found if not held], [d.text for held, d in found if held]


def write(directory, suffix='txt', **texts):
    for name, text in texts.items():
        content = text if isinstance(text, bytes) else text.encode()
        (directory / f'{name}.{suffix}').write_bytes(content)


def lines(records):
    return ''.join(json.dumps(record, ensure_ascii=False) + '\n' for record in records).encode()


def write_parquet(path, records, row_group_size=None):
    pyarrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=row_group_size)


def write_array_record(path, records):
    module = pytest.importorskip('array_record.python.array_record_module')
    writer = module.ArrayRecordWriter(str(path), 'group_size:1')
    for line in records:
        writer.write(line if isinstance(line, bytes) else json.dumps(line).encode())
    writer.close()


# Text files.


def test_text_files_are_read_in_the_order_of_their_names(tmp_path):
    write(tmp_path, b='two', a='one', c='three', held='last')
    made = source(tmp_path / '*.txt', heldout_path=[tmp_path / 'held*'])
    assert sides(made) == (['one', 'two', 'three'], ['last'])
    assert [document.name for _, document in read(made)] == ['a.txt', 'b.txt', 'c.txt', 'held.txt']


def test_the_side_of_a_text_depends_on_its_name_alone(tmp_path):
    write(tmp_path, **{f'f{i}': f'text {i}' for i in range(40)})
    before = sides(source(tmp_path / '*.txt', heldout_fraction=0.3))
    assert min(map(len, before)) > 3
    for i in range(0, 40, 2):
        (tmp_path / f'f{i}.txt').unlink()
    after = sides(source(tmp_path / '*.txt', heldout_fraction=0.3))
    assert all(set(now) <= set(then) for now, then in zip(after, before))


def test_the_tail_of_a_single_text_is_held_out_at_a_line_and_the_log_says_so(tmp_path, caplog):
    text = ''.join(f'line {i} é\n' for i in range(100))
    write(tmp_path, only=text)
    with caplog.at_level('INFO', logger='jaxfm'):
        (train,), (heldout,) = sides(source(tmp_path / 'only.txt', heldout_fraction=0.1))
    assert train + heldout == text
    assert heldout.startswith('line ') and 0.08 < len(heldout) / len(text) < 0.12
    assert 'last 0.1 of each is held out' in caplog.text


def test_the_tail_of_a_text_of_one_line_is_cut_between_characters(tmp_path):
    for text in ('漢字' * 20, 'é' * 3, '\U0001f600' * 5):
        write(tmp_path, only=text)
        (train,), (heldout,) = sides(source(tmp_path / 'only.txt', heldout_fraction=0.3))
        assert train and heldout and train + heldout == text


def test_small_texts_are_read_together_and_big_ones_alone(tmp_path, monkeypatch):
    monkeypatch.setattr('jaxfm.data.sources.formats.SHARD_BYTES', 100)
    write(tmp_path, a='x' * 40, b='x' * 40, c='x' * 40, d='x' * 400, e='x')
    shards = source(tmp_path / '*.txt').shards()
    names = [[file.name[0] for file, _ in shard.files] for shard in shards]
    assert names == [['a', 'b', 'c'], ['d'], ['e']]


@pytest.mark.parametrize(
    'content, said',
    [(b'  \n', 'b.txt is empty'), (b'\xc3\xa9ab\xff', 'b.txt is not UTF-8: byte 0xff at offset 4')],
)
def test_a_bad_text_is_named_or_left_out(tmp_path, content, said):
    write(tmp_path, a='text', b=content, held='held')
    held = [tmp_path / 'held.txt']
    with pytest.raises(DataError, match=said):
        read(source(tmp_path / '*.txt', heldout_path=held))
    made = source(tmp_path / '*.txt', heldout_path=held, max_bad_records=1)
    assert sides(made) == (['text'], ['held'])
    assert list(made.bad_records) == ['b.txt']


def test_no_file_to_train_on_is_an_error(tmp_path):
    write(tmp_path, a='text')
    with pytest.raises(DataError, match='none is left to train on'):
        source(tmp_path / '*.txt', heldout_path=[tmp_path / '*.txt']).files()


def test_heldout_globs_that_match_nothing_are_an_error_too(tmp_path):
    write(tmp_path, a='text')
    with pytest.raises(MissingInputError, match='config.data.heldout_path: .*nothing.txt'):
        source(tmp_path / '*.txt', heldout_path=[tmp_path / 'nothing.txt']).files()


# Records.


@pytest.fixture
def formats(tmp_path):
    """{format: path} of files that all contain RECORDS."""
    (tmp_path / 'a.jsonl').write_bytes(lines(RECORDS))
    (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress(lines(RECORDS)))
    write_parquet(tmp_path / 'a.parquet', RECORDS, row_group_size=64)
    write_array_record(tmp_path / 'a.array_record', RECORDS)
    return sorted(tmp_path.iterdir())


def test_the_same_records_are_on_the_same_side_in_every_format(formats):
    expected = None
    for path in formats:
        made = source(path, heldout_fraction=0.2)
        train, heldout = sides(made)
        assert sorted(train + heldout) == sorted(record['text'] for record in RECORDS)
        assert 40 < len(heldout) < 120
        expected = expected or (train, heldout)
        assert (train, heldout) == expected
        assert read(made)[16][1].name == f'{path.name}:17'


@pytest.mark.parametrize('size', [1, 50, 64, 1000])
def test_shards_of_a_file_have_each_record_once(formats, size, monkeypatch):
    whole = {path: [d.text for _, d in read(source(path))] for path in formats}
    monkeypatch.setattr('jaxfm.data.sources.formats.SHARD_BYTES', size)
    for path in formats:
        made = source(path)
        documents = [document for _, document in read(made)]
        assert [document.text for document in documents] == whole[path]
        assert len({document.name for document in documents}) == len(documents)
        is_whole = path.suffix == '.gz'
        assert (len(made.shards()) == 1) == is_whole
        assert [pickle.loads(pickle.dumps(shard)) for shard in made.shards()] == made.shards()


def test_lines_may_end_as_on_any_system_and_the_last_one_not_at_all(tmp_path, monkeypatch):
    content = b'\xef\xbb\xbf{"text": "a"}\r\n\r\n\n{"text": "b"}\n   \n{"text": "c"}'
    write(tmp_path, 'jsonl', a=content)
    for size in (1000, 7):
        monkeypatch.setattr('jaxfm.data.sources.formats.SHARD_BYTES', size)
        assert [d.text for _, d in read(source(tmp_path / 'a.jsonl'))] == ['a', 'b', 'c']


def test_equal_records_are_on_the_same_side_in_any_place(tmp_path):
    write(tmp_path, 'jsonl', a=lines(RECORDS), b=lines(reversed(RECORDS)))
    both = [source(tmp_path / f'{name}.jsonl', heldout_fraction=0.3) for name in 'ab']
    assert [set(side) for side in sides(both[0])] == [set(side) for side in sides(both[1])]


def test_records_of_heldout_files_are_held_out(tmp_path):
    write(tmp_path, 'jsonl', a=lines(RECORDS[:5]), b=lines(RECORDS[5:7]))
    train, heldout = sides(source(tmp_path / '*.jsonl', heldout_path=[tmp_path / 'b.jsonl']))
    assert (len(train), len(heldout)) == (5, 2)


BAD = {
    'not JSON': b'{"text": "x"',
    'with rejected; it has: body, id; set config.data.fields': b'{"body": "x", "id": 1}',
    'is not UTF-8: byte 0xe9 at offset 10': b'{"text": "\xe9"}',
    'lone surrogate': b'{"text": "\\ud800"}',
    'the record is a list, not an object': b'[1]',
    "unknown role 'wizard'": b'{"messages": [{"role": "wizard", "content": "x"}]}',
    'nested': b'[' * 100_000,
    'digits': b'{"text": ' + b'1' * 5000 + b'}',
}


@pytest.mark.parametrize('said', BAD)
def test_a_bad_line_is_named_with_its_number(tmp_path, said, monkeypatch):
    content = lines(RECORDS[:16]) + BAD[said] + b'\n' + lines(RECORDS[16:])
    write(tmp_path, 'jsonl', a=content)
    (tmp_path / 'b.jsonl.gz').write_bytes(gzip.compress(content))
    expected = 'not JSON: maximum recursion|not JSON: .*' if said in ('nested', 'digits') else said
    for name, size in (('a.jsonl', 1 << 20), ('a.jsonl', 100), ('a.jsonl', 371), ('b.jsonl.gz', 9)):
        monkeypatch.setattr('jaxfm.data.sources.formats.SHARD_BYTES', size)
        with pytest.raises(DataError, match=rf'{name}:17: .*({expected})'):
            read(source(tmp_path / name))
        made = source(tmp_path / name, max_bad_records=1)
        assert len(read(made)) == len(RECORDS) and len(made.bad_records) == 1


def test_a_shard_that_begins_with_a_line_counts_it_once(tmp_path, monkeypatch):
    good = [b'{"text": "%03d"}\n' % i for i in range(40)]
    good[16] = b'{"text": "016" \n'
    write(tmp_path, 'jsonl', a=b''.join(good))
    monkeypatch.setattr('jaxfm.data.sources.formats.SHARD_BYTES', 4 * len(good[0]))
    made = source(tmp_path / 'a.jsonl', max_bad_records=1)
    texts = [document.text for _, document in read(made)]
    assert texts == [f'{i:03}' for i in range(40) if i != 16]
    with pytest.raises(DataError, match='a.jsonl:17: not JSON'):
        read(source(tmp_path / 'a.jsonl'))


def test_as_many_bad_records_as_allowed_are_left_out_and_the_next_one_is_the_error(tmp_path):
    bad = [b'{\n' if i % 7 == 3 else lines(RECORDS[i : i + 1]) for i in range(30)]
    write(tmp_path, 'jsonl', a=b''.join(bad))
    made = source(tmp_path / 'a.jsonl', max_bad_records=4)
    assert len(read(made)) == 26
    assert len(read(made)) == 26, 'reading it again must count nothing twice'
    with pytest.raises(DataError, match=r'a.jsonl:25: .*\(3 bad records before it were left out\)'):
        read(source(tmp_path / 'a.jsonl', max_bad_records=3))


def test_a_bad_row_and_a_bad_record_are_named_with_their_number(tmp_path):
    rows = [{'text': f'{i}'} for i in range(20)]
    rows[16] = {'text': None}
    write_parquet(tmp_path / 'a.parquet', rows, row_group_size=5)
    with pytest.raises(DataError, match='a.parquet:17: field text is null'):
        read(source(tmp_path / 'a.parquet'))
    write_parquet(tmp_path / 'b.parquet', [{'body': 'x', 'id': 1}])
    with pytest.raises(DataError, match='b.parquet:1: no text, .* it has: body, id'):
        read(source(tmp_path / 'b.parquet'))
    write_array_record(tmp_path / 'a.array_record', [*RECORDS[:4], b'{'])
    with pytest.raises(DataError, match='a.array_record:5: not JSON'):
        read(source(tmp_path / 'a.array_record'))


def test_chats_in_parquet_equal_those_in_jsonl(tmp_path):
    chats = [
        {'messages': [{'role': 'user', 'content': f'{i}'}, {'role': 'assistant', 'content': 'ok'}]}
        for i in range(20)
    ]
    write_parquet(tmp_path / 'a.parquet', chats)
    write(tmp_path, 'jsonl', a=lines(chats))
    one, other = (
        [(held, document.messages) for held, document in read(source(tmp_path / f'a.{suffix}'))]
        for suffix in ('parquet', 'jsonl')
    )
    assert one == other


@pytest.mark.parametrize('suffix', ['parquet', 'array_record'])
def test_a_cut_off_file_of_records_is_named(formats, suffix):
    path = next(path for path in formats if path.suffix == f'.{suffix}')
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=f'a.{suffix} is damaged or cut off'):
        read(source(path))


@pytest.mark.parametrize('content', [b'', b'\n \n\n'])
@pytest.mark.parametrize('suffix', ['jsonl', 'jsonl.gz', 'array_record'])
def test_an_empty_file_of_records_is_named(tmp_path, suffix, content):
    path = tmp_path / f'a.{suffix}'
    if suffix == 'array_record':
        write_array_record(path, [])
    else:
        path.write_bytes(gzip.compress(content) if suffix.endswith('gz') else content)
    with pytest.raises(DataError, match=f'a.{suffix} is empty'):
        read(source(path))


def test_an_empty_parquet_file_is_named(tmp_path):
    pyarrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    parquet.write_table(pyarrow.table({'text': pyarrow.array([], 'str')}), tmp_path / 'a.parquet')
    with pytest.raises(DataError, match='a.parquet is empty'):
        read(source(tmp_path / 'a.parquet'))


def test_a_json_file_needs_a_format(tmp_path):
    (tmp_path / 'a.json').write_bytes(lines(RECORDS))
    with pytest.raises(DataError, match='a.json.*Set config.data.format to text or jsonl'):
        source(tmp_path / 'a.json').files()
    assert len(read(source(tmp_path / 'a.json', format='jsonl'))) == len(RECORDS)


def test_the_fingerprint_changes_with_a_file_and_not_with_the_place(tmp_path):
    found = []
    for name, last in (('one', 'x'), ('other', 'x'), ('changed', 'xy')):
        (tmp_path / name).mkdir()
        write(tmp_path / name, a='a\n' * 50, b='b\n' * 50 + last)
        for path in (tmp_path / name).iterdir():
            os.utime(path, ns=(1, 1))
        found.append(source(tmp_path / name / '*.txt').fingerprint())
    os.utime(path, ns=(2, 2))
    found.append(source(tmp_path / 'changed' / '*.txt').fingerprint())
    assert found[0] == found[1] and len(set(found)) == 3
    other = source(tmp_path / 'one' / '*.txt', heldout_fraction=0.3).fingerprint()
    assert other != found[0]


def test_neither_listing_nor_fingerprint_reads_contents(tmp_path, monkeypatch):
    write(tmp_path, a='text', b='text')
    write(tmp_path, 'jsonl', c=lines(RECORDS))
    monkeypatch.setattr('builtins.open', None)
    made = source(tmp_path / '*')
    assert made.fingerprint() and len(made.files()) == 3 and made.shards()


@pytest.mark.parametrize('pattern, count', [('*/*.jsonl.gz', 318), ('*/*.txt.gz', 4)])
def test_real_text_is_read(shared_data, pattern, count):
    made = Files(FilesConfig(path=f'{shared_data}/pretrain_{pattern}', fields=FieldsConfig()))
    documents = read(made)
    assert len(documents) == count and min(d.num_bytes for _, d in documents) > 0


def test_a_parquet_file_damaged_in_its_middle_is_named(tmp_path):
    path = tmp_path / 'a.parquet'
    write_parquet(path, RECORDS)
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(1996)
    path.write_bytes(content)
    with pytest.raises(DataError, match='a.parquet is damaged or cut off'):
        read(source(path))

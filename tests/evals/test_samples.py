"""The append-only file of samples: what a kill leaves, and who may go on with it."""

import json
import logging

import pytest

from jaxfm.errors import DataError, MissingInputError, PermissionDeniedError
from jaxfm.evals.samples import Samples, differences, read_samples

HEADER = {'task': {'name': 'gsm8k', 'num_prompts': 3}, 'options': {'stop': ('\n',)}, 'seed': 7}


def record(index, **more):
    return {'id': f'q{index}', 'sample_index': index, 'score': 1.0, **more}


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'evals' / 'gsm8k-000005.jsonl'


def lines(path):
    return [json.loads(line) for line in path.read_text('utf-8').splitlines()]


def test_each_sample_is_in_the_file_as_soon_as_it_is_added(path):
    with Samples(path, HEADER) as samples:
        for index in range(2):
            samples.add(record(index, completion='é\n\ud800'))
            assert len(lines(path)) == index + 2
    header, records = read_samples(path)
    assert header == json.loads(json.dumps(HEADER))
    assert records == samples.records == [record(i, completion='é\n\ud800') for i in range(2)]


def test_an_interrupted_evaluation_keeps_its_samples_and_drops_a_torn_line(path, caplog):
    with Samples(path, HEADER, goes_on=True) as samples:
        samples.add(record(0))
        samples.add(record(1))
    path.write_bytes(path.read_bytes()[:-7])  # killed while it wrote
    with Samples(path, HEADER, goes_on=True) as again:
        assert again.kept == {('q0', 0)}
        assert again.records == [record(0)]
        again.add(record(1))
        again.add(record(2))
    assert read_samples(path)[1] == [record(0), record(1), record(2)]
    assert 'the last line is torn' in caplog.text


def test_a_torn_header_begins_the_file_anew(path):
    path.parent.mkdir()
    path.write_text('{"header": {"ta', encoding='utf-8')
    with pytest.raises(DataError, match='no header'):
        read_samples(path)
    with Samples(path, HEADER, goes_on=True) as samples:
        samples.add(record(0))
    assert len(lines(path)) == 2


def test_samples_of_another_evaluation_are_refused_and_stay(path):
    with Samples(path, HEADER) as samples:
        samples.add(record(0))
    before = path.read_bytes()
    other = HEADER | {'task': {'name': 'gsm8k', 'num_prompts': 4}, 'seed': 8}
    with pytest.raises(
        DataError, match=r'task.num_prompts is 3 there, but 4 now \(2 differences\); name another'
    ):
        Samples(path, other, goes_on=True)
    assert path.read_bytes() == before


def test_in_the_loop_a_repeated_step_replaces_its_file(path):
    for score in (0.0, 1.0):
        with Samples(path, HEADER) as samples:
            samples.add(record(0) | {'score': score})
            assert samples.kept == frozenset()
    assert [one.get('score') for one in lines(path)] == [None, 1.0]


def test_a_damaged_line_before_the_last_is_named(path):
    with Samples(path, HEADER) as samples:
        samples.add(record(0))
    path.write_text('{"header": {}}\n[1]\n{"id": "a"}\n', encoding='utf-8')
    with pytest.raises(DataError, match='gsm8k-000005.jsonl:2: want a sample as a JSON object'):
        read_samples(path)
    path.write_text('{"id": "a"}\n{"id": "b"}\n', encoding='utf-8')
    with pytest.raises(DataError, match=':1: want {"header"'):
        read_samples(path)
    with pytest.raises(MissingInputError, match='there is no such file'):
        read_samples(path.with_name('other'))


def test_a_file_that_cannot_be_written_is_a_warning_in_the_loop_and_an_error_alone(
    path, tmp_path, caplog, monkeypatch
):
    def refuse(*_, **__):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr('builtins.open', refuse)
    with caplog.at_level(logging.WARNING), Samples(path, HEADER) as samples:
        samples.add(record(0))
    monkeypatch.undo()
    assert samples.records == [record(0)]
    assert len(caplog.records) == 1 and 'could not be written' in caplog.text
    path.parent.mkdir(exist_ok=True)
    monkeypatch.setattr('builtins.open', refuse)
    with pytest.raises(PermissionDeniedError):
        Samples(path, HEADER, goes_on=True)


def test_nothing_is_written_without_a_path():
    with Samples(None, HEADER) as samples:
        samples.add(record(0))
    assert samples.records == [record(0)] and samples.kept == frozenset()


def test_differences_name_every_key():
    assert differences({'a': {'b': 1}, 'c': 2}, {'a': {'b': 3}, 'd': 4}) == [
        ('a.b', 1, 3),
        ('c', 2, None),
        ('d', None, 4),
    ]

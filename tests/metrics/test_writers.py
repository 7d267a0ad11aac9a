"""metrics.jsonl: whole lines, lossless floats, and truncation on resume."""

import json
import math
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from jaxfm.errors import DataError, PermissionDeniedError, StorageError
from jaxfm.metrics.writers import JsonlWriter, Recorder, read_records


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'run' / 'metrics.jsonl'


def train_steps(recorder, first, last):
    for step in range(first, last + 1):
        recorder.write(step, 'train', {'train/loss': math.sin(step), 'train/skipped': step % 2})


def without_time(path, kinds=('train', 'eval')):
    records = [r for r in read_records(path) if r['kind'] in kinds]
    return [{k: v for k, v in r.items() if k != 'time'} for r in records]


def test_a_record_is_flat_and_the_file_says_its_schema(path):
    recorder = Recorder(JsonlWriter(path))
    recorder.phase = 'pretrain'
    recorder.write(3, 'eval', {'eval/held_out/loss': 1.5})
    recorder.close()
    head, record = (json.loads(line) for line in path.read_text().splitlines())
    assert head['kind'] == 'event' and head['schema_version'] == 1
    assert list(record) == ['step', 'phase', 'time', 'kind', 'eval/held_out/loss']
    assert (record['step'], record['phase'], record['kind']) == (3, 'pretrain', 'eval')


def test_values_come_back_bit_for_bit(path):
    values = {
        'a': 0.1 + 0.2,
        'b': np.float32(0.1),
        'c': np.int64(2**60 + 1),
        'd': np.array(1e-310),
        'e': True,
        'f': 'words "quoted"\nand broken',
        'g': None,
        'h': -0.0,
    }
    recorder = Recorder(JsonlWriter(path))
    recorder.write(1, 'train', values)
    recorder.close()
    got = list(read_records(path))[1]
    for name, value in values.items():
        assert got[name] == value and type(got[name]) in (int, float, bool, str, type(None))
    assert math.copysign(1, got['h']) == -1


def test_nan_and_infinity_are_strings_in_the_file_and_floats_when_read(path):
    recorder = Recorder(JsonlWriter(path))
    recorder.write(1, 'train', {'x': math.nan, 'y': np.float32(np.inf), 'z': -math.inf})
    recorder.close()
    line = path.read_text().splitlines()[1]
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f'{name} is not JSON'))
    assert (record['x'], record['y'], record['z']) == ('NaN', 'Infinity', '-Infinity')
    record = list(read_records(path))[1]
    assert math.isnan(record['x']) and record['y'] == math.inf and record['z'] == -math.inf


def test_a_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path):
    straight = Recorder(JsonlWriter(tmp_path / 'straight.jsonl'))
    train_steps(straight, 1, 20)
    straight.close()

    killed = Recorder(JsonlWriter(tmp_path / 'killed.jsonl'))
    train_steps(killed, 1, 10)
    position = killed.jsonl.position()
    train_steps(killed, 11, 14)
    killed.close()
    with open(tmp_path / 'killed.jsonl', 'a') as file:
        file.write('{"step": 15, "phase": "", "ti')

    resumed = Recorder(JsonlWriter(tmp_path / 'killed.jsonl'))
    resumed.jsonl.truncate(position)
    resumed.write(10, 'event', {'resumed': True})
    train_steps(resumed, 11, 20)
    resumed.close()
    assert without_time(tmp_path / 'killed.jsonl') == without_time(tmp_path / 'straight.jsonl')
    assert len(without_time(tmp_path / 'killed.jsonl')) == 20


def test_every_line_of_a_killed_process_is_there(path):
    code = (
        'import os, signal, sys\n'
        'from jaxfm.metrics.writers import JsonlWriter, Recorder\n'
        'recorder = Recorder(JsonlWriter(sys.argv[1]))\n'
        'for step in range(100):\n'
        '    recorder.write(step, "train", {"train/loss": step / 3})\n'
        'os.kill(os.getpid(), signal.SIGKILL)\n'
    )
    killed = subprocess.run([sys.executable, '-c', code, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [record['train/loss'] for record in without_time(path)] == [s / 3 for s in range(100)]


@pytest.mark.parametrize('incomplete', ['{', '{"step": 7}', 'x' * 200_000])
def test_an_incomplete_last_line_is_removed(path, incomplete):
    writer = JsonlWriter(path)
    writer.write({'step': 1})
    position = writer.position()
    writer.close()
    with open(path, 'a') as file:
        file.write(incomplete)
    assert len(list(read_records(path))) == 2
    writer = JsonlWriter(path)
    assert writer.position() == position == os.path.getsize(path)
    writer.write({'step': 2})
    writer.close()
    assert [record['step'] for record in read_records(path)] == [0, 1, 2]


def test_a_file_shorter_than_the_checkpoint_says_is_never_padded(path, caplog):
    writer = JsonlWriter(path)
    position = writer.position()
    writer.truncate(writer.end_of(5, 10_000))
    assert writer.position() == position == os.path.getsize(path)
    assert 'records are missing' in caplog.text
    writer.close()


@pytest.mark.parametrize('extra', [0, 1, 10_000])
def test_in_another_work_directory_steps_show_which_records_follow_a_checkpoint(path, extra):
    """The checkpoint's position belongs to another file, and may be anywhere in this one."""
    writer = JsonlWriter(path)
    for step in (10, 10):
        writer.write({'step': step, 'kind': 'perf'})
    end = writer.position()
    for step in (12, 14):
        writer.write({'step': step, 'kind': 'train'})
    writer.truncate(writer.end_of(10, end + extra))
    writer.close()
    assert [record['step'] for record in read_records(path)] == [0, 10, 10]


def test_a_position_within_a_line_leaves_no_partial_line(path):
    writer = JsonlWriter(path)
    writer.write({'step': 1})
    end = writer.position()
    writer.write({'step': 1, 'kind': 'event'})
    writer.truncate(writer.end_of(1, end + 3))
    writer.write({'step': 2})
    writer.close()
    assert [record['step'] for record in read_records(path)] == [0, 1, 2]


def test_cutting_back_to_the_beginning_keeps_the_schema(path):
    writer = JsonlWriter(path)
    writer.write({'step': 1})
    writer.truncate(0)
    writer.close()
    assert [record.get('schema_version') for record in read_records(path)] == [1]


def test_a_full_disk_loses_records_but_neither_the_run_nor_the_file(path, caplog):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    recorder = Recorder(JsonlWriter(path))
    train_steps(recorder, 1, 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (recorder.jsonl.position() + 20, hard))
    try:
        train_steps(recorder, 3, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    train_steps(recorder, 5, 5)
    recorder.close()
    assert [record['step'] for record in without_time(path)] == [1, 2, 5]
    assert caplog.text.count('records are lost') == 1


def test_only_the_first_process_writes(path):
    heard = []
    recorder = Recorder(JsonlWriter(path, enabled=False), ListSink(heard), enabled=False)
    train_steps(recorder, 1, 3)
    recorder.jsonl.truncate(0)
    assert recorder.jsonl.position() == 0
    recorder.close()
    assert not path.exists() and heard == []


class ListSink:
    def __init__(self, heard):
        self.heard = heard

    def write(self, record):
        self.heard.append(record['step'])

    def close(self):
        self.heard.append('closed')


class BrokenSink:
    def write(self, record):
        raise ConnectionError('no route to the tracker')

    def close(self):
        raise AssertionError('a dropped sink is left alone')


def test_a_broken_sink_warns_once_and_stops_nothing(path, caplog):
    heard = []
    recorder = Recorder(JsonlWriter(path), BrokenSink(), ListSink(heard))
    train_steps(recorder, 1, 3)
    recorder.close()
    assert heard == [1, 2, 3, 'closed']
    assert len(without_time(path)) == 3
    told = 'BrokenSink failed and gets no more records: no route to the tracker'
    assert caplog.text.count(told) == 1


def test_an_unwritable_path_is_a_run_error(tmp_path):
    with pytest.raises(PermissionDeniedError):
        JsonlWriter('/sys/jaxfm/metrics.jsonl')
    with pytest.raises(StorageError, match='Is a directory'):
        JsonlWriter(tmp_path)


def test_a_line_that_is_not_a_record_is_named(path):
    path.parent.mkdir()
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(DataError, match='metrics.jsonl, line 2, is not a record'):
        list(read_records(path))

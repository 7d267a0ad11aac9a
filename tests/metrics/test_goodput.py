"""What records tell of a process that died."""

import pytest

from jaxfm.metrics import goodput
from jaxfm.metrics.writers import JsonlWriter, Recorder


def test_records_have_every_bucket_and_the_share_of_steps():
    account = {bucket: 2.0 * index for index, bucket in enumerate(goodput.BUCKETS)}
    values = goodput.values(account)
    assert values.pop('goodput/ratio') == account['step'] / sum(account.values())
    assert sum(values.values()) == sum(account.values())
    assert list(values) == [f'goodput/{bucket}_seconds' for bucket in goodput.BUCKETS]


def test_before_any_time_the_share_of_steps_is_none():
    assert goodput.values(dict.fromkeys(goodput.BUCKETS, 0.0))['goodput/ratio'] == 0


# What a process did after its checkpoint


@pytest.fixture
def recorder(tmp_path):
    recorder = Recorder(JsonlWriter(tmp_path / 'metrics.jsonl'))
    yield recorder
    recorder.close()


def test_the_last_record_after_the_checkpoint_tells_when_a_process_died(recorder):
    path = recorder.jsonl.path
    recorder.write(1, 'perf', {'perf/elapsed_seconds': 10.0})
    position = recorder.jsonl.position()
    assert goodput.last_elapsed(path, position) == 0
    recorder.write(2, 'perf', {'perf/elapsed_seconds': 20.0})
    recorder.write(3, 'perf', {'perf/elapsed_seconds': 30.0})
    recorder.write(3, 'train', {'train/loss': 3.0})
    assert goodput.last_elapsed(path, position) == 30


def test_what_a_run_did_after_its_last_step_is_no_sign_of_death(recorder):
    position = recorder.jsonl.position()
    recorder.write(3, 'event', {'perf/elapsed_seconds': 30.0})
    assert goodput.last_elapsed(recorder.jsonl.path, position) == 0


@pytest.mark.parametrize(
    'rest', [b'\0' * 64 + b'\n', b'{"step": 3, "kind": "perf", "perf/el'], ids=['zeros', 'torn']
)
def test_what_a_power_failure_leaves_ends_the_search(recorder, rest):
    recorder.write(2, 'perf', {'perf/elapsed_seconds': 20.0})
    with open(recorder.jsonl.path, 'ab') as file:
        file.write(rest)
    assert goodput.last_elapsed(recorder.jsonl.path, 0) == 20


def test_records_that_are_shorter_than_at_the_checkpoint_or_gone_tell_nothing(recorder, tmp_path):
    recorder.write(2, 'perf', {'perf/elapsed_seconds': 20.0})
    assert goodput.last_elapsed(recorder.jsonl.path, 10_000) == 0
    assert goodput.last_elapsed(tmp_path / 'nothing', 10) == 0

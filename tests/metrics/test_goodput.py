"""When a dead process was last seen in the records; the best checkpoint interval."""

import math
import random

import pytest

from jaxfm.metrics import goodput
from jaxfm.metrics.writers import JsonlWriter, Recorder

DAY = 86_400


def test_records_have_every_bucket_and_the_share_of_what_trains():
    account = {bucket: 2.0 * index for index, bucket in enumerate(goodput.BUCKETS)}
    values = goodput.values(account)
    assert values.pop('goodput/ratio') == (account['step'] + account['generate']) / sum(
        account.values()
    )
    assert sum(values.values()) == sum(account.values())
    assert list(values) == [f'goodput/{bucket}_seconds' for bucket in goodput.BUCKETS]


def test_without_any_time_the_share_of_steps_is_zero():
    assert goodput.values(dict.fromkeys(goodput.BUCKETS, 0.0))['goodput/ratio'] == 0


# Time of a process after its last checkpoint


@pytest.fixture
def recorder(tmp_path):
    recorder = Recorder(JsonlWriter(tmp_path / 'metrics.jsonl'))
    yield recorder
    recorder.close()


def test_the_last_record_after_the_checkpoint_shows_when_a_process_died(recorder):
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
    'rest',
    [b'\0' * 64 + b'\n', b'{"step": 3, "kind": "perf", "perf/el'],
    ids=['zeros', 'incomplete'],
)
def test_the_search_stops_at_records_damaged_by_a_power_failure(recorder, rest):
    recorder.write(2, 'perf', {'perf/elapsed_seconds': 20.0})
    with open(recorder.jsonl.path, 'ab') as file:
        file.write(rest)
    assert goodput.last_elapsed(recorder.jsonl.path, 0) == 20


def test_records_that_are_shorter_than_at_the_checkpoint_or_gone_tell_nothing(recorder, tmp_path):
    recorder.write(2, 'perf', {'perf/elapsed_seconds': 20.0})
    assert goodput.last_elapsed(recorder.jsonl.path, 10_000) == 0
    assert goodput.last_elapsed(tmp_path / 'nothing', 10) == 0


# The interval


def test_slower_saves_are_rarer_and_failures_make_them_more_frequent():
    # sqrt(2 * 0.5 s * 86400 s) = 294 s
    assert goodput.checkpoint_every(0.5, 12, step_seconds=2, failures_per_day=1) == 147
    assert goodput.checkpoint_every(2.0, 12, step_seconds=2, failures_per_day=1) == 294
    assert goodput.checkpoint_every(0.5, 12, step_seconds=2, failures_per_day=4) == 73


def test_saves_do_not_overlap():
    assert goodput.checkpoint_every(0.5, 601, step_seconds=2, failures_per_day=1) == 301
    assert goodput.checkpoint_every(0, 1, step_seconds=0.3, failures_per_day=1) == 4


def test_steps_longer_than_the_interval_are_all_saved():
    assert goodput.checkpoint_every(0.5, 12, step_seconds=3600, failures_per_day=1) == 1


def test_no_other_interval_loses_less_time_to_saves_and_failures():
    """Simulates days of a run with random failures at the given rate."""
    blocks, failures = 20.0, 24.0
    best = goodput.checkpoint_every(blocks, 0, step_seconds=1, failures_per_day=failures)

    def lost(interval):
        draw = random.Random(0)
        seconds = 0.0
        for _ in range(20_000):
            saves, since = divmod(draw.expovariate(failures / DAY), interval + blocks)
            seconds += saves * blocks + since
        return seconds

    assert lost(best) < min(lost(best / 2), lost(best * 2))
    assert math.isclose(best, math.sqrt(2 * blocks * DAY / failures), abs_tol=0.5)

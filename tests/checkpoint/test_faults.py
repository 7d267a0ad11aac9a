"""Checkpoints on a failing S3 server are exact or absent, and training goes on.

The server is real; a proxy in front of it injects faults. There is no delay between retries.
"""

import os
import re
import subprocess
import sys
import threading
import time
import types
import uuid

import jax
import numpy as np
import pytest

from jaxfm.checkpoint import CheckpointConfig
from jaxfm.checkpoint.checkpointer import Checkpointer
from jaxfm.checkpoint.reader import Reader
from jaxfm.errors import PermissionDeniedError, StorageError, UnavailableError
from jaxfm.storage import open_storage, s3
from jaxfm.storage.s3 import S3Storage
from tests.fault_proxy import Fault, LoseReply, Reset, Stall, Status
from tests.runs import PATIENCE

# Seconds that a save may block the training loop while the server is silent for ever: a busy
# machine needs some to copy the state.
NO_WAIT = PATIENCE / 40


def state_at(step):
    random = np.random.default_rng(step)
    arrays = {f'w{i}': random.standard_normal((300, 200), dtype=np.float32) for i in range(6)}
    return jax.device_put(arrays | {'step': np.int32(step)})


def assert_exact(state, step):
    for name, expected in state_at(step).items():
        np.testing.assert_array_equal(state[name], expected, err_msg=name)


def restore(reader, step):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
        for name, array in state_at(step).items()
    }
    return reader.restore(step, wanted)


def restore_newest(reader):
    """Restores the newest step and checks its contents -> the step."""
    step, (state, extra) = reader.newest_whole(lambda step: (step, restore(reader, step)))
    assert extra == {'step': step}
    assert_exact(state, step)
    return step


def save(checkpointer, step, **options):
    """Starts a save -> seconds that it blocked the caller."""
    state = state_at(step)
    started = time.monotonic()
    checkpointer.save(step, state, {'step': step}, **options)
    return time.monotonic() - started


def committed(checkpointer, step):
    """Saves a step -> whether it was committed."""
    save(checkpointer, step)
    checkpointer.wait()
    return step in checkpointer.steps()


def paths(pattern, methods='GET HEAD PUT POST'):
    return lambda method, path: method in methods.split() and re.search(pattern, path)


@pytest.fixture
def place(fault_proxy, s3_environment, monkeypatch):
    """The URL for checkpoints, through the proxy, with no delay between retries."""
    monkeypatch.setenv('AWS_ENDPOINT_URL', fault_proxy.endpoint)
    kvstore = S3Storage.kvstore

    def impatient(storage, prefix):
        spec = kvstore(storage, prefix)
        spec['s3_request_retries'] |= {'initial_delay': '1ms', 'max_delay': '10ms'}
        return spec

    monkeypatch.setattr(S3Storage, 'kvstore', impatient)
    monkeypatch.setattr('botocore.endpoint.time', types.SimpleNamespace(sleep=lambda _: None))
    return f's3://bucket/{uuid.uuid4().hex}'


@pytest.fixture
def opened(place):
    """Opens the place for writing, without lease renewals between saves."""
    made = []

    def open_place(**options):
        config = CheckpointConfig(**{'directory': place, 'lease_seconds': 600} | options)
        made.append(Checkpointer(config, ''))
        return made[-1]

    yield open_place
    for checkpointer in made:
        checkpointer.close()


@pytest.fixture
def saved(opened):
    """A checkpointer with one committed step, 1."""
    checkpointer = opened()
    assert committed(checkpointer, 1)
    checkpointer.events()
    return checkpointer


@pytest.fixture
def two_saved(saved, place):
    """A reader of two committed steps, 1 and 2."""
    assert committed(saved, 2)
    return Reader(CheckpointConfig(directory=place), '')


@pytest.fixture(scope='module')
def two_steps(s3_server):
    """A place with two committed steps, 1 and 2, for tests that do not change it."""
    place = f's3://bucket/{uuid.uuid4().hex}'
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        checkpointer = Checkpointer(CheckpointConfig(directory=place), '')
        assert committed(checkpointer, 1) and committed(checkpointer, 2)
        checkpointer.close()
    return place


@pytest.fixture
def reader(two_steps, place):
    """A reader of two committed steps, 1 and 2, through the proxy."""
    return Reader(CheckpointConfig(directory=two_steps), '')


@pytest.mark.parametrize(
    'action, probability',
    [(Status(503), 0.3), (Status(500), 0.3), (Reset(), 0.2), (Reset(after_bytes=9), 0.2)],
    ids=['503', '500', 'reset', 'answers that break off'],
)
def test_what_is_saved_and_restored_through_bursts_of_errors_is_exact(
    opened, place, fault_proxy, monkeypatch, action, probability
):
    monkeypatch.setattr(s3, 'TRIES', 12)  # more consecutive failures than will ever happen
    fault = fault_proxy.add(Fault(action, probability=probability))
    checkpointer = opened(keep=2)
    before = checkpointer._store.storage.retries()
    for step in (1, 2, 3):
        assert committed(checkpointer, step)
    events = checkpointer.events()
    assert [event['checkpoint/step'] for event in events] == [1, 2, 3]
    if isinstance(action, Status):
        counts = [before, *(event['storage/retries'] for event in events)]
        assert sorted(counts) == counts and 0 < counts[-1] - counts[0] <= fault.hits
    reader = Reader(CheckpointConfig(directory=place), '')
    assert restore_newest(reader) == 3
    assert checkpointer.steps() == [2, 3]
    assert fault.hits > 10


@pytest.mark.parametrize('pattern', [r'manifest\.ocdbt', r'/commit\.json'])
def test_every_retried_request_is_counted(saved, fault_proxy, pattern):
    before = saved._store.storage.retries()
    fault_proxy.add(Fault(Status(503), when=paths(pattern, 'PUT'), times=2))
    assert committed(saved, 2)
    assert saved.events()[0]['storage/retries'] == before + 2


@pytest.mark.parametrize(
    'pattern, count',
    [
        (r'/probe', 1),
        (r'/lease/', 1),
        (r'/state/d/', 1),
        (r'manifest\.ocdbt', 1),
        (r'manifest\.ocdbt', 2),
        (r'/manifest\.json', 1),
        (r'/commit\.json', 1),
        (r'\?delete', 1),
    ],
)
def test_a_reply_that_is_lost_after_the_write_costs_nothing(
    opened, place, fault_proxy, pattern, count
):
    written = paths(pattern, 'PUT POST')
    fault = fault_proxy.add(Fault(LoseReply(), when=written, skip=count - 1, times=1))
    checkpointer = opened()
    for step in (1, 2, 3):
        assert committed(checkpointer, step)
    assert fault.hits == 1
    assert not any('checkpoint/lost' in event for event in checkpointer.events())
    assert checkpointer.steps() == [2, 3]
    assert restore_newest(Reader(CheckpointConfig(directory=place), '')) == 3


def test_a_commit_whose_replies_are_all_lost_is_intact(saved, fault_proxy, caplog):
    """All replies are lost, so to its own run the save has failed."""
    fault = fault_proxy.add(Fault(LoseReply(), when=paths(r'/commit\.json', 'PUT')))
    assert committed(saved, 2)
    assert fault.hits == s3.TRIES and 'checkpoint 2 was not saved' in caplog.text
    fault_proxy.clear()
    assert restore_newest(saved) == 2
    assert committed(saved, 3)
    assert saved.steps() == [2, 3]
    assert restore_newest(saved) == 3


def test_an_outage_before_a_save_loses_only_that_save(saved, fault_proxy, caplog):
    fault_proxy.down()
    assert save(saved, 2) < NO_WAIT
    saved.wait()
    assert 'checkpoint 2 was not saved (1 of 3 in a row)' in caplog.text
    assert 'Could not connect to server' in caplog.text
    assert saved.events() == [{'checkpoint/lost': 1}]
    fault_proxy.up()
    assert committed(saved, 3)
    assert saved.steps() == [1, 3]
    assert restore_newest(saved) == 3


@pytest.mark.parametrize('pattern', [r'/state/d/', r'/manifest\.json', r'/commit\.json'])
def test_an_outage_during_a_save_loses_only_that_save(saved, opened, fault_proxy, caplog, pattern):
    fault = fault_proxy.add(Fault(Stall(), when=paths(pattern, 'PUT')))
    assert save(saved, 2) < NO_WAIT
    assert fault.happened.wait(PATIENCE)
    fault_proxy.down()
    saved.wait()
    assert 'checkpoint 2 was not saved (1 of 3 in a row)' in caplog.text
    fault_proxy.clear()
    fault_proxy.up()
    assert committed(saved, 3)
    assert saved.events()[0] == {'checkpoint/lost': 1}
    assert saved.steps() == [1, 3]
    saved.close()
    assert opened().steps() == [1, 3]
    left = {name.split('/')[0] for name in saved._store.storage.list()}
    assert left == {'1', '3', 'lease'}, 'the incomplete step is deleted'


@pytest.mark.parametrize('must', [False, True])
def test_a_permanent_outage_ends_the_run(saved, fault_proxy, must):
    fault_proxy.down()
    if not must:
        for step in (2, 3, 4):
            assert save(saved, step) < NO_WAIT
            saved.wait()
    with pytest.raises(StorageError, match='3 checkpoints in a row .* the newest one there is 1'):
        save(saved, 5, must=True)


@pytest.mark.parametrize('refusal', [Status(403), Status(403, 'ExpiredToken'), Status(400)])
def test_a_permission_error_during_a_run_is_logged_and_not_retried(
    saved, fault_proxy, caplog, refusal
):
    """An expired token: AWS answers 400 or 403."""
    fault_proxy.add(Fault(refusal))
    before = len(fault_proxy.log)
    assert save(saved, 2) < NO_WAIT
    saved.wait()
    assert len(fault_proxy.log) - before <= 5
    assert re.search('checkpoint 2 was not saved .*(AccessDenied|ExpiredToken)', caplog.text)
    assert saved.events() == [{'checkpoint/lost': 1}]
    fault_proxy.clear()  # credentials are renewed
    assert committed(saved, 3)


@pytest.mark.parametrize('pattern', ['', '/state/d/'], ids=['everything', 'the arrays'])
@pytest.mark.parametrize(
    'action, error',
    [
        (None, UnavailableError),
        (Reset(), UnavailableError),
        (Status(500), UnavailableError),
        (Status(503), UnavailableError),
        (Status(504, 'GatewayTimeout'), UnavailableError),
        (Status(429, 'TooManyRequests'), UnavailableError),
        (Status(408, 'RequestTimeout'), UnavailableError),
        (Status(409), UnavailableError),
        (Status(400, 'BadRequest'), UnavailableError),
        (Status(400), PermissionDeniedError),
        (Status(401, 'Unauthorized'), PermissionDeniedError),
        (Status(403), PermissionDeniedError),
        (Status(403, 'SignatureDoesNotMatch'), PermissionDeniedError),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)
def test_an_unreachable_checkpoint_is_not_damaged(reader, fault_proxy, action, error, pattern):
    """No older step is restored instead, and no run starts from scratch."""
    fault = Fault(action or Reset(), when=paths(pattern))
    if action is None and not pattern:
        fault_proxy.down()
    else:
        fault_proxy.add(fault)
    with pytest.raises(error) as caught:
        restore_newest(reader)
    assert 'bucket' in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert reader.events() == []
    assert fault.hits <= 4 * s3.TRIES
    fault_proxy.clear()
    fault_proxy.up()
    assert restore_newest(reader) == 2


@pytest.mark.parametrize('pattern', ['commit.json', 'manifest.json', 'manifest.ocdbt', 'state/d/'])
def test_a_missing_object_is_damage_and_the_previous_step_is_used(two_saved, s3_server, pattern):
    system = s3_server.system()
    names = [name for name in system.find(two_saved.root) if '/2/' in name and pattern in name]
    for name in names:
        if pattern == 'commit.json':  # without it there is no such step
            system.pipe(name, b'{"torn')
        else:
            system.rm(name)
    assert names and restore_newest(two_saved) == 1
    assert two_saved.events() == [{'checkpoint/fallbacks': 1}]


def test_an_always_truncated_answer_is_retried_a_limited_number_of_times(reader, fault_proxy):
    fault = fault_proxy.add(Fault(Reset(after_bytes=9), when=paths(r'/manifest\.json')))
    with pytest.raises(UnavailableError, match='cannot be reached'):
        restore_newest(reader)
    assert fault.hits == s3.TRIES


def test_an_object_that_another_process_is_writing_is_unavailable(opened, fault_proxy):
    fault_proxy.add(Fault(Status(409), when=paths('/lease/', 'PUT')))
    with pytest.raises(UnavailableError, match='is being written by another process'):
        opened()


def test_a_server_without_list_requests_is_unavailable(place, fault_proxy):
    fault_proxy.add(Fault(Status(404, 'NotFound')))
    with pytest.raises(UnavailableError, match='a request to bucket .* failed'):
        open_storage(place).check_readable()


def test_the_lease_outlasts_an_outage(opened, fault_proxy):
    checkpointer = opened(lease_seconds=0.3)
    fault_proxy.down()
    time.sleep(0.6)
    fault_proxy.up()
    assert committed(checkpointer, 1)


def test_credentials_region_and_endpoint_may_come_from_the_usual_files(
    opened, place, fault_proxy, monkeypatch, tmp_path
):
    (tmp_path / 'config').write_text(
        f'[profile runs]\nregion = eu-central-1\nendpoint_url = {fault_proxy.endpoint}\n'
    )
    (tmp_path / 'credentials').write_text(
        '[default]\naws_access_key_id = other\naws_secret_access_key = secret\n'
        '[runs]\naws_access_key_id = key\naws_secret_access_key = secret\n'
    )
    for name in ('ENDPOINT_URL', 'ACCESS_KEY_ID', 'SECRET_ACCESS_KEY', 'DEFAULT_REGION'):
        monkeypatch.delenv(f'AWS_{name}')
    monkeypatch.setenv('AWS_PROFILE', 'runs')
    monkeypatch.setenv('AWS_CONFIG_FILE', str(tmp_path / 'config'))
    monkeypatch.setenv('AWS_SHARED_CREDENTIALS_FILE', str(tmp_path / 'credentials'))
    assert committed(opened(), 1)
    reader = Reader(CheckpointConfig(directory=place), '')
    assert restore_newest(reader) == 1
    assert reader._store.storage.kvstore('')['aws_region'] == 'eu-central-1'


# TensorStore reads its stall time-out only once per process.
STALLED = """
import sys, time
from jaxfm.checkpoint import CheckpointConfig, checkpointer
from jaxfm.storage import lease, s3
s3.STALL_SECONDS, s3.TRIES = 1, 1
checkpointer.PATIENCE_SECONDS = lease.PATIENCE_SECONDS = 0.5
from jaxfm.errors import RunError
from tests.checkpoint.test_faults import restore_newest, save

made = checkpointer.Checkpointer(CheckpointConfig(directory=sys.argv[1], lease_seconds=600), '')
print('ready', flush=True)
for line in sys.stdin:
    started, said = time.monotonic(), None
    try:
        match line.split():
            case ['save', step]:
                said = save(made, int(step))
            case ['wait']:
                made.wait()
                said = [list(event)[:1] for event in made.events()]
            case ['restore']:
                said = restore_newest(made)
            case ['close']:
                made.close()
    except RunError as error:
        said = type(error).__name__
    print((said, time.monotonic() - started), flush=True)
"""


@pytest.fixture
def stalled(place):
    """Runs commands in another process -> (outcome, seconds)."""
    process = subprocess.Popen(
        [sys.executable, '-c', STALLED, place],
        env=os.environ | {'TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS': '1'},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def do(what):
        process.stdin.write(f'{what}\n')
        return eval(process.stdout.readline())

    process.stdin.reconfigure(line_buffering=True)
    do.process = process
    at_the_latest = threading.Timer(PATIENCE, process.kill)
    at_the_latest.start()
    assert process.stdout.readline() == 'ready\n'
    yield do
    at_the_latest.cancel()
    process.kill()
    process.stdin.close()
    process.stdout.close()
    process.wait()


LOST, SAVED = [['checkpoint/lost']], [['checkpoint/step']]
BY_TENSORSTORE, BY_BOTOCORE = paths(r'manifest\.ocdbt', 'GET'), paths(r'commit\.json', 'PUT')


@pytest.mark.parametrize('when', [BY_TENSORSTORE, BY_BOTOCORE], ids=['tensorstore', 'botocore'])
def test_a_silent_server_is_given_up_and_used_again_later(stalled, fault_proxy, when):
    assert_stall_is_borne(stalled, fault_proxy, when, seconds=10)


@pytest.mark.slow  # curl averages an upload's speed over seconds
def test_a_stalled_upload_is_given_up_and_the_next_one_works(stalled, fault_proxy):
    assert_stall_is_borne(stalled, fault_proxy, paths('/state/d/', 'PUT'), seconds=40)


def assert_stall_is_borne(stalled, fault_proxy, when, seconds):
    stalled('save 1')
    assert stalled('wait')[0] == SAVED
    fault = fault_proxy.add(Fault(Stall(), when=when))
    held, _ = stalled('save 2')
    assert held < NO_WAIT
    said, took = stalled('wait')
    assert said == LOST and fault.hits and took < seconds
    fault_proxy.clear()
    assert stalled('restore')[0] in (1, 2)  # an abandoned commit may still arrive
    stalled('save 3')
    assert stalled('wait')[0] == SAVED
    assert stalled('restore')[0] == 3


def test_a_checkpoint_on_a_silent_server_is_not_damaged(stalled, fault_proxy):
    stalled('save 1')
    assert stalled('wait')[0] == SAVED
    for pattern in (r'manifest\.json', r'manifest\.ocdbt'):
        fault_proxy.add(Fault(Stall(), when=paths(pattern, 'GET')))
        assert stalled('restore')[0] == 'UnavailableError'
        fault_proxy.clear()


def test_the_end_of_a_run_leaves_no_thread_inside_tensorstore(saved, fault_proxy, monkeypatch):
    monkeypatch.setattr('jaxfm.checkpoint.checkpointer.PATIENCE_SECONDS', 0.1)
    fault = fault_proxy.add(Fault(Stall(), when=BY_TENSORSTORE))
    save(saved, 2)
    assert fault.happened.wait(PATIENCE)
    saved.close()
    assert 'checkpoint' not in {thread.name for thread in threading.enumerate()}


def test_a_run_can_end_while_the_server_is_silent(stalled, fault_proxy):
    stalled('save 1')
    stalled('wait')
    fault = fault_proxy.add(Fault(Stall()))
    stalled('save 2')
    assert fault.happened.wait(PATIENCE)
    held, _ = stalled('save 3')
    assert held < 0.5 + NO_WAIT, 'while the save before is stuck it waits so long and not longer'
    assert stalled('close')[1] < PATIENCE / 20
    stalled.process.stdin.close()
    started = time.monotonic()
    assert stalled.process.wait(PATIENCE) == 0, 'aborted by a thread that is inside TensorStore'
    assert time.monotonic() - started < PATIENCE / 20

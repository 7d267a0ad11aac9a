"""Each fault as clients see it: botocore and the s3 driver of TensorStore."""

import contextlib
import http.client
import os
import socket
import threading
import time

import pytest

from tests.fault_proxy import Fault, LoseReply, Reset, Stall, Status, is_read, is_write
from tests.runs import PATIENCE

DATA = os.urandom(5_000_000)
BUCKET = 'bucket'


@pytest.fixture
def client(fault_proxy):
    with make_client(fault_proxy, 'key') as client:
        yield client


@contextlib.contextmanager
def make_client(proxy, key):
    """A client of botocore, which tries once and waits two seconds."""
    session = pytest.importorskip('botocore.session').get_session()
    config = pytest.importorskip('botocore.config').Config(
        retries={'total_max_attempts': 1},
        connect_timeout=2,
        read_timeout=2,
        s3={'addressing_style': 'path'},
    )
    client = session.create_client(
        's3',
        region_name='us-east-1',
        endpoint_url=proxy.endpoint,
        aws_access_key_id=key,
        aws_secret_access_key='secret',
        config=config,
    )
    try:
        yield client
    finally:
        client.close()


@pytest.fixture
def store(fault_proxy, s3_environment):
    """A key-value store of TensorStore that tries four times."""
    ts = pytest.importorskip('tensorstore')
    retries = {'max_retries': 3, 'initial_delay': '10ms', 'max_delay': '100ms'}
    spec = {'driver': 's3', 'bucket': BUCKET, 'path': 'tensorstore/', 'aws_region': 'us-east-1'}
    spec |= {'endpoint': fault_proxy.endpoint, 's3_request_retries': retries}
    return ts.KvStore.open(spec, context=ts.Context()).result()


def put(client, key, data=DATA, **more):
    return client.put_object(Bucket=BUCKET, Key=key, Body=data, **more)


def get(client, key, **more):
    return client.get_object(Bucket=BUCKET, Key=key, **more)['Body'].read()


def code_of(error):
    return error.value.response['Error']['Code']


def is_put(method, path):
    return method == 'PUT'


def test_what_passes_is_bit_equal(fault_proxy, client, tmp_path):
    put(client, 'whole')
    assert get(client, 'whole') == DATA
    assert get(client, 'whole', Range='bytes=1000-1000999') == DATA[1000:1001000]
    assert client.head_object(Bucket=BUCKET, Key='whole')['ContentLength'] == len(DATA)
    assert client.delete_object(Bucket=BUCKET, Key='whole')
    (tmp_path / 'file').write_bytes(DATA)
    with open(tmp_path / 'file', 'rb') as file:  # sent in chunks, once the server says go on
        put(client, 'file', file)
    assert get(client, 'file') == DATA
    put(client, 'empty', b'')
    assert get(client, 'empty') == b''
    log = fault_proxy.log
    assert [(method, status) for method, _, status in log[:4]] == [
        ('PUT', 200),
        ('GET', 200),
        ('GET', 206),
        ('HEAD', 200),
    ]
    assert log[0][1] == '/bucket/whole'
    assert fault_proxy.counts['DELETE', 204] == 1


def test_what_tensorstore_writes_is_what_the_server_has(fault_proxy, store, client):
    store.write('a', DATA).result()
    assert store.read('a').result().value == DATA
    assert get(client, 'tensorstore/a') == DATA
    assert store.list().result() == [b'a']
    store.delete_range(store.KeyRange()).result()
    assert store.read('a').result().state == 'missing'


def test_a_connection_stays_after_an_empty_body_that_waits_to_be_asked_for(fault_proxy):
    connection = http.client.HTTPConnection(*fault_proxy.address)
    headers = {'Expect': '100-continue', 'Content-Length': '0'}
    for _ in range(3):  # would raise if it was closed
        connection.request('PUT', '/bucket/unsigned', headers=headers)
        assert connection.getresponse().read()
    assert fault_proxy.counts == {('PUT', 403): 3}
    connection.close()


def test_conditions_pass(client):
    get_error = client.exceptions.ClientError
    put(client, 'once', b'first', IfNoneMatch='*')
    with pytest.raises(get_error) as error:
        put(client, 'once', b'second', IfNoneMatch='*')
    assert code_of(error) == 'PreconditionFailed'
    assert get(client, 'once') == b'first'
    tag = client.head_object(Bucket=BUCKET, Key='once')['ETag']
    with pytest.raises(get_error, match='304'):
        client.get_object(Bucket=BUCKET, Key='once', IfNoneMatch=tag)
    assert get(client, 'once') == b'first'  # on the same connection
    client.delete_object(Bucket=BUCKET, Key='once')


def test_many_connections_at_once_each_get_their_own(fault_proxy, client):
    def work(index):
        data = DATA[index * 1000 :]
        put(client, f'many/{index}', data)
        results[index] = get(client, f'many/{index}') == data

    results = {}
    threads = [threading.Thread(target=work, args=[index]) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(8), True)
    assert fault_proxy.counts == {('PUT', 200): 8, ('GET', 200): 8}


@pytest.mark.parametrize(
    'action, code',
    [
        (Status(503), 'SlowDown'),
        (Status(500), 'InternalError'),
        (Status(403), 'AccessDenied'),
        (Status(400), 'ExpiredToken'),
        (Status(403, 'SignatureDoesNotMatch'), 'SignatureDoesNotMatch'),
    ],
)
def test_a_status_is_an_error_of_s3_and_the_server_is_not_asked(fault_proxy, client, action, code):
    put(client, 'kept', b'before')
    fault = fault_proxy.add(Fault(action, when=is_put, times=2))
    for body in (DATA, b'after'):
        with pytest.raises(client.exceptions.ClientError) as error:
            put(client, 'kept', body)
        assert code_of(error) == code
    assert fault.hits == fault_proxy.counts['PUT', action.status] == 2
    assert get(client, 'kept') == b'before'
    put(client, 'kept', DATA)
    assert get(client, 'kept') == DATA


def test_a_status_reaches_a_client_that_waits_to_be_told_to_go_on(fault_proxy, client, tmp_path):
    (tmp_path / 'file').write_bytes(DATA)
    fault_proxy.add(Fault(Status(503), when=is_put, times=1))
    with (
        open(tmp_path / 'file', 'rb') as file,
        pytest.raises(client.exceptions.ClientError) as error,
    ):
        put(client, 'file', file)
    assert code_of(error) == 'SlowDown'
    with open(tmp_path / 'file', 'rb') as file:
        put(client, 'file', file)


def test_a_head_is_refused_without_a_body(fault_proxy, client):
    fault_proxy.add(Fault(Status(503), when=lambda method, path: method == 'HEAD', times=1))
    with pytest.raises(client.exceptions.ClientError, match='503'):
        client.head_object(Bucket=BUCKET, Key='started')
    assert client.head_object(Bucket=BUCKET, Key='started')['ContentLength'] == 3


def test_a_refusal_of_the_server_passes_though_it_comes_within_the_body(fault_proxy):
    with make_client(fault_proxy, 'reader') as reader:
        for _ in range(3):
            with pytest.raises(reader.exceptions.ClientError, match='AccessDenied'):
                put(reader, 'refused', DATA * 4)
    assert fault_proxy.counts == {('PUT', 403): 3}


def test_a_reset_is_an_error_and_nothing_is_written(fault_proxy, client):
    exceptions = pytest.importorskip('botocore.exceptions')
    fault_proxy.add(Fault(Reset(), when=is_put, times=1))
    with pytest.raises(exceptions.HTTPClientError) as error:
        put(client, 'reset', b'small')
    assert 'reset' in str(error.value).lower()
    with pytest.raises(client.exceptions.NoSuchKey):
        get(client, 'reset')
    assert fault_proxy.log[0] == ('PUT', '/bucket/reset', 'reset')


def test_a_reset_within_a_reply_cuts_it_off(fault_proxy, client):
    exceptions = pytest.importorskip('botocore.exceptions')
    put(client, 'cut')
    fault_proxy.add(Fault(Reset(after_bytes=1_000_000), when=is_read, times=1))
    body = client.get_object(Bucket=BUCKET, Key='cut')['Body']
    with pytest.raises((exceptions.HTTPClientError, exceptions.ResponseStreamingError)):
        body.read()
    assert get(client, 'cut') == DATA


def test_a_stall_lasts_until_it_is_released(fault_proxy, client):
    exceptions = pytest.importorskip('botocore.exceptions')
    stall = fault_proxy.add(Fault(Stall(), when=is_put))
    started = time.monotonic()
    with pytest.raises((exceptions.ReadTimeoutError, exceptions.ConnectionClosedError)):
        put(client, 'stalled', b'small')
    assert time.monotonic() - started > 1.9
    thread = threading.Thread(target=put, args=[client, 'stalled'])
    thread.start()
    while stall.hits < 2:
        time.sleep(0.01)
    with pytest.raises(client.exceptions.NoSuchKey):
        get(client, 'stalled')
    stall.release()
    thread.join()
    assert get(client, 'stalled') == DATA
    assert fault_proxy.counts['PUT', 'stalled'] == 2
    assert fault_proxy.counts['PUT', 200] == 1


def test_a_stall_may_end_by_itself_or_by_clearing_the_faults(fault_proxy, client):
    fault_proxy.add(Fault(Stall(0.5), times=1))
    started = time.monotonic()
    put(client, 'late', b'late')
    assert time.monotonic() - started > 0.5
    fault_proxy.add(Fault(Stall()))
    timer = threading.Timer(0.2, fault_proxy.clear)
    timer.start()
    assert get(client, 'late') == b'late'
    timer.join()


def test_a_lost_reply_is_of_what_took_effect(fault_proxy, client):
    exceptions = pytest.importorskip('botocore.exceptions')
    fault_proxy.add(Fault(LoseReply(), when=is_put, times=1))
    with pytest.raises(exceptions.HTTPClientError):
        put(client, 'lost', DATA, IfNoneMatch='*')
    with pytest.raises(client.exceptions.ClientError, match='PreconditionFailed'):
        put(client, 'lost', DATA, IfNoneMatch='*')
    assert get(client, 'lost') == DATA
    assert [status for _, _, status in fault_proxy.log] == ['lost', 412, 200]
    client.delete_object(Bucket=BUCKET, Key='lost')


def test_an_outage_refuses_and_breaks_connections_and_ends(fault_proxy, client):
    exceptions = pytest.importorskip('botocore.exceptions')
    put(client, 'kept', DATA)  # the connection is kept alive
    for _ in range(3):
        fault_proxy.down()
        with pytest.raises(exceptions.BotoCoreError):
            get(client, 'kept')
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(fault_proxy.address)
        fault_proxy.up()
        assert get(client, 'kept') == DATA


def test_an_outage_breaks_what_is_under_way(fault_proxy, client):
    exceptions = pytest.importorskip('botocore.exceptions')
    stall = fault_proxy.add(Fault(Stall()))
    errors = []

    def work():
        try:
            put(client, 'a')
        except exceptions.HTTPClientError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert stall.happened.wait(PATIENCE)
    fault_proxy.down()
    thread.join()
    assert len(errors) == 1


@pytest.mark.parametrize('action', [Status(503), Reset(), Reset(after_bytes=1000), LoseReply()])
def test_tensorstore_tries_again(fault_proxy, store, action):
    if action != Reset(after_bytes=1000):  # the reply to a write has no body
        fault_proxy.add(Fault(action, when=is_write, times=2))
    store.write('again', DATA).result()
    writes = sum(fault_proxy.counts.values())
    fault_proxy.add(Fault(action, when=is_read, times=2))
    assert store.read('again').result().value == DATA
    assert sum(fault_proxy.counts.values()) == writes + 3


@pytest.mark.parametrize('action', [Status(503), Reset(), LoseReply()])
def test_tensorstore_gives_up(fault_proxy, store, action):
    fault = fault_proxy.add(Fault(action))
    with pytest.raises(Exception, match=r'(?i)attempts|503|unavailable|reset'):
        store.write('given up', b'data').result()
    assert fault.hits == 4
    fault_proxy.clear()
    store.write('given up', b'data').result()


def test_tensorstore_sees_an_outage(fault_proxy, store):
    store.write('before', DATA).result()
    fault_proxy.down()
    with pytest.raises(Exception, match=r'(?i)connect'):
        store.read('before').result()
    fault_proxy.up()
    assert store.read('before').result().value == DATA


def test_tensorstore_waits_for_a_stall(fault_proxy, store):
    stall = fault_proxy.add(Fault(Stall()))
    writing = store.write('stalled', DATA)
    assert stall.happened.wait(PATIENCE)
    assert not writing.done()
    stall.release()
    writing.result()
    assert store.read('stalled').result().value == DATA


def test_a_fault_skips_and_ends_and_takes_turns(fault_proxy, client):
    fault_proxy.add(Fault(Status(500), skip=1, times=2))
    fault_proxy.add(Fault(Status(503), seconds=0.5))
    statuses = []

    def ask():
        try:
            client.head_object(Bucket=BUCKET, Key='started')
        except client.exceptions.ClientError:
            pass
        statuses.append(fault_proxy.log[-1][2])

    for _ in range(4):
        ask()
    time.sleep(0.5)
    ask()
    assert statuses == [503, 500, 500, 503, 200]


def test_chance_is_that_of_the_seed(fault_proxy, client):
    statuses = []
    for _ in range(2):
        fault_proxy.add(Fault(Status(503), probability=0.5, seed=7))
        for _ in range(20):
            try:
                client.head_object(Bucket=BUCKET, Key='started')
            except client.exceptions.ClientError:
                pass
        fault_proxy.clear()
        statuses.append([status for _, _, status in fault_proxy.log[-20:]])
    assert statuses[0] == statuses[1]
    assert set(statuses[0]) == {200, 503}


def test_closing_is_quick_whatever_is_under_way(fault_proxy, client):
    stall = fault_proxy.add(Fault(Stall(), when=is_put))
    idle = socket.create_connection(fault_proxy.address)
    with idle, socket.create_connection(fault_proxy.address) as stalled:
        stalled.sendall(b'PUT /bucket/a HTTP/1.1\r\nContent-Length: 5\r\n\r\n')
        assert stall.happened.wait(PATIENCE)
        started = time.monotonic()
        fault_proxy.close()
        assert time.monotonic() - started < PATIENCE / 30  # not for ever
        assert not any(t.name.endswith('(_run)') for t in threading.enumerate())

"""The S3 server of the tests tells apart those who ask."""

import pytest


@pytest.fixture
def client(s3_server):
    """A function that makes the S3 client of an access key; the secret is common to all."""
    session = pytest.importorskip('botocore.session').get_session()
    clients = []

    def make(key):
        clients.append(
            session.create_client(
                's3',
                region_name='us-east-1',
                endpoint_url=s3_server.endpoint,
                aws_access_key_id=key,
                aws_secret_access_key='secret',
            )
        )
        return clients[-1]

    yield make
    for one in clients:
        one.close()


def test_a_reader_reads_and_lists_and_does_not_write(client):
    at = {'Bucket': 'bucket', 'Key': 'readable'}
    client('key').put_object(**at, Body=b'content')
    reader = client('reader')
    assert reader.get_object(**at)['Body'].read() == b'content'
    assert reader.list_objects_v2(Bucket='bucket', Prefix='readable')['KeyCount'] == 1
    for change in (lambda: reader.put_object(**at, Body=b''), lambda: reader.delete_object(**at)):
        with pytest.raises(reader.exceptions.ClientError, match='AccessDenied'):
            change()


def test_one_without_rights_here_does_not_read(client):
    stranger = client('other')
    with pytest.raises(stranger.exceptions.ClientError, match='AccessDenied'):
        stranger.get_object(Bucket='bucket', Key='started')

"""What unit tests may expect of the S3 server in memory."""

import os

import pytest

DATA = os.urandom(5_000_000)


@pytest.fixture
def client(moto_server):
    session = pytest.importorskip('botocore.session').get_session()
    client = session.create_client(
        's3',
        region_name='us-east-1',
        endpoint_url=moto_server,
        aws_access_key_id='anyone',
        aws_secret_access_key='anything',
    )
    yield client
    client.close()


def test_it_keeps_what_is_put(client):
    client.put_object(Bucket='bucket', Key='kept', Body=DATA)
    assert client.get_object(Bucket='bucket', Key='kept')['Body'].read() == DATA


def test_it_honours_conditions_of_a_put(client):
    def put(**condition):
        return client.put_object(Bucket='bucket', Key='lease', Body=os.urandom(8), **condition)

    first = put(IfNoneMatch='*')['ETag']
    second = put(IfMatch=first)['ETag']
    for condition in ({'IfNoneMatch': '*'}, {'IfMatch': first}):
        with pytest.raises(client.exceptions.ClientError, match='PreconditionFailed'):
            put(**condition)
    assert client.head_object(Bucket='bucket', Key='lease')['ETag'] == second
    client.delete_object(Bucket='bucket', Key='lease')
    put(IfNoneMatch='*')

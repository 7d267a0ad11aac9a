"""Storage under a prefix of an S3 bucket: botocore for small objects, TensorStore for arrays.

Credentials, region and endpoint come from the usual AWS variables and files. Nothing waits forever:
a silent connection is dropped after STALL_SECONDS, and a request is sent at most TRIES times.
"""

import atexit
import contextlib
import os
import re
import tempfile
import uuid
from collections.abc import Iterable, Iterator

from jaxfm.errors import (
    ConfigError,
    MissingInputError,
    PermissionDeniedError,
    RunError,
    StorageError,
    UnavailableError,
)
from jaxfm.storage.base import S3, Stored

CONNECT_SECONDS, STALL_SECONDS, TRIES = 5, 20, 5
_DENIED = {
    '401', '403', 'AccessDenied', 'AllAccessDisabled', 'ExpiredToken', 'Forbidden',
    'InvalidAccessKeyId', 'InvalidToken', 'SignatureDoesNotMatch', 'TokenRefreshRequired',
}  # fmt: skip
_FULL = {'507', 'InsufficientStorage', 'QuotaExceeded', 'EntityTooLarge'}
_LOST_RACE = {'412', 'PreconditionFailed', 'ConditionalRequestConflict'}
_MISSING = {'404', 'NoSuchKey', 'NotFound'}
_USUAL_HOST = re.compile(r'https://s3([.-][a-z]+(-[a-z]+)+-\d)?\.amazonaws\.com(\.cn)?')
_MOST_DELETED = 1000  # objects per DeleteObjects request: the limit of S3


class S3Storage:
    """`s3://bucket/prefix`. See `Storage` for what the methods promise."""

    def __init__(self, url: str):
        self._bucket, _, prefix = url.removeprefix(S3).strip('/').partition('/')
        if not self._bucket:
            raise ConfigError(f'checkpoint.directory = {url!r}: want s3://bucket/prefix')
        self.root = S3 + (f'{self._bucket}/{prefix}' if prefix else self._bucket)
        self._prefix = f'{prefix}/' if prefix else ''
        self._retries = 0
        # TensorStore reads these once. A transfer below one byte per second counts as stalled.
        os.environ.setdefault('TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS', str(STALL_SECONDS))
        os.environ.setdefault('TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES', '1')
        self._client = self._make_client()
        self._passed_on: tuple[int, str] | None = None  # a private file, for TensorStore

    def prepare(self) -> None:
        name = f'probe-{uuid.uuid4().hex[:8]}'
        try:
            self._probe_conditions(name)
            self._probe_tensorstore(name)
        finally:
            with contextlib.suppress(RunError):  # without permission to write, none to delete
                self.remove(name)

    def _probe_conditions(self, name: str) -> None:
        """Checks that an exclusive write fails on an existing name: leases and commits need it."""
        self.write(name, b'first', exclusive=True)
        try:
            self.write(name, b'second', exclusive=True)
        except FileExistsError:
            return
        raise StorageError(
            f'{self._place} ignores conditional writes (If-None-Match): two runs could overwrite '
            "each other's checkpoints; use a server that supports them"
        )

    def _probe_tensorstore(self, name: str) -> None:
        """Checks that TensorStore can write: it finds endpoint and credentials in its own way."""
        import tensorstore

        try:
            store = tensorstore.KvStore.open(self.kvstore(name)).result(timeout=STALL_SECONDS)
            store.write('tensorstore', b'').result(timeout=TRIES * STALL_SECONDS)
        except (ValueError, TimeoutError) as error:
            said = _line(error).split(' [')[0] or 'no answer'
            text = f'arrays cannot be written to {self._place}: {said}'
            kind = PermissionDeniedError if 'PERMISSION_DENIED' in text else UnavailableError
            raise kind(text) from error

    def check_readable(self) -> None:
        self._call('list_objects_v2', Prefix=self._prefix, MaxKeys=1)

    def free_bytes(self) -> None:
        return None

    def read(self, name: str) -> bytes:
        for left in reversed(range(TRIES)):
            body = self._call('get_object', Key=self._prefix + name)['Body']
            try:
                with self._explain_errors():
                    return body.read()
            except UnavailableError:  # while reading the body, where botocore does not retry
                if not left:
                    raise
            self._retries += 1

    def write(self, name: str, data: bytes, exclusive: bool = False) -> None:
        condition = {'IfNoneMatch': '*'} if exclusive else {}
        try:
            self._call('put_object', Key=self._prefix + name, Body=data, **condition)
        except FileExistsError:
            # The object may be ours: written, but the reply was lost and the request retried.
            try:
                if self.read(name) == data:
                    return
            except FileNotFoundError:
                raise UnavailableError(
                    f'{self._place}: {name} is being written by another process'
                ) from None
            raise

    def list(self, prefix: str = '') -> dict[str, Stored]:
        where = self._prefix + (f'{prefix}/' if prefix else '')
        found, token = {}, {}
        while token is not None:
            page = self._call('list_objects_v2', Prefix=where, **token)
            for entry in page.get('Contents', ()):
                name = entry['Key'].removeprefix(self._prefix)
                found[name] = Stored(entry['Size'], entry['LastModified'].timestamp())
            following = page.get('NextContinuationToken')
            token = {'ContinuationToken': following} if following else None
        return found

    def empty_directories(self) -> Iterable[str]:
        return ()

    def remove(self, name: str) -> None:
        names = [*self.list(name), name]
        for first in range(0, len(names), _MOST_DELETED):
            keys = [{'Key': self._prefix + one} for one in names[first : first + _MOST_DELETED]]
            answer = self._call('delete_objects', Delete={'Objects': keys, 'Quiet': True})
            for error in answer.get('Errors', ()):
                if error.get('Code') not in _MISSING:
                    raise StorageError(
                        f'{S3}{self._bucket}/{error["Key"]} cannot be deleted: '
                        f'{error.get("Message") or error.get("Code")}'
                    )

    def kvstore(self, prefix: str) -> dict:
        spec = {
            'driver': 's3',
            'bucket': self._bucket,
            'path': f'{self._prefix}{prefix}/',
            'aws_region': self._client.meta.region_name or 'us-east-1',
            'aws_credentials': self._credentials(),
            's3_request_retries': {
                'max_retries': TRIES,
                'initial_delay': '500ms',
                'max_delay': '8s',
            },
        }
        # TensorStore derives AWS's own hosts itself, but reads no endpoint from the environment.
        if not _USUAL_HOST.fullmatch(self._client.meta.endpoint_url):
            spec['endpoint'] = self._client.meta.endpoint_url
        return spec

    def retries(self) -> int:
        import tensorstore

        name = '/tensorstore/kvstore/s3/retries'
        counters = tensorstore.experimental_collect_matching_metrics(name)
        return self._retries + sum(v['value'] for c in counters for v in c.get('values', ()))

    def _credentials(self) -> dict:
        """The credentials for TensorStore, as botocore finds and renews them.

        TensorStore's own search does not read the AWS config files, so it gets a private file.
        """
        with self._explain_errors():
            found = self._session.get_credentials()
            if found is None or found.method == 'env':
                return {'type': 'environment'}
            keys = found.get_frozen_credentials()
        lines = ['[default]', f'aws_access_key_id = {keys.access_key}']
        lines += [f'aws_secret_access_key = {keys.secret_key}']
        lines += [f'aws_session_token = {keys.token}'] if keys.token else []
        if self._passed_on is None:
            self._passed_on = _open_private_file()
        descriptor, path = self._passed_on
        content = '\n'.join([*lines, '']).encode()
        os.pwrite(descriptor, content, 0)
        os.ftruncate(descriptor, len(content))
        return {
            'type': 'profile',
            'profile': 'default',
            'config_file': path,
            'credentials_file': path,
        }

    def _make_client(self):
        try:
            import botocore.config
            import botocore.session
        except ImportError as error:
            raise MissingInputError(
                f"{self.root} needs the package botocore: pip install 'jaxfm[s3]'"
            ) from error
        config = botocore.config.Config(
            connect_timeout=CONNECT_SECONDS,
            read_timeout=STALL_SECONDS,
            retries={'total_max_attempts': TRIES, 'mode': 'standard'},
            # Not every S3-compatible server understands the newer upload checksums.
            request_checksum_calculation='when_required',
            response_checksum_validation='when_required',
        )
        with self._explain_errors():
            self._session = botocore.session.get_session()
            region = self._session.get_config_variable('region') or 'us-east-1'
            return self._session.create_client('s3', region_name=region, config=config)

    def _call(self, operation: str, **arguments) -> dict:
        with self._explain_errors():
            answer = getattr(self._client, operation)(Bucket=self._bucket, **arguments)
            self._retries += answer['ResponseMetadata'].get('RetryAttempts', 0)
            return answer

    @contextlib.contextmanager
    def _explain_errors(self) -> Iterator[None]:
        """Turns botocore errors into ours, with a one-line message and the right exit code."""
        from botocore import exceptions as boto

        try:
            yield
        except boto.ClientError as error:
            self._retries += error.response['ResponseMetadata'].get('RetryAttempts', 0)
            raise self._explain_answer(error) from error
        except (
            boto.NoCredentialsError,
            boto.PartialCredentialsError,
            boto.CredentialRetrievalError,
            boto.TokenRetrievalError,
        ) as error:
            raise PermissionDeniedError(
                f'no credentials for {self._place}: {error}; set AWS_ACCESS_KEY_ID and '
                'AWS_SECRET_ACCESS_KEY, or a profile'
            ) from error
        except (
            boto.ProfileNotFound,
            boto.ParamValidationError,
            boto.InvalidRegionError,
            boto.ConfigParseError,
            ValueError,  # the endpoint is not a valid URL
        ) as error:
            raise ConfigError(f'{self.root}: {_line(error)}') from error
        except (boto.BotoCoreError, OSError) as error:
            raise UnavailableError(f'{self._place} cannot be reached: {_line(error)}') from error

    def _explain_answer(self, error) -> Exception:
        code = error.response.get('Error', {}).get('Code', '')
        status = str(error.response['ResponseMetadata'].get('HTTPStatusCode', ''))
        codes = {code, status}
        if code == 'NoSuchBucket':
            return MissingInputError(f'there is no {self._place}')
        if codes & _LOST_RACE and error.operation_name == 'PutObject':
            return FileExistsError(code)
        if codes & _MISSING and error.operation_name == 'GetObject':
            return FileNotFoundError(code)
        if codes & _DENIED:
            return PermissionDeniedError(f'no permission to use {self._place}: {_line(error)}')
        if codes & _FULL:
            return StorageError(f'{self._place} is full: {_line(error)}')
        return UnavailableError(f'a request to {self._place} failed: {_line(error)}')

    @property
    def _place(self) -> str:
        endpoint = self._client.meta.endpoint_url
        return f'bucket {self._bucket} at {endpoint}'


def _open_private_file() -> tuple[int, str]:
    """A file that only this user can read, as descriptor and path; it is gone with this process.

    It is in memory on Linux, elsewhere in the directory for temporary files.
    """
    if hasattr(os, 'memfd_create') and os.path.isdir('/proc/self/fd'):
        descriptor = os.memfd_create('credentials')
        return descriptor, f'/proc/{os.getpid()}/fd/{descriptor}'
    descriptor, path = tempfile.mkstemp(prefix='jaxfm-credentials-')
    atexit.register(_remove_private_file, path)
    return descriptor, path


def _remove_private_file(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _line(error: Exception) -> str:
    return ' '.join(str(error).split())[:400]

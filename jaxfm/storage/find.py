"""Data files: finds them by glob, opens and decompresses them; on disk, in a bucket, on the hub.

Every failure (missing, forbidden, unreachable, truncated) becomes an error that names the file.
"""

import contextlib
import dataclasses
import functools
import glob
import gzip
import io
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from jaxfm.errors import (
    DataError,
    MissingInputError,
    PermissionDeniedError,
    RunError,
    UnavailableError,
)
from jaxfm.storage.base import S3

# A repository of the Hugging Face hub: hf://datasets/org/name[@revision]/path.
HUB = 'hf://'
COMPRESSED = ('.gz', '.zst')
# Seconds to wait for a connection and for an answer from a bucket, and the number of tries by s3fs.
# With a wrong endpoint, a run fails within two minutes.
CONNECT_TIMEOUT, READ_TIMEOUT, TRIES = 5, 20, 3
# Bytes fetched per request from a bucket or the hub.
BLOCK_BYTES = 8 << 20


@dataclasses.dataclass(frozen=True)
class File:
    """A file that was found.

    `name` is relative to the part of the glob before the first wildcard, so that a tree of files
    can move without changing the names.
    """

    path: str
    name: str
    size: int  # bytes, as stored (compressed)
    stamp: str  # changes when the file is written: modification time, ETag or blob

    @property
    def suffix(self) -> str:
        """The last suffix, ignoring a compression suffix: '.jsonl' for 'a.jsonl.gz'."""
        name = self.name.lower()
        return PurePosixPath(name.removesuffix('.gz').removesuffix('.zst')).suffix

    @property
    def is_remote(self) -> bool:
        return self.path.startswith((S3, HUB))

    @property
    def is_compressed(self) -> bool:
        return self.name.lower().endswith(COMPRESSED)

    @contextlib.contextmanager
    def open(self, start: int = 0) -> Iterator[BinaryIO]:
        """A stream of the decompressed bytes, from offset `start` on; errors name the file."""
        with explain_reading(self.path), contextlib.ExitStack() as stack:
            stream = stack.enter_context(self._open_stored())
            if self.name.lower().endswith('.gz'):
                stream = stack.enter_context(gzip.GzipFile(fileobj=stream))
                stream = io.BufferedReader(stream, 1 << 20)
            elif self.name.lower().endswith('.zst'):
                stream = io.BufferedReader(_Zstandard(stream), 1 << 20)
            if start:
                stream.seek(start)
            yield stream

    @contextlib.contextmanager
    def seekable(self) -> Iterator[BinaryIO]:
        """A seekable stream of the stored bytes, for formats that are read from the end."""
        with explain_reading(self.path), self._open_stored() as stream:
            yield stream

    @contextlib.contextmanager
    def on_disk(self) -> Iterator[str]:
        """A local path, for libraries that cannot read streams; copies a remote file."""
        with explain_reading(self.path):
            if not self.is_remote:
                self._check_unchanged()
                yield self.path
                return
            with tempfile.TemporaryDirectory() as directory:
                copy = os.path.join(directory, 'copy')
                _system(self.path).get_file(self.path, copy)
                yield copy

    def _open_stored(self) -> BinaryIO:
        if self.is_remote:
            return _system(self.path).open(self.path, 'rb', block_size=BLOCK_BYTES)
        self._check_unchanged()
        return open(self.path, 'rb', buffering=1 << 20)

    def _check_unchanged(self) -> None:
        status = os.stat(self.path)
        if (status.st_size, str(status.st_mtime_ns)) != (self.size, self.stamp):
            raise DataError(f'{self.path} has changed since this run started reading its data')


def find(patterns: str | list[str], key: str) -> list[File]:
    """The files that match any of the globs, sorted by name, each once.

    key: the config key to name in error messages.
    """
    found = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        files = (_find_remote if pattern.startswith((S3, HUB)) else _find_local)(pattern, key)
        for identity, file in files:
            found.setdefault(identity, file)
    return _with_unique_names(sorted(found.values(), key=lambda file: (file.name, file.path)))


@contextlib.contextmanager
def explain_reading(path: str) -> Iterator[None]:
    """Turns a library's exception about `path` into a RunError that names it."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        raised = _explain(path, error)
        if raised is None:
            raise
        raise raised from error


def extra(module: str, name: str = 'data'):
    """Imports a package of an extra. Raises MissingInputError if it is not installed."""
    try:
        return __import__(module, fromlist=['_'])
    except ImportError as error:
        raise MissingInputError(
            f"this needs the package {module.split('.')[0]}: pip install 'jaxfm[{name}]'"
        ) from error


def _find_local(pattern: str, key: str) -> list[tuple[str, File]]:
    pattern = os.path.expanduser(pattern)
    root = _fixed_part(pattern)
    with explain_reading(pattern):
        paths = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
        if not paths:
            raise MissingInputError(_explain_no_match(pattern, key))
        return [_local_file(path, root) for path in paths]


def _local_file(path: str, root: Path) -> tuple[str, File]:
    status = os.stat(path)
    name = Path(path).relative_to(root).as_posix()
    return os.path.realpath(path), File(path, name, status.st_size, str(status.st_mtime_ns))


def _fixed_part(pattern: str) -> Path:
    fixed = Path(pattern)
    while glob.has_magic(str(fixed)):
        fixed = fixed.parent
    return fixed.parent if fixed == Path(pattern) else fixed


def _explain_no_match(pattern: str, key: str) -> str:
    if Path(pattern).is_dir():
        return f'{key}: {pattern} is a directory; give a glob of files, such as {pattern}/**/*.txt'
    nearest = _fixed_part(pattern)
    while not nearest.is_dir():
        nearest = nearest.parent
    return (
        f'{key}: no file matches {pattern!r}; the nearest existing directory is {nearest.resolve()}'
    )


def _find_remote(pattern: str, key: str) -> list[tuple[str, File]]:
    scheme = S3 if pattern.startswith(S3) else HUB
    fixed = PurePosixPath(pattern.removeprefix(scheme))
    while glob.has_magic(str(fixed)):
        fixed = fixed.parent
    root = fixed if glob.has_magic(pattern) else fixed.parent
    with explain_reading(pattern):
        found = _system(pattern).glob(pattern, detail=True)
        if not found:
            # Raises if the bucket or repository does not exist.
            _system(pattern).ls('/'.join(fixed.parts[: 1 if scheme == S3 else 3]))
            place = f'object matches {pattern!r} at {_endpoint()}'
            if scheme == HUB:
                place = f'file matches {pattern!r}; write {HUB}datasets/ORG/NAME/PATH'
            raise MissingInputError(f'{key}: no {place}')
    entries = [entry for entry in found.values() if entry['type'] == 'file']
    if not entries:
        raise MissingInputError(
            f'{key}: {pattern} is a directory; give a glob of files, such as {pattern}/**/*.txt'
        )
    return [_remote_file(scheme, entry, root) for entry in entries]


def _remote_file(scheme: str, entry: dict, root: PurePosixPath) -> tuple[str, File]:
    path = scheme + entry['name']
    name = PurePosixPath(entry['name']).relative_to(root).as_posix()
    stamp = entry.get('ETag') or entry.get('blob_id') or entry.get('xet_hash') or ''
    return path, File(path, name, entry['size'], str(stamp).strip('"'))


def _system(path: str):
    return s3() if path.startswith(S3) else hub()


def _with_unique_names(files: list[File]) -> list[File]:
    """Files from different globs that share a name are given their full path as the name."""
    count = {}
    for file in files:
        count[file.name] = count.get(file.name, 0) + 1
    return [
        file if count[file.name] == 1 else dataclasses.replace(file, name=file.path)
        for file in files
    ]


@functools.cache
def s3():
    """The s3fs file system for all buckets; boto finds the endpoint and the credentials."""
    system = extra('s3fs').S3FileSystem(
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={
            'connect_timeout': CONNECT_TIMEOUT,
            'read_timeout': READ_TIMEOUT,
            'retries': {'total_max_attempts': 1},  # s3fs does its own retries
        },
    )
    system.retries = TRIES
    return system


@functools.cache
def hub():
    """The file system of the Hugging Face hub; HF_TOKEN or a login gives access."""
    package = extra('huggingface_hub', 'hub')
    return package.HfFileSystem(skip_instance_cache=True, use_listings_cache=False)


def _endpoint() -> str:
    return (
        os.environ.get('AWS_ENDPOINT_URL_S3')
        or os.environ.get('AWS_ENDPOINT_URL')
        or 'AWS (AWS_ENDPOINT_URL is not set)'
    )


def _explain(path: str, error: Exception) -> RunError | None:
    # zstandard and pyarrow errors are recognised by module name: the packages may be missing.
    is_format = isinstance(error, EOFError | gzip.BadGzipFile | zlib.error)
    if is_format or _is_of(error, 'zstandard', 'zstd', 'pyarrow'):
        return DataError(f'{path} is damaged or cut off: {error}')
    if path.startswith(S3):
        return _explain_s3(path, error)
    if path.startswith(HUB):
        return _explain_hub(path, error)
    if isinstance(error, PermissionError):
        return PermissionDeniedError(f'{path} cannot be read: permission denied')
    if isinstance(error, OSError):
        return MissingInputError(f'{path} cannot be read: {error.strerror or error}')
    return None


def _explain_s3(path: str, error: Exception) -> RunError | None:
    bucket = path.removeprefix(S3).split('/')[0]
    place = f'bucket {bucket} at {_endpoint()}'
    if isinstance(error, FileNotFoundError):
        return MissingInputError(f'{path} does not exist ({place}): {error}')
    if isinstance(error, PermissionError):
        return PermissionDeniedError(f'{path} cannot be read ({place}): {error}')
    if 'Credentials' in type(error).__name__:
        return PermissionDeniedError(
            f'{path}: no credentials for {place}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY '
            'or a profile'
        )
    if isinstance(error, OSError) or _is_of(error, 'botocore', 'aiohttp', 'fsspec'):
        said = str(error) or type(error).__name__
        return UnavailableError(f'{path} cannot be reached ({place}): {said}')
    return None


# Names of errors, because the package may be missing.
_NOT_ON_THE_HUB = {
    *('FileNotFoundError', 'EntryNotFoundError', 'HFValidationError', 'HfUriError'),
    *('RepositoryNotFoundError', 'RevisionNotFoundError', 'BucketNotFoundError'),
}


def _explain_hub(path: str, error: Exception) -> RunError | None:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {'GatedRepoError', 'PermissionError'}:
        return PermissionDeniedError(
            f'{path} cannot be read: accept its licence on the hub, if it is gated, and set '
            'HF_TOKEN to your access token'
        )
    # A path without ORG/NAME raises ValueError itself; its subclasses are about contents.
    if kinds & _NOT_ON_THE_HUB or type(error) in (ValueError, NotImplementedError):
        return MissingInputError(
            f'{path} is not on the hub, or is private and HF_TOKEN is not set; write '
            f'{HUB}datasets/ORG/NAME[@REVISION]/PATH'
        )
    if isinstance(error, OSError) or _is_of(error, 'httpx', 'huggingface_hub', 'hf_xet', 'fsspec'):
        said = ' '.join(str(error).split()) or type(error).__name__
        return UnavailableError(f'{path} cannot be reached on the hub: {said}')
    return None


def _is_of(error: Exception, *packages: str) -> bool:
    return any(
        kind.__module__.split('.')[0].startswith(packages) for kind in type(error).__mro__[:-1]
    )


class _Zstandard(io.RawIOBase):
    """Decompresses all frames; unlike the library's own reader, it detects a truncated frame."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self._library = extra('zstandard')
        self._frame = None
        self._rest = b''  # read but not yet decompressed
        self._ready = memoryview(b'')

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready and self._fill():
            pass
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _fill(self) -> bool:
        chunk = self._rest or self._stream.read(1 << 18)
        if not chunk:
            if self._frame is not None:
                raise EOFError('the last zstandard frame is incomplete')
            return False
        if self._frame is None:
            self._frame = self._library.ZstdDecompressor().decompressobj()
        self._ready = memoryview(self._frame.decompress(chunk))
        self._rest = self._frame.unused_data if self._frame.eof else b''
        if self._frame.eof:
            self._frame = None
        return True

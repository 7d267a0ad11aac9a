"""Files as a source sees them: found by globs, opened and decompressed, on disk or in a bucket.

What can go wrong with a file is turned into an error that names it: not there, forbidden,
unreachable, cut off.
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

COMPRESSED = ('.gz', '.zst')
# Seconds until a bucket counts as unreachable, for a connection and for an answer, and how often
# s3fs tries: a run with a wrong endpoint ends within two minutes.
CONNECT_TIMEOUT, READ_TIMEOUT, TRIES = 5, 20, 3
# What is fetched from a bucket at a time.
BLOCK_BYTES = 8 << 20


@dataclasses.dataclass(frozen=True)
class File:
    """A file that was found; `name` is relative to the fixed part of its glob: trees may move."""

    path: str
    name: str
    size: int  # bytes, as stored
    stamp: str  # changes when the file is written: time of modification, or ETag

    @property
    def suffix(self) -> str:
        """The last suffix, without that of a compression."""
        name = self.name.lower()
        return PurePosixPath(name.removesuffix('.gz').removesuffix('.zst')).suffix

    @property
    def is_compressed(self) -> bool:
        return self.name.lower().endswith(COMPRESSED)

    @contextlib.contextmanager
    def open(self, start: int = 0) -> Iterator[BinaryIO]:
        """A stream of the decompressed bytes from `start` on; errors name the file."""
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
        """The bytes as they are stored, for formats that are read from their end."""
        with explain_reading(self.path), self._open_stored() as stream:
            yield stream

    @contextlib.contextmanager
    def on_disk(self) -> Iterator[str]:
        """A path on this machine, for libraries that read no streams: a copy of a bucket's file."""
        with explain_reading(self.path):
            if not self.path.startswith(S3):
                self._check_unchanged()
                yield self.path
                return
            with tempfile.TemporaryDirectory() as directory:
                copy = os.path.join(directory, 'copy')
                s3().get_file(self.path, copy)
                yield copy

    def _open_stored(self) -> BinaryIO:
        if self.path.startswith(S3):
            return s3().open(self.path, 'rb', block_size=BLOCK_BYTES)
        self._check_unchanged()
        return open(self.path, 'rb', buffering=1 << 20)

    def _check_unchanged(self) -> None:
        status = os.stat(self.path)
        if (status.st_size, str(status.st_mtime_ns)) != (self.size, self.stamp):
            raise DataError(f'{self.path} has changed since this run started reading its data')


def find(patterns: str | list[str], key: str) -> list[File]:
    """The files of all globs, by name, each once; `key` is the config key that errors speak of."""
    found = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        files = (_find_s3 if pattern.startswith(S3) else _find_local)(pattern, key)
        for identity, file in files:
            found.setdefault(identity, file)
    return _with_unique_names(sorted(found.values(), key=lambda file: (file.name, file.path)))


@contextlib.contextmanager
def explain_reading(path: str) -> Iterator[None]:
    """Turns what a library raises about `path` into an error that a person can read."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        raised = _explain(path, error)
        if raised is None:
            raise
        raise raised from error


def extra(module: str):
    """Imports a package of the `data` extra."""
    try:
        return __import__(module, fromlist=['_'])
    except ImportError as error:
        raise MissingInputError(
            f"this needs the package {module.split('.')[0]}: pip install 'jaxfm[data]'"
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
        return f'{key}: {pattern} is a directory; name its files, as in {pattern}/**/*.txt'
    nearest = _fixed_part(pattern)
    while not nearest.is_dir():
        nearest = nearest.parent
    return f'{key}: no file matches {pattern!r}; the nearest directory is {nearest.resolve()}'


def _find_s3(pattern: str, key: str) -> list[tuple[str, File]]:
    fixed = PurePosixPath(pattern.removeprefix(S3))
    while glob.has_magic(str(fixed)):
        fixed = fixed.parent
    root = fixed if glob.has_magic(pattern) else fixed.parent
    with explain_reading(pattern):
        found = s3().glob(pattern, detail=True)
        if not found:
            s3().ls(fixed.parts[0])  # says when there is no such bucket
            raise MissingInputError(f'{key}: no object matches {pattern!r} at {_endpoint()}')
    entries = [entry for entry in found.values() if entry['type'] == 'file']
    if not entries:
        raise MissingInputError(
            f'{key}: {pattern} is a directory; name its files, as in {pattern}/**/*.txt'
        )
    return [_s3_file(entry, root) for entry in entries]


def _s3_file(entry: dict, root: PurePosixPath) -> tuple[str, File]:
    path = S3 + entry['name']
    name = PurePosixPath(entry['name']).relative_to(root).as_posix()
    return path, File(path, name, entry['size'], str(entry.get('ETag', '')).strip('"'))


def _with_unique_names(files: list[File]) -> list[File]:
    """Files of several globs that have the same name go by their whole path."""
    count = {}
    for file in files:
        count[file.name] = count.get(file.name, 0) + 1
    return [
        file if count[file.name] == 1 else dataclasses.replace(file, name=file.path)
        for file in files
    ]


@functools.cache
def s3():
    """The file system of all buckets; AWS_ENDPOINT_URL and credentials as boto finds them."""
    system = extra('s3fs').S3FileSystem(
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={
            'connect_timeout': CONNECT_TIMEOUT,
            'read_timeout': READ_TIMEOUT,
            'retries': {'total_max_attempts': 1},  # s3fs has retries of its own
        },
    )
    system.retries = TRIES
    return system


def _endpoint() -> str:
    return (
        os.environ.get('AWS_ENDPOINT_URL_S3')
        or os.environ.get('AWS_ENDPOINT_URL')
        or 'AWS (AWS_ENDPOINT_URL is not set)'
    )


def _explain(path: str, error: Exception) -> RunError | None:
    # The libraries of compression and parquet are known by name: they need not be installed.
    is_format = isinstance(error, EOFError | gzip.BadGzipFile | zlib.error)
    if is_format or _is_of(error, 'zstandard', 'zstd', 'pyarrow'):
        return DataError(f'{path} is damaged or cut off: {error}')
    if path.startswith(S3):
        return _explain_s3(path, error)
    if isinstance(error, PermissionError):
        return PermissionDeniedError(f'{path} cannot be read: permission denied')
    if isinstance(error, OSError):
        return MissingInputError(f'{path} cannot be read: {error.strerror or error}')
    return None


def _explain_s3(path: str, error: Exception) -> RunError | None:
    bucket = path.removeprefix(S3).split('/')[0]
    place = f'bucket {bucket} at {_endpoint()}'
    if isinstance(error, FileNotFoundError):
        return MissingInputError(f'{path} is not there ({place}): {error}')
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


def _is_of(error: Exception, *packages: str) -> bool:
    return any(
        kind.__module__.split('.')[0].startswith(packages) for kind in type(error).__mro__[:-1]
    )


class _Zstandard(io.RawIOBase):
    """Decompresses frame after frame; unlike the library's own reader, it notices a cut-off one."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self._library = extra('zstandard')
        self._frame = None
        self._rest = b''  # read, not decompressed yet
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
                raise EOFError('the last zstandard frame has no end')
            return False
        if self._frame is None:
            self._frame = self._library.ZstdDecompressor().decompressobj()
        self._ready = memoryview(self._frame.decompress(chunk))
        self._rest = self._frame.unused_data if self._frame.eof else b''
        if self._frame.eof:
            self._frame = None
        return True

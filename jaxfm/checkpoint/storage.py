"""The place checkpoints are kept: small files by name, a base for TensorStore, errors of ours.

A directory of a file system and a prefix of a bucket (`s3.py`) answer the same few questions, so
the layout of checkpoints, the lease and the sweep are written once. Nothing here knows what a
checkpoint is, and nothing imports jax.
"""

import contextlib
import dataclasses
import errno
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from jaxfm.errors import ConfigError, PermissionDeniedError, StorageError

S3 = 's3://'
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclasses.dataclass(frozen=True)
class Stored:
    """One file as a listing shows it."""

    size: int  # bytes
    modified: float  # seconds since 1970, by the clock of the storage: for people alone


class Storage(Protocol):
    """Names are relative, with slashes. Whatever fails raises a RunError that names the place.

    Only two other errors leave a storage: FileNotFoundError of `read`, FileExistsError of `write`.
    """

    root: str  # as a person would write it

    def prepare(self) -> None:
        """Makes the place if it can, and writes a probe: a bad one fails before training."""

    def check_readable(self) -> None:
        """Raises unless the place can be looked at; it need not exist yet."""

    def free_bytes(self) -> int | None:
        """Room for an ordinary user; None where there is no limit to ask for."""

    def read(self, name: str) -> bytes: ...

    def write(self, name: str, data: bytes, exclusive: bool = False) -> None:
        """All or nothing. exclusive: never over a file that is there (FileExistsError)."""

    def list(self, prefix: str = '') -> dict[str, Stored]:
        """Every file whose path has this directory in front; {} when there is none."""

    def empty_directories(self) -> Iterable[str]:
        """Those without a file below them: a deletion that was killed leaves some."""

    def remove(self, name: str) -> None:
        """A file, or a directory with all that is in it; no error when it is gone."""

    def kvstore(self, prefix: str) -> dict:
        """The spec of a TensorStore key-value store of this directory."""

    def retries(self) -> int:
        """Requests that were sent again since the start of this process."""


def open_storage(place: str | Path) -> Storage:
    """The storage of a path or of `s3://bucket/prefix`; nothing is asked or made yet.

    Raises:
      ConfigError: an address of another kind, or without a bucket.
      MissingInputError: S3 without the package that speaks to it.
    """
    if str(place).startswith(S3):
        from jaxfm.checkpoint.s3 import S3Storage

        return S3Storage(str(place))
    if re.match(r'\w+:/', str(place)):
        raise ConfigError(
            f'checkpoint.directory = {str(place)!r}: want a path of a file system or '
            's3://bucket/prefix'
        )
    return PosixStorage(place)


class PosixStorage:
    """A directory of a local or shared file system."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory).expanduser().absolute()
        self.root = str(self.directory)

    def prepare(self) -> None:
        with self._explained():
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory) as probe:
                probe.write(b'room for one checkpoint?')

    def check_readable(self) -> None:
        with self._explained(done='read'), contextlib.suppress(FileNotFoundError):
            os.listdir(self.directory)

    def free_bytes(self) -> int:
        with self._explained(done='read'):
            place = self.directory
            while not place.exists():
                place = place.parent
            return shutil.disk_usage(place).free

    def read(self, name: str) -> bytes:
        with self._explained(name, done='read'):
            return (self.directory / name).read_bytes()

    def write(self, name: str, data: bytes, exclusive: bool = False) -> None:
        try:
            self._write(name, data, exclusive)
        except FileNotFoundError:  # another process found the directory empty and removed it
            self._write(name, data, exclusive)

    def _write(self, name: str, data: bytes, exclusive: bool) -> None:
        path = self.directory / name
        written = path.with_name(f'.{path.name}.{uuid.uuid4().hex[:8]}.tmp')
        with self._explained():  # a file in its place is not the one that exclusive means
            path.parent.mkdir(parents=True, exist_ok=True)
        with self._explained(name):
            try:
                with open(written, 'xb') as file:
                    file.write(data)
                    os.fsync(file.fileno())
                if exclusive:
                    os.link(written, path)
                else:
                    os.replace(written, path)
            finally:
                written.unlink(missing_ok=True)
            _sync_directory(path.parent)

    def list(self, prefix: str = '') -> dict[str, Stored]:
        found = {}
        with self._explained(done='read'):
            for directory, _, names in os.walk(self.directory / prefix, onerror=_unless_gone):
                for name in names:
                    path = Path(directory, name)
                    with contextlib.suppress(FileNotFoundError):  # deleted since
                        status = path.stat()
                        key = path.relative_to(self.directory).as_posix()
                        found[key] = Stored(status.st_size, status.st_mtime)
        return found

    def empty_directories(self) -> Iterable[str]:
        directories = {path for path, *_ in os.walk(self.directory)} - {self.root}
        filled = {str(parent) for name in self.list() for parent in (self.directory / name).parents}
        return [os.path.relpath(path, self.directory) for path in sorted(directories - filled)]

    def remove(self, name: str) -> None:
        path = self.directory / name
        with self._explained(name), contextlib.suppress(FileNotFoundError):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        with contextlib.suppress(OSError):  # not empty
            if path.parent != self.directory:
                path.parent.rmdir()

    def kvstore(self, prefix: str) -> dict:
        return {'driver': 'file', 'path': f'{self.directory / prefix}/'}

    def retries(self) -> int:
        return 0

    @contextlib.contextmanager
    def _explained(self, name: str = '', done: str = 'written') -> Iterator[None]:
        """Turns errors of the file system into ours: one line, the right exit code."""
        what = f'checkpoint directory {self.root}'
        try:
            yield
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            if error.errno in _DENIED:
                raise PermissionDeniedError(f'{what} cannot be {done}: {reason}') from error
            if error.errno in _FULL:
                raise StorageError(f'{what} is full: {reason}') from error
            if name and isinstance(error, (FileNotFoundError, FileExistsError)):
                raise
            if isinstance(error, (FileExistsError, NotADirectoryError)):
                place = error.filename if isinstance(error, FileExistsError) else self.root
                raise ConfigError(f'checkpoint directory {place} is not a directory') from error
            raise StorageError(f'{what} cannot be used: {reason}') from error


def _unless_gone(error: OSError) -> None:
    """What cannot be listed is not empty: a run would begin anew, beside all that is there."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def _sync_directory(directory: Path) -> None:
    """A new name survives a power cut only when its directory is on the disk, too."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

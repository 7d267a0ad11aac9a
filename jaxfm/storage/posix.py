"""Storage in a directory of a local or shared file system."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from jaxfm.errors import ConfigError, PermissionDeniedError, StorageError
from jaxfm.storage.base import Stored
from jaxfm.storage.whole import make_directory, sync_directory, write_file

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


class PosixStorage:
    """A directory of a local or shared file system. See `Storage` for what the methods promise."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory).expanduser().absolute()
        self.root = str(self.directory)
        self._path_for_tensorstore()  # a path that cannot be used is refused at once

    def prepare(self) -> None:
        with self._explain_errors():
            make_directory(self.directory)
            with tempfile.TemporaryFile(dir=self.directory) as probe:
                probe.write(b'room for one checkpoint?')

    def check_readable(self) -> None:
        with self._explain_errors(done='read'), contextlib.suppress(FileNotFoundError):
            os.listdir(self.directory)

    def free_bytes(self) -> int:
        with self._explain_errors(done='read'):
            place = self.directory
            while not place.exists():
                place = place.parent
            return shutil.disk_usage(place).free

    def read(self, name: str) -> bytes:
        with self._explain_errors(name, done='read'):
            return (self.directory / name).read_bytes()

    def write(self, name: str, data: bytes, exclusive: bool = False) -> None:
        try:
            self._write(name, data, exclusive)
        except FileNotFoundError:  # another process has just removed the directory as empty
            self._write(name, data, exclusive)

    def _write(self, name: str, data: bytes, exclusive: bool) -> None:
        path = self.directory / name
        with self._explain_errors():  # a FileExistsError here is not about `path` itself
            make_directory(path.parent)
        with self._explain_errors(name):
            with write_file(path, exclusive) as file:
                file.write(data)
            sync_directory(path.parent)

    def list(self, prefix: str = '') -> dict[str, Stored]:
        found = {}
        with self._explain_errors(done='read'):
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
        with self._explain_errors(name), contextlib.suppress(FileNotFoundError):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        with contextlib.suppress(OSError):  # not empty
            if path.parent != self.directory:
                path.parent.rmdir()

    def kvstore(self, prefix: str) -> dict:
        return {'driver': 'file', 'path': f'{Path(self._path_for_tensorstore(), prefix)}/'}

    def _path_for_tensorstore(self) -> str:
        """TensorStore takes UTF-8, while Python's text of a path depends on the locale."""
        try:
            return os.fsencode(self.directory).decode('utf-8')
        except UnicodeDecodeError:
            raise ConfigError(
                f'{self.root!r} is not UTF-8, which TensorStore needs: give another --workdir or '
                'config.checkpoint.directory'
            ) from None

    def retries(self) -> int:
        return 0

    @contextlib.contextmanager
    def _explain_errors(self, name: str = '', done: str = 'written') -> Iterator[None]:
        """Turns file system errors into ours, with a one-line message and the right exit code.

        name: lets FileNotFoundError and FileExistsError about this file through.
        """
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
    """Raises a listing error unless the directory is gone.

    A directory that cannot be listed must not look empty: the run would start from scratch although
    checkpoints exist.
    """
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error

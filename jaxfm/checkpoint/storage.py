"""The place checkpoints are written to: whether it can be written, and how much room it has.

The checkpointer asks only these questions, so another kind of storage is another class beside this.
"""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxfm.errors import ConfigError, PermissionDeniedError, StorageError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


class PosixStorage:
    """A directory of a local or shared file system."""

    def __init__(self, directory: str | Path):
        if '://' in str(directory):
            raise ConfigError(
                f'checkpoint.directory = {str(directory)!r}: '
                'only paths of a file system are supported'
            )
        self.directory = Path(directory).expanduser().absolute()

    def prepare(self) -> None:
        """Makes the directory and writes a probe, so that a bad place fails before training."""
        with explained(f'checkpoint directory {self.directory}'):
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory) as probe:
                probe.write(b'room for one checkpoint?')

    def free_bytes(self) -> int:
        """Bytes an ordinary user may still write here; the directory need not exist yet."""
        place = self.directory
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns errors of the file system about `what` into ours: one line, the right exit code."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in _DENIED:
            raise PermissionDeniedError(f'{what} cannot be written: {reason}') from error
        if error.errno in _FULL:
            raise StorageError(f'{what} is full: {reason}') from error
        if isinstance(error, (FileExistsError, NotADirectoryError)):
            raise ConfigError(f'{what} is not a directory') from error
        raise StorageError(f'{what} cannot be used: {reason}') from error

"""Files that a mode writes, and a reason to stop when they cannot be written."""

import contextlib
import json
import os
from pathlib import Path

from jaxfm.errors import ConfigError, PermissionDeniedError, StorageError


def write_lines(path: Path, records: list[dict]) -> None:
    """Writes JSON lines; directories that lack are made."""
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(''.join(json.dumps(record) + '\n' for record in records), 'utf-8')


def check_absent(directory: Path) -> None:
    """Whether there is nothing yet where a directory is to be written, and there it can be.

    Raises:
      ConfigError: something is.
      StorageError, PermissionDeniedError: the nearest directory above it is none, or closed to us.
    """
    is_other = directory.is_symlink() or (directory.exists() and not directory.is_dir())
    if is_other or (directory.is_dir() and any(directory.iterdir())):
        raise ConfigError(f'{directory} is there already, and not empty: give another --output')
    above = next(parent for parent in directory.absolute().parents if parent.exists())
    if not above.is_dir():
        raise StorageError(f'{directory}: cannot be written: {above} is no directory')
    if not os.access(above, os.W_OK):
        raise PermissionDeniedError(f'{directory}: cannot be written: {above} may not be changed')


@contextlib.contextmanager
def explained(path: Path):
    """Inside it an OSError becomes the RunError that names the path."""
    try:
        yield path
    except OSError as error:
        kind = PermissionDeniedError if isinstance(error, PermissionError) else StorageError
        raise kind(f'{path}: cannot be written: {error.strerror}') from None

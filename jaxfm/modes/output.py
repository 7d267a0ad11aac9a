"""Files that a mode writes, and a reason to stop when they cannot be written."""

import json
import os
from pathlib import Path

from jaxfm.errors import ConfigError, PermissionDeniedError, StorageError
from jaxfm.storage.files import explain_write


def write_lines(path: Path, records: list[dict]) -> None:
    """Writes JSON lines; directories that lack are made."""
    with explain_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(''.join(json.dumps(record) + '\n' for record in records), 'utf-8')


def check_absent(directory: Path) -> None:
    """Raises unless there is nothing yet where a directory is to be written, and it can be.

    Raises:
      ConfigError: something is there.
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

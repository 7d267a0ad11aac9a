"""Writing the output of a mode, with errors that explain why it cannot be written."""

import json
import os
from pathlib import Path

from jaxfm.errors import ConfigError, PermissionDeniedError, StorageError
from jaxfm.storage.files import explain_write


def write_lines(path: Path, records: list[dict]) -> None:
    """Writes JSON lines; creates missing directories.

    Raises:
      StorageError, PermissionDeniedError: the file cannot be written.
    """
    with explain_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(''.join(json.dumps(record) + '\n' for record in records), 'utf-8')


def check_absent(directory: Path) -> None:
    """Checks that a directory can be written as new: it is absent or empty, and writable.

    Raises:
      ConfigError: it is a file or a link, or is not empty.
      StorageError: its nearest existing parent is not a directory.
      PermissionDeniedError: that parent is not writable.
    """
    is_other = directory.is_symlink() or (directory.exists() and not directory.is_dir())
    if is_other or (directory.is_dir() and any(directory.iterdir())):
        raise ConfigError(
            f'{directory} already exists and is not an empty directory: give another --output'
        )
    above = next(parent for parent in directory.absolute().parents if parent.exists())
    if not above.is_dir():
        raise StorageError(f'{directory}: cannot be written: {above} is not a directory')
    if not os.access(above, os.W_OK):
        raise PermissionDeniedError(
            f'{directory}: cannot be written: no permission to write in {above}'
        )

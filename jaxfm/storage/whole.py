"""Files and directories written whole or not at all, and reasons to stop when they cannot be."""

import contextlib
from pathlib import Path

from jaxfm.errors import PermissionDeniedError, StorageError


@contextlib.contextmanager
def explained(path: Path):
    """Inside it an OSError becomes the RunError that names the path."""
    try:
        yield path
    except OSError as error:
        kind = PermissionDeniedError if isinstance(error, PermissionError) else StorageError
        raise kind(f'{path}: cannot be written: {error.strerror}') from None

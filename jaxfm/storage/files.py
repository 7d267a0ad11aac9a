"""Files that a person has named: what the system or a parser says of them becomes an error of ours.

The places of checkpoints (`posix`, `s3`) and of data (`find`) tell more failures apart than this.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from jaxfm.errors import (
    DataError,
    MissingInputError,
    PermissionDeniedError,
    RunError,
    StorageError,
)


@contextlib.contextmanager
def explain_errors(
    failure: str, kind: type[RunError] = StorageError, *, denied: str = '', missing: str = ''
) -> Iterator[None]:
    """Turns an OSError into PermissionDeniedError or an error of `kind`: `failure`, and the reason.

    denied: the whole sentence in place of that when permission is wanting.
    missing: the whole sentence of the MissingInputError when there is no such file.
    """
    try:
        yield
    except OSError as error:
        sentence = f'{failure}: {error.strerror or error}'
        if isinstance(error, PermissionError):
            raise PermissionDeniedError(denied or sentence) from error
        if missing and isinstance(error, FileNotFoundError):
            raise MissingInputError(missing) from error
        raise kind(sentence) from error


def explain_write(path: Any) -> contextlib.AbstractContextManager:
    """`explain_errors` of what is written to a path."""
    return explain_errors(f'{path}: cannot be written')


@contextlib.contextmanager
def explain_damage(failure: str) -> Iterator[None]:
    """Turns what a decoder of text or JSON raises into a DataError: `failure`, and the reason."""
    try:
        yield
    except (ValueError, RecursionError) as error:  # the second: lists in lists without end
        raise DataError(f'{failure}: {error}') from error


def check_object(value: Any, failure: str) -> dict:
    """A value that was read from JSON. Raises DataError unless it is an object."""
    if not isinstance(value, dict):
        raise DataError(f'{failure}: an object is expected, not a {type(value).__name__}')
    return value

"""Turns system and parser errors about files that the user named into our errors.

Checkpoint storage (`posix`, `s3`) and data files (`find`) distinguish more kinds of failure.
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
    """Turns an OSError into PermissionDeniedError or `kind`, with the message `failure: reason`.

    denied: the full message to use instead when permission is denied.
    missing: the full message of a MissingInputError to raise instead when the file does not exist.
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
    """`explain_errors` for writing to a path."""
    return explain_errors(f'{path}: cannot be written')


@contextlib.contextmanager
def explain_damage(failure: str) -> Iterator[None]:
    """Turns a text or JSON decoding error into a DataError with the message `failure: reason`."""
    try:
        yield
    except (ValueError, RecursionError) as error:  # RecursionError: JSON nested too deeply
        raise DataError(f'{failure}: {error}') from error


def check_object(value: Any, failure: str) -> dict:
    """Returns a value read from JSON. Raises DataError unless it is an object."""
    if not isinstance(value, dict):
        raise DataError(f'{failure}: want a JSON object, got a {type(value).__name__}')
    return value

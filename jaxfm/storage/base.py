"""The interface of a storage: small files by name, a key-value store for TensorStore, our errors.

A directory (`posix.py`) and a prefix of a bucket (`s3.py`) implement the same few methods, so the
checkpoint layout, the lease and the sweep are written only once. Nothing here knows what a
checkpoint is, and nothing imports jax.
"""

import dataclasses
from collections.abc import Iterable
from typing import Protocol

S3 = 's3://'


@dataclasses.dataclass(frozen=True)
class Stored:
    """One file in a listing."""

    size: int  # bytes
    modified: float  # Unix time in seconds, by the storage's clock; only for display


class Storage(Protocol):
    """Stores files under relative names with slashes. Failures raise a RunError naming the place.

    The only other errors are FileNotFoundError from `read` and FileExistsError from `write`.
    """

    root: str  # absolute path or URL, as shown in messages

    def prepare(self) -> None:
        """Creates the place if possible and writes a probe, to find problems before training."""

    def check_readable(self) -> None:
        """Raises unless the place can be read; it need not exist yet."""

    def free_bytes(self) -> int | None:
        """Bytes available to an unprivileged user; None if the storage has no known limit."""

    def read(self, name: str) -> bytes: ...

    def write(self, name: str, data: bytes, exclusive: bool = False) -> None:
        """Writes a file atomically. exclusive: raises FileExistsError if it already exists."""

    def list(self, prefix: str = '') -> dict[str, Stored]:
        """{name: Stored} of every file below the directory `prefix`; {} if there are none."""

    def empty_directories(self) -> Iterable[str]:
        """Directories with no file anywhere below them, as an interrupted deletion leaves them."""

    def remove(self, name: str) -> None:
        """Removes a file, or a directory and its contents; no error if it does not exist."""

    def kvstore(self, prefix: str) -> dict:
        """The spec of a TensorStore key-value store for this directory."""

    def retries(self) -> int:
        """Number of requests retried since this process started."""

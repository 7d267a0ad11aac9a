"""The place a run's files are kept: small files by name, a base for TensorStore, errors of ours.

A directory of a file system (`posix.py`) and a prefix of a bucket (`s3.py`) answer the same few
questions, so the layout of checkpoints, the lease and the sweep are written once. Nothing here
knows what a checkpoint is, and nothing imports jax.
"""

import dataclasses
from collections.abc import Iterable
from typing import Protocol

S3 = 's3://'


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

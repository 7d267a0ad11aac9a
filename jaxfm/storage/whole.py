"""Atomic writes of local files and directories: write under a temporary name, then rename.

If a process is killed, the old content stays, with a uniquely named temporary next to it. A file is
fsynced before it is renamed; `sync_directory` makes the new name durable too.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def write_file(path: Path, exclusive: bool = False) -> Iterator[BinaryIO]:
    """Yields a file to write, which replaces `path` when the block ends; on an error it is removed.

    exclusive: raises FileExistsError if `path` already exists.
    """
    temporary = _temporary(path)
    try:
        with open(temporary, 'xb') as file:
            yield file
            sync(file)
        if exclusive:
            os.link(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # renamed, or never made
            temporary.unlink()


@contextlib.contextmanager
def write_directory(directory: Path, within: Path | None = None) -> Iterator[Path]:
    """Yields a directory to fill, renamed to `directory` when the block ends; removed on an error.

    The caller must `sync` the files in it. If two processes make the same directory, one wins.

    within: parent of the temporary directory, on the same file system; by default, the parent of
    `directory`.
    """
    temporary = _temporary((within or directory.parent) / directory.name)
    try:
        temporary.mkdir()
        yield temporary
        publish(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, directory: Path) -> None:
    """Renames a complete temporary directory, unless another process has already made it."""
    try:
        temporary.rename(directory)
    except OSError:
        # Another process has made the same directory meanwhile; its files are as good as ours.
        if not directory.exists():
            raise


def remove_directory(directory: Path) -> None:
    """Removes a directory. It is renamed first, so it is never seen half deleted under its name."""
    temporary = _temporary(directory)
    directory.rename(temporary)
    shutil.rmtree(temporary)


def make_directory(directory: Path) -> None:
    """Makes a directory and its missing parents, each of which survives a power cut."""
    if not directory.is_dir():
        if not directory.parent.exists():
            make_directory(directory.parent)
        directory.mkdir(exist_ok=True)
        sync_directory(directory.parent)


def sync(file) -> None:
    """Flushes and fsyncs a file, so that its content survives a power cut."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Fsyncs a directory: a new or renamed file survives a power cut only after that."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    """A unique temporary name in the directory of `path`."""
    return path.with_name(f'.{path.name}.{uuid.uuid4().hex[:8]}.tmp')

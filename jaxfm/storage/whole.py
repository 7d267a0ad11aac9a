"""Files and directories that appear whole or not at all: they are renamed once they are written.

A process that is killed leaves what was there before, and a temporary with a name of its own beside
it. A file is on the disk before it has its name; `sync_directory` makes the name survive as well.
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
    """A file to fill, which replaces `path` when the block ends; an error removes it instead.

    exclusive: never replaces anything (FileExistsError).
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
    """A directory to fill, which becomes `directory` when the block ends; an error removes it.

    The files in it are the caller's to `sync`. Of two processes that make the same, one wins.

    within: where it is kept until then, on the same file system; beside `directory` by default.
    """
    temporary = _temporary((within or directory.parent) / directory.name)
    try:
        temporary.mkdir()
        yield temporary
        publish(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, directory: Path) -> None:
    """Gives a whole directory its name, unless another process has done so."""
    try:
        temporary.rename(directory)
    except OSError:
        # Another process has made the same meanwhile; its files are as good as ours.
        if not directory.exists():
            raise


def remove_directory(directory: Path) -> None:
    """Removes a directory; no half of it is left under its name."""
    temporary = _temporary(directory)
    directory.rename(temporary)
    shutil.rmtree(temporary)


def sync(file) -> None:
    """Makes what was written to a file survive a power cut."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """A new name survives a power cut only when its directory is on the disk, too."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    """A name beside `path` that nobody else uses."""
    return path.with_name(f'.{path.name}.{uuid.uuid4().hex[:8]}.tmp')

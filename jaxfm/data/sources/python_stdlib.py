"""The source of the running interpreter's standard library, .py files only."""

import functools
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from jaxfm.data import PythonStdlibConfig
from jaxfm.data.documents import Document
from jaxfm.data.sources import is_heldout, records
from jaxfm.data.sources.formats import Shard, make_text_shards, read_text
from jaxfm.errors import MissingInputError
from jaxfm.storage.find import File

# Directories that contain tests or tables, or that are not part of the library at all.
EXCLUDED_DIRECTORIES = frozenset(
    'test tests idle_test encodings pydoc_data idlelib'.split()
    + 'site-packages dist-packages __pycache__'.split()
)
# Files written when the interpreter was built: they differ between machines with the same release.
EXCLUDED_PREFIXES = ('_sysconfigdata', 'config-')


class PythonStdlib:
    """The standard library, one document per file. Empty and undecodable files are left out."""

    def __init__(self, config: PythonStdlibConfig):
        self.config = config
        self.root = Path(sysconfig.get_path('stdlib'))
        self.bad_records: dict[str, str] = {}

    def files(self) -> list[tuple[File, str]]:
        """(file, side) by name. Raises MissingInputError if there are none."""
        return self._files

    def fingerprint(self) -> str:
        """Hash of names, sizes, modification times and sides; does not read contents."""
        lines = [[file.name, file.size, file.stamp, side] for file, side in self._files]
        return hashlib.sha256(json.dumps(lines).encode()).hexdigest()

    def shards(self) -> list[Shard]:
        return make_text_shards(self._files)

    def read(self, shard: Shard) -> Iterator[tuple[bool, Document]]:
        for file, side in shard.files:
            try:
                yield from read_text(file, side, self.config.heldout_fraction)
            except records.BadRecord as error:
                self.bad_records[file.name] = f'{file.path} {error}'

    @functools.cached_property
    def _files(self) -> list[tuple[File, str]]:
        found = sorted(_library_files(self.root), key=lambda file: file.name)
        if not found:
            raise MissingInputError(
                f"{self.root} has no .py files: is this Python's standard library zipped?"
            )
        fraction = self.config.heldout_fraction
        return [(file, 'heldout' if is_heldout(file.name, fraction) else 'train') for file in found]


def _library_files(root: Path) -> Iterator[File]:
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [
            name
            for name in subdirectories
            if name not in EXCLUDED_DIRECTORIES and not name.startswith(EXCLUDED_PREFIXES)
        ]
        for name in names:
            if name.endswith('.py') and not name.startswith(EXCLUDED_PREFIXES):
                yield _file(Path(directory, name), root)


def _file(path: Path, root: Path) -> File:
    status = path.stat()
    name = path.relative_to(root).as_posix()
    return File(str(path), name, status.st_size, str(status.st_mtime_ns))

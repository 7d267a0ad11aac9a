"""Sources: which documents there are, and which of them are held out.

A source surveys its files once: it lists them in a fixed order, drops what repeats, and gives every
document a digest, so that the fingerprint of a survey changes with any byte of any document. Text
is read afterwards, document by document. A text that stands on both sides stays held out only.
"""

import dataclasses
import glob
import hashlib
import logging
import os
import sysconfig
from pathlib import Path

from jaxfm.data import PythonStdlibConfig, TextConfig
from jaxfm.errors import DataError, MissingInputError, PermissionDeniedError

log = logging.getLogger('jaxfm')

# Directories of the standard library that are tests, tables or not of the library at all.
EXCLUDED_DIRECTORIES = frozenset(
    'test tests idle_test encodings pydoc_data idlelib'.split()
    + 'site-packages dist-packages __pycache__'.split()
)
# What the build of one interpreter wrote: the same release on another machine has other text here.
EXCLUDED_PREFIXES = ('_sysconfigdata', 'config-')


@dataclasses.dataclass(frozen=True)
class Document:
    """Bytes [start, stop) of a file that is one text; `digest` is of those bytes."""

    name: str
    path: Path
    start: int
    stop: int
    digest: str

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start

    def read(self) -> str:
        """The text; DataError when the file is no longer what the survey saw."""
        content = _read_bytes(self.path)[self.start : self.stop]
        if _digest(content) != self.digest:
            raise DataError(f'{self.path} has changed since this run started reading its data')
        return content.decode()


@dataclasses.dataclass(frozen=True)
class Survey:
    """All documents of a source, in their order, and what was left out."""

    train: tuple[Document, ...]
    heldout: tuple[Document, ...]
    # Files whose content stands in another file.
    duplicates: int
    # Empty or undecodable files, where the source allows them.
    skipped: int

    @property
    def fingerprint(self) -> str:
        """sha256 over names and contents of both sides, in order."""
        lines = [
            f'{side}\t{document.name}\t{document.digest}\n'
            for side, documents in (('train', self.train), ('heldout', self.heldout))
            for document in documents
        ]
        return _digest(''.join(lines).encode())


class PythonStdlib:
    """The running interpreter's standard library, .py files only."""

    def __init__(self, config: PythonStdlibConfig):
        self.config = config
        self.root = Path(sysconfig.get_path('stdlib'))

    def files(self) -> tuple[list[tuple[str, Path]], list[tuple[str, Path]]]:
        """(name, path) of the train and the held-out files, by name."""
        named = [
            (path.relative_to(self.root).as_posix(), path) for path in _library_files(self.root)
        ]
        if not named:
            raise MissingInputError(
                f'{self.root} has no .py files: is the library of this Python zipped?'
            )
        return _split_by_hash(sorted(named), self.config.heldout_fraction)

    def survey(self) -> Survey:
        """Reads every file once; empty and undecodable ones are skipped."""
        train, heldout = self.files()
        return _both_sides(_survey(train, heldout, skip_bad=True))


class Text:
    """Local UTF-8 files, found by globs; a file is a document."""

    def __init__(self, config: TextConfig):
        self.config = config

    def files(self) -> tuple[list[tuple[str, Path]], list[tuple[str, Path]]]:
        """(name, path) of the train and the held-out files; MissingInputError for an empty glob."""
        named = _expand(self.config.files)
        if not self.config.heldout_files:
            return _split_by_hash(named, self.config.heldout_fraction)
        heldout = _expand(self.config.heldout_files)
        heldout_paths = {path.resolve() for _, path in heldout}
        return [file for file in named if file[1].resolve() not in heldout_paths], heldout

    def survey(self) -> Survey:
        """Reads every file once; an empty, undecodable or unreadable one is an error."""
        train, heldout = self.files()
        survey = _survey(train, heldout, skip_bad=False)
        if not self.config.heldout_files and not (survey.train and survey.heldout):
            survey = _hold_out_tails(survey, self.config.heldout_fraction)
        return _both_sides(survey)


def _library_files(root: Path):
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [
            name
            for name in subdirectories
            if name not in EXCLUDED_DIRECTORIES and not name.startswith(EXCLUDED_PREFIXES)
        ]
        for name in names:
            if name.endswith('.py') and not name.startswith(EXCLUDED_PREFIXES):
                yield Path(directory, name)


def _split_by_hash(named, fraction: float):
    """A file's side depends on its name alone, so it stays when files come and go."""
    train, heldout = [], []
    for name, path in named:
        value = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
        (heldout if value < fraction else train).append((name, path))
    return train, heldout


def _expand(patterns: list[str]) -> list[tuple[str, Path]]:
    """The files of all globs; names are relative to the fixed part of a glob: trees may move."""
    found = {}
    for pattern in patterns:
        pattern = os.path.expanduser(pattern)
        root = _fixed_part(pattern)
        paths = [Path(match) for match in glob.glob(pattern, recursive=True)]
        paths = [path for path in paths if path.is_file()]
        if not paths:
            raise MissingInputError(_nothing_matches(pattern))
        for path in paths:
            found.setdefault(path.resolve(), (path.relative_to(root).as_posix(), path))
    return sorted(found.values())


def _fixed_part(pattern: str) -> Path:
    fixed = Path(pattern)
    while glob.has_magic(str(fixed)):
        fixed = fixed.parent
    return fixed.parent if fixed == Path(pattern) else fixed


def _nothing_matches(pattern: str) -> str:
    if Path(pattern).is_dir():
        return f'data.source: {pattern} is a directory; name its files, as in {pattern}/**/*.txt'
    nearest = _fixed_part(pattern)
    while not nearest.is_dir():
        nearest = nearest.parent
    return f'data.source: no file matches {pattern!r}; the nearest directory is {nearest.resolve()}'


def _survey(train, heldout, skip_bad: bool) -> Survey:
    seen, sides, duplicates, skipped = set(), [], 0, 0
    # Held-out files come first: of two equal texts, the held-out one stays.
    for files in (heldout, train):
        documents = []
        for name, path in files:
            content = _read_bytes(path)
            problem = _problem(content)
            if problem and not skip_bad:
                raise DataError(f'{path} {problem}')
            digest = _digest(content)
            skipped += bool(problem)
            duplicates += not problem and digest in seen
            if not problem and digest not in seen:
                documents.append(Document(name, path, 0, len(content), digest))
            seen.add(digest)
        sides.append(tuple(documents))
    return Survey(train=sides[1], heldout=sides[0], duplicates=duplicates, skipped=skipped)


def _both_sides(survey: Survey) -> Survey:
    for side, documents in (('train on', survey.train), ('hold out', survey.heldout)):
        if not documents:
            total = len(survey.train) + len(survey.heldout)
            raise DataError(f'data.source: of {total} documents none is left to {side}')
    return survey


def _hold_out_tails(survey: Survey, fraction: float) -> Survey:
    """Holds out the last lines of every document instead of some documents."""
    whole = sorted(survey.train + survey.heldout, key=lambda document: document.name)
    log.info(
        'held-out: too few files to choose from, so the last %.3g of each is held out', fraction
    )
    train, heldout = [], []
    for document in whole:
        content = _read_bytes(document.path)
        cut = _cut(content, int(len(content) * (1 - fraction)))
        for documents, start, stop in ((train, 0, cut), (heldout, cut, len(content))):
            if start < stop:
                part = dataclasses.replace(
                    document, start=start, stop=stop, digest=_digest(content[start:stop])
                )
                documents.append(part)
    return dataclasses.replace(survey, train=tuple(train), heldout=tuple(heldout))


def _cut(content: bytes, near: int) -> int:
    """The last line start at or before `near`; in a text of one line, a start of a character."""
    cut = content.rfind(b'\n', 0, near) + 1
    if cut:
        return cut
    while near > 0 and content[near] & 0xC0 == 0x80:
        near -= 1
    return near


def _problem(content: bytes) -> str:
    """What makes the bytes unfit as a document; '' when nothing does."""
    if not content.strip():
        return 'is empty'
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return f'is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}'
    return ''


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except PermissionError as error:
        raise PermissionDeniedError(f'{path} cannot be read: permission denied') from error
    except OSError as error:
        raise MissingInputError(f'{path} cannot be read: {error.strerror}') from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

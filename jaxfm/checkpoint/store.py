"""The layout of checkpoints on storage: which of them count, and whether one is undamaged.

    <step>/<attempt>/state/...       arrays, one OCDBT database
    <step>/<attempt>/manifest.json   all arrays and files of the step, data position, config
    <step>/commit.json               written last: which attempt counts, and the manifest's digest
    <step>/set_aside.<attempt>.json  a commit that no longer counts, but whose attempt is kept
    lease/<epoch>.json               who may write

Each attempt to save has its own directory, so an incomplete save, or one by a replaced writer,
never mixes with another. The commit holds the digest of the manifest, and the manifest the digests
of everything else; commits and leases carry their own digest (`seal`).
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from jaxfm.errors import DamagedError, DataError, LockedError, MissingInputError
from jaxfm.storage.base import Storage, Stored
from jaxfm.storage.lease import Record, read_lease
from jaxfm.storage.seal import seal, unseal

# Of the format. 1: names of arrays with '/', and no file for Orbax.
VERSION = 2
# Files up to this size have a digest; larger ones hold chunks of arrays, which have fingerprints.
SMALL_BYTES = 1 << 20
# Orbax's description of the tree of arrays; it has a digest, whatever its size.
METADATA = '_METADATA'
_COMMIT = re.compile(r'(\d+)/commit\.json')
_SET_ASIDE = re.compile(r'(\d+)/set_aside\.([0-9a-f]{12})\.json')
# The names a save creates. _EMPTY: directories that may be left empty. _SAVED: files of an
# attempt, a commit, the temporary file of a commit, the marker of what was set aside.
_EMPTY = re.compile(r'\d+(/[0-9a-f]{12}(/|$)|$)')
_SAVED = re.compile(
    r'(\d+)/([0-9a-f]{12}(?=/)|commit\.json$|set_aside\.[0-9a-f]{12}\.json$'
    r'|\.(?:commit|set_aside\.[0-9a-f]{12})\.json\.[0-9a-f]{8}\.tmp$)'
)

Listing = dict[str, Stored]


@dataclasses.dataclass(frozen=True)
class Commit:
    """One committed step. epoch: the lease epoch (fencing token) it was committed under."""

    step: int
    attempt: str
    epoch: int
    digest: str  # of the manifest

    @property
    def directory(self) -> str:
        return f'{self.step}/{self.attempt}'


def new_attempt() -> str:
    """A unique name for an attempt to save."""
    return uuid.uuid4().hex[:12]


class Store:
    """The checkpoints on a storage, for their writer and for readers."""

    def __init__(self, storage: Storage):
        self.storage = storage

    def commits(self, listing: Listing | None = None) -> dict[int, Commit]:
        """{step: commit} of the commits that count, ordered by step; they are not verified."""
        listing = self.storage.list() if listing is None else listing
        written = self.all_commits(listing)
        lease = read_lease(self.storage, listing)
        if lease is None or lease.holder is None:
            return written
        return {step: commit for step, commit in written.items() if _counts(commit, lease)}

    def epochs(self) -> dict[str, int]:
        """{attempt directory: epoch} of the commits that count, for a new holder of the lease."""
        return {commit.directory: commit.epoch for commit in self.commits().values()}

    def all_commits(self, listing: Listing) -> dict[int, Commit]:
        """{step: commit} of every commit, even if its writer had already been replaced."""
        found = [int(match[1]) for name in listing if (match := _COMMIT.fullmatch(name))]
        commits = [self._read_commit(step) for step in sorted(found)]
        return {commit.step: commit for commit in commits if commit is not None}

    def check(self, commit: Commit) -> dict[str, Any]:
        """The manifest of a commit, after checking everything against it but the array contents.

        Raises:
          DamagedError: "digest mismatch" and what differs.
          DataError: an earlier or later version of this code saved it in another format.
        """
        manifest = self.manifest(commit)
        self.check_version(commit.step, manifest['version'])
        for what in self.differences(commit, manifest):
            raise self.damaged_error(commit.step, what)
        return manifest

    def manifest(self, commit: Commit) -> dict[str, Any]:
        """The manifest of a commit. Raises DamagedError unless it matches the commit's digest."""
        if not commit.attempt:
            raise self.damaged_error(commit.step, 'commit.json')
        name = f'{commit.directory}/manifest.json'
        try:
            content = self.storage.read(name)
        except FileNotFoundError:
            raise self.damaged_error(commit.step, f'{name} is missing') from None
        if hashlib.sha256(content).hexdigest() != commit.digest:
            raise self.damaged_error(commit.step, name)
        return json.loads(content)

    def check_version(self, step: int, version: int) -> None:
        """Raises DataError unless this code can read a step of this version."""
        if version == VERSION:
            return
        later = 'a later version of jaxfm saved it, so update jaxfm'
        earlier = (
            'an earlier version of jaxfm saved it; with that version, go on or export the weights '
            '(--mode export), from which --config.init_from starts a new run'
        )
        raise DataError(
            f'checkpoint {step} in {self.storage.root} has format {version}, not {VERSION}: '
            + (later if version > VERSION else earlier)
        )

    def differences(self, commit: Commit, manifest: dict[str, Any]) -> Iterator[str]:
        """Yields a description of each file of a step that differs from the manifest."""
        listing = self.storage.list(commit.directory)
        for name, expected in manifest['files'].items():
            stored = listing.get(f'{commit.directory}/{name}')
            try:
                if stored is None:
                    yield f'{name} is missing'
                elif stored.size != expected['size']:
                    yield f'{name} has {stored.size} bytes, not {expected["size"]}'
                elif self._describe(f'{commit.directory}/{name}', stored) != expected:
                    yield name
            except FileNotFoundError:  # its run has just deleted it
                yield f'{name} is missing'

    def damaged_error(self, step: int, what: str) -> DamagedError:
        """The error for a part of a step (`what`) that differs from what was saved."""
        return DamagedError(f'checkpoint {step} in {self.storage.root}: digest mismatch: {what}')

    def missing_error(self, step: int, steps: Iterable[int]) -> MissingInputError:
        """The error for a step that does not exist."""
        there = ', '.join(map(str, steps)) or 'none'
        return MissingInputError(
            f'no checkpoint {step} in {self.storage.root}; available steps: {there}'
        )

    def write_manifest(self, step: int, attempt: str, manifest: dict[str, Any]) -> str:
        """Adds the attempt's files to the manifest and writes it -> the manifest's SHA-256."""
        directory = f'{step}/{attempt}/'
        files = {
            name.removeprefix(directory): self._describe(name, stored)
            for name, stored in self.storage.list(directory.rstrip('/')).items()
        }
        head = {'version': VERSION, 'step': step, 'attempt': attempt}
        content = json.dumps(head | manifest | {'files': files}, indent=1).encode()
        self.storage.write(f'{directory}manifest.json', content)
        return hashlib.sha256(content).hexdigest()

    def commit(self, commit: Commit) -> None:
        """Writes the commit; from then on the step counts. Replaces a commit that does not count.

        Raises:
          LockedError: a run that took over has already committed this step, with a later epoch.
        """
        name = f'{commit.step}/commit.json'
        content = seal(dataclasses.asdict(commit))
        try:
            self.storage.write(name, content, exclusive=True)
        except FileExistsError:
            standing = self._read_commit(commit.step)
            if standing is not None and standing.epoch > commit.epoch:
                raise LockedError(
                    f'step {commit.step} in {self.storage.root} was committed by a run that took '
                    'over from this one, which may no longer write there'
                ) from None
            self.storage.remove(name)
            self.storage.write(name, content, exclusive=True)

    def remove(self, commit: Commit, listing: Listing) -> None:
        """Deletes a step, its commit first, so that no reader sees a partly deleted step.

        Attempts of this step that were set aside stay.
        """
        self.storage.remove(f'{commit.step}/commit.json')
        aside = {name for name in find_set_aside(listing) if name.startswith(f'{commit.step}/')}
        if not aside - {commit.directory}:
            self.storage.remove(str(commit.step))
        elif commit.attempt:  # a damaged commit does not say which attempt it meant
            for name in (commit.directory, _marker(commit.directory)):
                self.storage.remove(name)

    def set_aside(self, commit: Commit, is_ruined: bool = False) -> None:
        """Makes a commit count no longer; `take_back` undoes it.

        is_ruined: no update can be applied to its weights. Of a step, only the newest such attempt
        is kept: the others are of the same kind, and every start of the run may leave one more.
        """
        earlier = self._ruined(commit.step) if is_ruined else []
        marker = dataclasses.asdict(commit) | {'is_ruined': is_ruined}
        self.storage.write(_marker(commit.directory), seal(marker))
        self.storage.remove(f'{commit.step}/commit.json')
        for directory in earlier:
            for name in (directory, _marker(directory)):
                self.storage.remove(name)

    def _ruined(self, step: int) -> list[str]:
        """The directories of the attempts of a step that were set aside as ruined."""
        ruined = []
        for directory in find_set_aside(self.storage.list(str(step))):
            with contextlib.suppress(ValueError, FileNotFoundError):  # damaged: it stays
                if unseal(self.storage.read(_marker(directory))).get('is_ruined'):
                    ruined.append(directory)
        return ruined

    def take_back(self, directory: str, epoch: int) -> None:
        """Commits an attempt that was set aside again, under the epoch of the caller's lease.

        Raises:
          DamagedError: the marker cannot be read.
        """
        marker = _marker(directory)
        try:
            fields = unseal(self.storage.read(marker)) | {'epoch': epoch}
            fields.pop('is_ruined', None)
            commit = Commit(**fields)
        except (ValueError, TypeError):
            raise self.damaged_error(int(directory.partition('/')[0]), marker) from None
        self.commit(commit)
        self.storage.remove(marker)

    def sweep(self, with_set_aside: bool = False) -> dict[str, int]:
        """Deletes the orphans and returns them. Only the holder of the lease may call it.

        with_set_aside: deletes what was set aside as well.
        """
        listing = self.storage.list()
        orphans = self.orphans(listing, self.commits(listing), with_set_aside)
        empty = [name for name in self.storage.empty_directories() if _EMPTY.match(name)]
        for name in [*orphans, *empty]:
            self.storage.remove(name)
        return orphans

    def orphans(
        self, listing: Listing, commits: dict[int, Commit], with_set_aside: bool = False
    ) -> dict[str, int]:
        """{directory or file: bytes} of saves that were never committed or no longer count.

        Only names that a save creates are considered; other files here belong to somebody else.
        """
        kept = {commit.directory for commit in commits.values()}
        if not with_set_aside:
            aside = find_set_aside(listing)
            kept |= aside | set(map(_marker, aside))
        # A damaged commit does not say which attempt it meant, so all attempts of its step stay.
        unknown = {commit.step for commit in commits.values() if not commit.attempt}
        orphans: dict[str, int] = {}
        for name, stored in listing.items():
            if not (saved := _SAVED.match(name)):
                continue
            step, attempt = int(saved[1]), saved[0]
            is_commit = saved[2] == 'commit.json' and step in commits
            if attempt not in kept and not is_commit and step not in unknown:
                orphans[attempt] = orphans.get(attempt, 0) + stored.size
        return orphans

    def _read_commit(self, step: int) -> Commit | None:
        try:
            commit = Commit(**unseal(self.storage.read(f'{step}/commit.json')))
            if commit.step != step:
                raise ValueError('of another step')
            return commit
        except FileNotFoundError:
            return None  # deleted since the listing
        except (ValueError, TypeError):
            # Damaged: keep a placeholder, so that `check` reports the step instead of hiding it.
            return Commit(step, '', -1, '')

    def _describe(self, name: str, stored: Stored) -> dict[str, Any]:
        if stored.size > SMALL_BYTES and not name.endswith(f'/{METADATA}'):
            return {'size': stored.size}
        return {
            'size': stored.size,
            'sha256': hashlib.sha256(self.storage.read(name)).hexdigest(),
        }


def _marker(directory: str) -> str:
    """The file that says that an attempt was set aside."""
    step, attempt = directory.split('/')
    return f'{step}/set_aside.{attempt}.json'


def find_set_aside(listing: Listing) -> set[str]:
    """The directories of the attempts that were set aside."""
    found = map(_SET_ASIDE.fullmatch, listing)
    return {f'{match[1]}/{match[2]}' for match in found if match}


def _counts(commit: Commit, lease: Record) -> bool:
    return not commit.attempt or lease.admits(commit.directory, commit.epoch)

"""Finds and restores the checkpoints of a run, the newest that is whole.

A restore trusts nothing: small files are compared with their digests, arrays with the fingerprints
that were taken from the live ones. With several processes every method is called by all of them,
and what one of them finds, all of them find.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding

from jaxfm.checkpoint import CheckpointConfig, arrays
from jaxfm.checkpoint.fingerprint import fingerprints
from jaxfm.checkpoint.fit import check_fit
from jaxfm.checkpoint.store import Commit, Store
from jaxfm.checkpoint.verify import explain_read, leaves_of
from jaxfm.distributed import agree
from jaxfm.errors import DamagedError, DataError, RunError
from jaxfm.storage import open_storage
from jaxfm.storage.posix import PosixStorage

log = logging.getLogger('jaxfm')

Arrays = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Found:
    """A checkpoint that might be restored. private: every process has a store of its own."""

    store: Store
    commit: Commit
    private: bool = False

    @property
    def key(self) -> tuple[str, int]:
        return self.store.storage.root, self.commit.step

    @property
    def state(self) -> str:
        return f'{self.commit.directory}/state'


class Reader:
    """The checkpoints of one run. Makes, sweeps and locks nothing: a run may write beside it.

    directory: where they are, unless the config names another place.

    Raises:
      ConfigError, MissingInputError: no such place can be.
    """

    def __init__(self, config: CheckpointConfig, directory: str | Path):
        self._config = config
        self._store = Store(open_storage(config.directory or directory))
        self._local = Store(_local_storage(config, self.root)) if config.local else None
        self._damaged: set[tuple[str, int]] = set()  # keys of what was found
        self._manifests: dict[Commit, dict[str, Any]] = {}  # verified
        self._fallbacks = 0
        self._events: list[dict[str, float]] = []

    @property
    def root(self) -> str:
        """Where the checkpoints are, as a person would write it."""
        return self._store.storage.root

    def steps(self) -> list[int]:
        """The committed steps, in order; the damaged ones among them look like the others."""
        return agree.from_primary(lambda: list(self._store.commits()))

    def latest_step(self) -> int | None:
        """The newest committed step; None when there is no checkpoint."""
        return next((found.commit.step for found in self._candidates()), None)

    def newest_whole(self, restore: Callable[[int], Any]) -> Any:
        """What `restore(step)` gives for the newest step where it finds no damage.

        None when there is no checkpoint at all: never when there are only bad ones.

        Raises:
          DataError: all checkpoints are damaged, with what is wrong with each.
        """
        problems = []
        while candidates := self._candidates():
            found = candidates[0]
            try:
                restored = restore(found.commit.step)
            except DamagedError as error:
                problems.append(str(error))
                self._damaged.add(found.key)
                self._fallbacks += 1
                self._events.append({'checkpoint/fallbacks': self._fallbacks})
                log.warning('%s', error)
                continue
            return restored
        if problems:
            raise DataError('\n  '.join(['no checkpoint is whole:', *problems]))
        return None

    def restore(self, step: int, abstract_state: dict) -> tuple[Arrays, dict[str, Any]]:
        """The state of a step on the shardings of `abstract_state`, and its extra.

        abstract_state: {name: jax.ShapeDtypeStruct} with concrete NamedShardings, of any mesh.

        Raises:
          ConfigError: naming each array that differs in name, shape or dtype.
          DamagedError: "digest mismatch" and which file or array.
          UnavailableError, PermissionDeniedError: the storage does not let itself be read.
          MissingInputError: there is no such step.
        """
        found, manifest = self._verify(step)
        check_fit(abstract_state, leaves_of(manifest), self._name(step))
        return self._read(found, manifest, abstract_state), manifest['extra']

    def restore_params(self, step: int, abstract_params: dict) -> Arrays:
        """The parameters alone, {path: array}, whichever of them that phase trained or froze."""
        found, manifest = self._verify(step)
        stored = leaves_of(manifest)
        names = {path: _name_of_param(path, stored) for path in abstract_params}
        wanted = {names[path]: leaf for path, leaf in abstract_params.items()}
        check_fit(wanted, stored, self._name(step), partial=True)
        restored = self._read(found, manifest, wanted)
        return {path: restored[name] for path, name in names.items()}

    def read_manifest(self, step: int) -> dict[str, Any]:
        """What was written down about a step: position, clocks, config. Its files are verified."""
        return self._verify(step)[1]

    def events(self) -> list[dict[str, float]]:
        """What has happened since the last call, for the records."""
        events, self._events = self._events, []
        return events

    def _candidates(self) -> list[Found]:
        """What is committed and not known to be damaged, the newest step first."""
        commits = agree.from_primary(
            lambda: [dataclasses.astuple(commit) for commit in self._store.commits().values()]
        )
        durable = [Found(self._store, Commit(*fields)) for fields in commits]
        # A local step of a time before the newest durable one: this host was away since.
        newest_epoch = max((found.commit.epoch for found in durable), default=0)
        found = durable + [one for one in self._on_all() if one.commit.epoch >= newest_epoch]
        whole = [one for one in found if one.key not in self._damaged]
        return sorted(whole, key=lambda one: (one.commit.step, one.private), reverse=True)

    def _on_all(self) -> list[Found]:
        """The steps of the local tier that every process has."""
        if self._local is None:
            return []
        here = {commit.directory: commit for commit in self._local.commits().values()}
        common = agree.common(list(here))
        return [Found(self._local, here[name], private=True) for name in common]

    def _verify(self, step: int) -> tuple[Found, dict[str, Any]]:
        """Where a step is, and its manifest, once all its files agree with it."""
        found = next((one for one in self._candidates() if one.commit.step == step), None)
        if found is None:
            raise self._store.missing_error(step, self.steps())
        if found.commit not in self._manifests:
            self._manifests[found.commit] = self._check(found)
        return found, self._manifests[found.commit]

    def _check(self, found: Found) -> dict[str, Any]:
        if not found.private:
            return agree.from_primary(lambda: found.store.check(found.commit))
        manifest, error = None, None
        try:
            manifest = found.store.check(found.commit)
        except RunError as raised:
            error = raised
        agree.first_error(error)
        return manifest

    def _read(self, found: Found, manifest: dict, wanted: dict) -> Arrays:
        """The arrays, compared with their fingerprints."""
        if found.private and manifest['mesh'] != mesh_of(wanted):
            raise DamagedError(
                f'checkpoint {found.commit.step} in {found.store.storage.root} has the parts of '
                f'another mesh: {manifest["mesh"]}'
            )
        restored, error = {}, None
        deadline = arrays.Deadline.after(self._config.timeout_seconds)
        try:
            restored = arrays.read(found.store.storage.kvstore(found.state), wanted, deadline)
        except Exception as raised:
            error = explain_read(raised, found.store, found.commit.step)
            if not isinstance(error, RunError):
                raise
        agree.first_error(error)
        prints = fingerprints(restored)
        differ = [
            name for name in wanted if prints[name] != manifest['arrays'][name]['fingerprint']
        ]
        if differ:
            more = f' and {len(differ) - 1} more' if len(differ) > 1 else ''
            error = found.store.damaged_error(found.commit.step, f'array {differ[0]}{more}')
        agree.first_error(error)
        return restored

    def _name(self, step: int) -> str:
        return f'checkpoint {step} in {self.root}'


def mesh_of(leaves: dict) -> dict[str, int]:
    """The axes of the mesh, for people and for the local tier; {} for single devices."""
    shardings = [leaf.sharding for leaf in leaves.values()]
    meshes = [one.mesh for one in shardings if isinstance(one, NamedSharding)]
    return dict(meshes[0].shape) if meshes else {}


def _local_storage(config: CheckpointConfig, root: str) -> PosixStorage:
    """A directory of this process, in that of the run whose durable checkpoints are at `root`."""
    run = hashlib.sha256(root.encode()).hexdigest()[:12]
    process = f'{jax.process_index()}-of-{jax.process_count()}'
    return PosixStorage(Path(config.local.directory) / run / process)


def _name_of_param(path: str, stored: dict) -> str:
    names = [f'{kind}/{path}' for kind in ('trainable', 'frozen', 'buffers')]
    return next((name for name in names if name in stored), names[0])

"""Finds and restores a run's checkpoints, preferring the newest undamaged one.

A restore verifies everything: small files against their digests, arrays against the fingerprints
taken from the live arrays at the save. With several processes, all of them call every method, and
all of them get the same result or the same error.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding

from jaxfm.checkpoint import CheckpointConfig, arrays, orbax_tree
from jaxfm.checkpoint.base import Arrays, LoadBase, arrays_of, restore_base
from jaxfm.checkpoint.fingerprint import fingerprints
from jaxfm.checkpoint.fit import check_fit
from jaxfm.checkpoint.store import METADATA, Commit, Store
from jaxfm.checkpoint.verify import explain_read, leaves_of
from jaxfm.distributed import agree
from jaxfm.errors import DamagedError, DataError, RunError
from jaxfm.storage import open_storage
from jaxfm.storage.posix import PosixStorage

log = logging.getLogger('jaxfm')


@dataclasses.dataclass(frozen=True)
class Found:
    """A checkpoint that might be restored. private: every process has its own store."""

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
    """Read-only access to the checkpoints of one run.

    It creates, deletes and locks nothing, so the run itself may write at the same time.

    directory: where the checkpoints are, unless the config names another place.

    Raises:
      ConfigError: the address of the place is invalid.
      MissingInputError: it is on S3, and the package for that is not installed.
    """

    def __init__(self, config: CheckpointConfig, directory: str | Path):
        self._config = config
        self._store = Store(open_storage(config.directory or directory))
        self._local = Store(_local_storage(config, self.root)) if config.local else None
        self._damaged: set[tuple[str, int]] = set()  # `Found.key` of each
        self._manifests: dict[Commit, dict[str, Any]] = {}  # verified
        self._fallbacks = 0
        self._events: list[dict[str, float]] = []

    @property
    def root(self) -> str:
        """Where the checkpoints are: an absolute path or an s3:// URL."""
        return self._store.storage.root

    def steps(self) -> list[int]:
        """The committed steps, in order. They have not been verified: some may be damaged."""
        return agree.from_primary(lambda: list(self._store.commits()))

    def restorable_steps(self) -> list[int]:
        """The steps of all tiers that are not known to be damaged, in order."""
        return sorted({found.commit.step for found in self._candidates()})

    def latest_step(self) -> int | None:
        """The newest committed step; None when there is no checkpoint."""
        return next((found.commit.step for found in self._candidates()), None)

    def newest_whole(self, restore: Callable[[int], Any], at: int | None = None) -> Any:
        """The result of `restore(step)` for the newest step that is not damaged.

        None if there is no checkpoint at all, but never because all of them are damaged.

        at: considers only the checkpoints of this step.

        Raises:
          DataError: all of them are damaged; the message says what is wrong with each.
          MissingInputError: there is no checkpoint of step `at`.
        """
        problems = []
        if at is not None:
            there = self.restorable_steps()
            if at not in there:
                raise self._store.missing_error(at, there)
        while candidates := [
            found for found in self._candidates() if at is None or found.commit.step == at
        ]:
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
            which = 'every checkpoint' if at is None else f'checkpoint {at}'
            raise DataError('\n  '.join([f'{which} is damaged:', *problems]))
        return None

    def restore(
        self, step: int, abstract_state: dict, load_base: LoadBase | None = None
    ) -> tuple[Arrays, dict[str, Any]]:
        """Restores a step -> (its arrays, sharded like `abstract_state`; its extra).

        abstract_state: {name: jax.ShapeDtypeStruct} with concrete NamedShardings, of any mesh.
        load_base: loads the weights of the model that the run started from; it is called if the
        step has only adapters of that model (`base`).

        Raises:
          ConfigError: arrays differ in name, shape or dtype; the message names them.
          DamagedError: a file or array differs from what was saved; "digest mismatch" and its name.
          UnavailableError, PermissionDeniedError: the storage cannot be read.
          MissingInputError: there is no such step, or no such model.
          DataError: that model has other weights now.
        """
        found, manifest = self._verify(step)
        check_fit(abstract_state, _leaves(manifest), self._name(step))
        restored = self._complete(found, manifest, abstract_state, load_base)
        return restored, manifest['extra']

    def restore_params(
        self, step: int, abstract_params: dict, load_base: LoadBase | None = None
    ) -> Arrays:
        """Restores only the parameters, {path: array}, whether that phase trained them or not.

        Raises as `restore` does.
        """
        found, manifest = self._verify(step)
        stored = _leaves(manifest)
        names = {path: _name_of_param(path, stored) for path in abstract_params}
        wanted = {names[path]: leaf for path, leaf in abstract_params.items()}
        check_fit(wanted, stored, self._name(step), partial=True)
        restored = self._complete(found, manifest, wanted, load_base)
        return {path: restored[name] for path, name in names.items()}

    def read_manifest(self, step: int) -> dict[str, Any]:
        """The verified manifest of a step: arrays, files, data position, clocks, config."""
        return self._verify(step)[1]

    def events(self) -> list[dict[str, float]]:
        """Returns and clears the events since the last call, as values for `event` records."""
        events, self._events = self._events, []
        return events

    def _candidates(self) -> list[Found]:
        """The committed checkpoints not known to be damaged, newest step first."""
        commits = agree.from_primary(
            lambda: [dataclasses.astuple(commit) for commit in self._store.commits().values()]
        )
        durable = [Found(self._store, Commit(*fields)) for fields in commits]
        # A local step with an older epoch is stale: this host was away while another run went on.
        newest_epoch = max((found.commit.epoch for found in durable), default=0)
        found = durable + [one for one in self._on_all() if one.commit.epoch >= newest_epoch]
        whole = [one for one in found if one.key not in self._damaged]
        return sorted(whole, key=lambda one: (one.commit.step, one.private), reverse=True)

    def _on_all(self) -> list[Found]:
        """The local-tier checkpoints that every process has."""
        if self._local is None:
            return []
        here = {commit.directory: commit for commit in self._local.commits().values()}
        common = agree.common(list(here))
        return [Found(self._local, here[name], private=True) for name in common]

    def _verify(self, step: int) -> tuple[Found, dict[str, Any]]:
        """Finds a step and checks its files -> (where it is, its manifest)."""
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

    def _complete(self, found: Found, manifest: dict, wanted: dict, load_base) -> Arrays:
        """Reads the arrays that the step has, and those that it left out from their origin."""
        held = {name: leaf for name, leaf in wanted.items() if name in manifest['arrays']}
        restored = self._read(found, manifest, held)
        base = restore_base(manifest, list(wanted), load_base, self._name(found.commit.step))
        return {name: (restored | base)[name] for name in wanted}

    def _read(self, found: Found, manifest: dict, wanted: dict) -> Arrays:
        """Reads the arrays and compares them with their fingerprints."""
        if found.private and manifest['mesh'] != mesh_of(wanted):
            raise DamagedError(
                f'checkpoint {found.commit.step} in {found.store.storage.root} holds the shards of '
                f'another mesh: {manifest["mesh"]}, not {mesh_of(wanted)}'
            )
        if not wanted:
            return {}
        restored, error = {}, None
        deadline = arrays.Deadline.after(self._config.timeout_seconds)
        storage, name = found.store.storage, f'{found.state}/{METADATA}'
        try:
            metadata = storage.read(name)
            base = storage.kvstore(found.state)
            restored = orbax_tree.restore(base, metadata, wanted, deadline)
        except FileNotFoundError:  # deleted since it was checked
            error = found.store.damaged_error(found.commit.step, f'{name} is missing')
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
    """{axis: size} of the leaves' mesh, for the manifest and the local tier; {} without a mesh."""
    shardings = [leaf.sharding for leaf in leaves.values()]
    meshes = [one.mesh for one in shardings if isinstance(one, NamedSharding)]
    return dict(meshes[0].shape) if meshes else {}


def _local_storage(config: CheckpointConfig, root: str) -> PosixStorage:
    """The directory of this process for the run whose durable checkpoints are at `root`."""
    run = hashlib.sha256(root.encode()).hexdigest()[:12]
    process = f'{jax.process_index()}-of-{jax.process_count()}'
    return PosixStorage(Path(config.local.directory) / run / process)


def _leaves(manifest: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """{name: shape and dtype} of all arrays of a step, also of those that it left out."""
    return leaves_of(manifest['arrays'] | arrays_of(manifest))


def _name_of_param(path: str, stored: dict) -> str:
    names = [f'{kind}/{path}' for kind in ('trainable', 'frozen', 'buffers')]
    return next((name for name in names if name in stored), names[0])

"""Saves a run without stopping it, and restores the newest checkpoint that is whole.

A save copies the state to the host and returns; a thread writes (`saver`). A restore trusts
nothing: small files are compared with their digests, arrays with the fingerprints that were taken
from the live ones. With several processes every method is called by all of them, and what one of
them finds out, such as that a save has failed, the primary process decides for all.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxfm import distributed
from jaxfm.checkpoint import CheckpointConfig, arrays
from jaxfm.checkpoint.fingerprint import fingerprints
from jaxfm.checkpoint.fit import check_fit
from jaxfm.checkpoint.lease import Lease
from jaxfm.checkpoint.saver import Job, Save, explain
from jaxfm.checkpoint.storage import PosixStorage, open_storage
from jaxfm.checkpoint.store import Commit, Store, new_attempt
from jaxfm.errors import (
    DamagedError,
    DataError,
    PermissionDeniedError,
    RunError,
    StorageError,
    UnavailableError,
)

log = logging.getLogger('jaxfm')

Arrays = dict[str, jax.Array]

# Training waits so long for the save before this one, then goes on without this one.
PATIENCE_SECONDS = 10
# The values of integers no larger than this are in the manifest: steps, counters, the key.
_SMALL = 8
# How TensorStore says that a server, and not the data, is the matter. It notes the status of an
# answer, except where that means that an object or a part of it is not there.
_OUT_OF_REACH = re.compile(
    '^(UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|CANCELLED):|CURL error|http_response_code'
)
_FORBIDDEN = re.compile(
    '^(PERMISSION_DENIED|UNAUTHENTICATED):|ExpiredToken|InvalidToken|TokenRefreshRequired'
)
_serial = itertools.count()  # of what the processes agree on: a name is used once


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


class Checkpointer:
    """The checkpoints of one run, and the right to write them.

    directory: where they are, unless the config names another place.
    read_only: makes, sweeps and locks nothing: a training run may go on beside this reader.
    milestones: steps whose checkpoints stay whatever comes after them, such as ends of phases.
    about: JSON that every manifest repeats, such as the config of the run.

    Raises:
      LockedError: another run writes there.
      PermissionDeniedError, UnavailableError, ConfigError: the place cannot be used.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        directory: str | Path,
        read_only: bool = False,
        milestones: Iterable[int] = (),
        about: dict[str, Any] | None = None,
    ):
        self._config, self._about = config, about or {}
        self._milestones = frozenset(milestones)
        self._store = Store(open_storage(config.directory or directory))
        self._local = Store(_local_storage(config, self.root)) if config.local else None
        self._lease = Lease(self._store.storage, config.lease_seconds)
        self._damaged: set[tuple[str, int]] = set()  # keys of what was found
        # What follows is known to the primary process alone, which decides for all.
        self._save: Save | None = None
        self._steps: set[int] = set()
        self._failures = 0  # saves that were lost in a row
        self._totals = dict.fromkeys(('lost', 'fallbacks'), 0)
        self._blocking = 0.0  # seconds that training stood for the save under way
        self._events: list[dict[str, float]] = []
        if not read_only:
            self._steps = set(_agree(self._open))
            self._open_local()

    @property
    def root(self) -> str:
        """Where the checkpoints are, as a person would write it."""
        return self._store.storage.root

    def steps(self) -> list[int]:
        """The committed steps, in order; the damaged ones among them look like the others."""
        return _agree(lambda: list(self._store.commits()))

    def latest_step(self) -> int | None:
        """The newest committed step; None when there is no checkpoint."""
        return next((found.commit.step for found in self._candidates()), None)

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint of this step, on some tier, is wanted on the way."""
        return step > 0 and (self._is_durable(step) or self._is_local(step))

    def check_room(self, nbytes: int) -> None:
        """Raises StorageError unless two checkpoints of `nbytes` fit, or one beside those here.

        Two, because the last good one stays while the next is written; and the milestones to come.
        """
        to_come = sum(step > max(self._steps, default=0) for step in self._milestones)
        _check_room(self._store, nbytes, to_come + (1 if self._steps else 2))
        if self._local:
            _check_room(self._local, nbytes // jax.process_count(), self._config.local.keep + 1)

    def save(self, step: int, state: Arrays, extra: dict[str, Any], must: bool = False) -> None:
        """Starts a save and returns once the state is copied: the caller may donate it right away.

        A save that fails is told, counted and forgotten: the next one is another chance. A step
        that is already there is left alone. While the save before is stuck, this one is dropped.

        state: {name: global array}. extra: JSON. must: returns once it is committed, after more
        tries where they help.

        Raises:
          StorageError: `max_failures` saves in a row were lost.
          LockedError: another run has taken the place over.
        """
        extra = json.loads(json.dumps(extra))  # the source goes on moving while this is written
        while True:
            started = time.monotonic()
            attempt, epoch = _agree(lambda: self._decide(step, must))
            if attempt == 'skip' or (attempt == 'drop' and not must):
                return
            self._start(step, attempt, epoch, state, extra, must)
            self._blocking = time.monotonic() - started
            if not must or self._settled():
                return

    def wait(self) -> None:
        """Blocks until the save under way has ended, well or not."""
        self._settled()

    def close(self) -> None:
        """Lets the save under way end, within PATIENCE_SECONDS, and gives the lease back."""
        if self._save is not None and self._save.wait(PATIENCE_SECONDS):
            self._settle()
        self._lease.release(is_empty=not self._steps | {bad for _, bad in self._damaged})

    def events(self) -> list[dict[str, float]]:
        """What has happened since the last call, for the records."""
        events, self._events = self._events, []
        return events

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
                self._totals['fallbacks'] += 1
                self._events.append({'checkpoint/fallbacks': self._totals['fallbacks']})
                log.warning('%s', error)
                continue
            self._steps -= {step for step in self._steps if (self.root, step) in self._damaged}
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
        found, manifest = self._verified(step)
        check_fit(abstract_state, _stored(manifest), self._name(step))
        return self._read(found, manifest, abstract_state), manifest['extra']

    def restore_params(self, step: int, abstract_params: dict) -> Arrays:
        """The parameters alone, {path: array}, whichever of them that phase trained or froze."""
        found, manifest = self._verified(step)
        stored = _stored(manifest)
        names = {path: _name_of_param(path, stored) for path in abstract_params}
        wanted = {names[path]: leaf for path, leaf in abstract_params.items()}
        check_fit(wanted, stored, self._name(step), partial=True)
        restored = self._read(found, manifest, wanted)
        return {path: restored[name] for path, name in names.items()}

    def read_manifest(self, step: int) -> dict[str, Any]:
        """What was written down about a step: position, clocks, config. Its files are verified."""
        return self._verified(step)[1]

    # Saving.

    def _open(self) -> list[int]:
        """Takes the lease and deletes what nobody will use; the steps that are there."""
        self._store.storage.prepare()
        self._lease.acquire(
            lambda: [commit.directory for commit in self._store.commits().values()]
        )
        try:
            self._store.sweep()
            return list(self._store.commits())
        except BaseException:
            self._lease.release()
            raise

    def _open_local(self) -> None:
        error = None
        try:
            if self._local:
                self._local.storage.prepare()
                self._local.sweep()
        except RunError as raised:
            error = raised
        try:
            distributed.first_error(_name_of_decision(), error)
        except RunError:
            self._lease.release()
            raise

    def _decide(self, step: int, must: bool) -> tuple[str, int]:
        """'skip', 'drop' or the name of the save to start, and the epoch of the lease."""
        self._lease.check()
        if self._save is not None and not self._save.wait(None if must else PATIENCE_SECONDS):
            self._lose(step, f'checkpoint {self._save.step} is still being written')
            self._check_failures()
            return 'drop', 0
        self._settle()
        self._check_failures()
        return 'skip' if step in self._steps else new_attempt(), self._lease.epoch

    def _check_failures(self) -> None:
        if self._failures >= self._config.max_failures:
            raise StorageError(
                f'{self._failures} checkpoints in a row could not be stored in {self.root}; '
                f'the newest one there is {max(self._steps, default="none")}'
            )

    def _start(
        self, step: int, attempt: str, epoch: int, state: Arrays, extra: dict, must: bool
    ) -> None:
        if self._save is not None:  # not on the primary process, which has settled it
            self._save.wait()
        private = not (must or self._is_durable(step) or self._local is None)
        # The one transfer from the device that the training loop means to make.
        with jax.transfer_guard('allow'):
            prints = fingerprints(state)
            parts = arrays.snapshot(state, every_local=private)
        manifest = {
            'epoch': epoch,
            'arrays': {name: _described(state[name], parts[name], prints[name]) for name in state},
            'mesh': _mesh_of(state),
            'processes': jax.process_count(),
            'extra': extra,
        }
        self._save = Save(
            Job(
                store=self._local if private else self._store,
                step=step,
                attempt=attempt,
                parts=parts,
                manifest=manifest | self._about,
                keep=self._config.local.keep if private else self._config.keep,
                milestones=self._milestones,
                damaged=frozenset(bad for root, bad in self._damaged if root == self.root),
                private=private,
                deadline=arrays.Deadline.after(self._config.timeout_seconds),
                lease=self._lease if distributed.is_primary() else None,
            )
        )

    def _settled(self) -> bool:
        """Waits for the save under way; whether it is committed: the same on all processes."""
        if self._save is not None:
            self._save.wait()
        committed = _agree(self._settle)
        self._save = None
        return committed

    def _settle(self) -> bool:
        """Takes note of how the save ended, if there was one."""
        save, self._save = self._save, None
        if save is None:
            return True
        if save.error is not None:
            self._lose(save.step, save.error)
            return False
        self._failures = 0
        if not save.private:
            self._steps.add(save.step)
            self._damaged.discard((self.root, save.step))
        self._events.append(
            {
                'checkpoint/step': save.step,
                'checkpoint/save_seconds': save.seconds,
                'checkpoint/blocking_seconds': self._blocking,
                'checkpoint/bytes': save.nbytes,
                'storage/retries': self._store.storage.retries(),
            }
        )
        return True

    def _lose(self, step: int, reason: str) -> None:
        self._failures += 1
        self._totals['lost'] += 1
        self._events.append({'checkpoint/lost': self._totals['lost']})
        log.warning(
            'checkpoint %d was not saved (%d of %d in a row): %s',
            step,
            self._failures,
            self._config.max_failures,
            reason,
        )

    def _is_durable(self, step: int) -> bool:
        return bool(self._config.every) and step % self._config.every == 0

    def _is_local(self, step: int) -> bool:
        return self._local is not None and step % self._config.local.every == 0

    # Restoring.

    def _candidates(self) -> list[Found]:
        """What is committed and not known to be damaged, the newest step first."""
        commits = _agree(lambda: [dataclasses.astuple(c) for c in self._store.commits().values()])
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
        common = distributed.common(_name_of_decision(), list(here))
        return [Found(self._local, here[name], private=True) for name in common]

    def _verified(self, step: int) -> tuple[Found, dict[str, Any]]:
        """Where a step is, and its manifest, once all its files agree with it."""
        found = next((one for one in self._candidates() if one.commit.step == step), None)
        if found is None:
            raise self._store.missing(step, self.steps())
        if not found.private:
            return found, _agree(lambda: found.store.check(found.commit))
        manifest, error = None, None
        try:
            manifest = found.store.check(found.commit)
        except RunError as raised:
            error = raised
        distributed.first_error(_name_of_decision(), error)
        return found, manifest

    def _read(self, found: Found, manifest: dict, wanted: dict) -> Arrays:
        """The arrays, compared with their fingerprints."""
        if found.private and manifest['mesh'] != _mesh_of(wanted):
            raise DamagedError(
                f'checkpoint {found.commit.step} in {found.store.storage.root} has the parts of '
                f'another mesh: {manifest["mesh"]}'
            )
        restored, error = {}, None
        deadline = arrays.Deadline.after(self._config.timeout_seconds)
        try:
            restored = arrays.read(found.store.storage.kvstore(found.state), wanted, deadline)
        except Exception as raised:
            error = _explained(raised, found)
        distributed.first_error(_name_of_decision(), error)
        prints = fingerprints(restored)
        differ = [
            name for name in wanted if prints[name] != manifest['arrays'][name]['fingerprint']
        ]
        if differ:
            more = f' and {len(differ) - 1} more' if len(differ) > 1 else ''
            error = found.store.damaged(found.commit.step, f'array {differ[0]}{more}')
        distributed.first_error(_name_of_decision(), error)
        return restored

    def _name(self, step: int) -> str:
        return f'checkpoint {step} in {self.root}'


def _agree(compute: Callable[[], Any]) -> Any:
    return distributed.from_primary(_name_of_decision(), compute)


def _name_of_decision() -> str:
    return f'checkpoint/{next(_serial)}'


def _described(array: jax.Array, part: arrays.Snapshot, fingerprint: int) -> dict[str, Any]:
    described = {
        'shape': list(array.shape),
        'dtype': array.dtype.name,
        'fingerprint': fingerprint,
    }
    whole = len(part.pieces) == 1 and part.pieces[0][1].shape == array.shape
    if whole and array.size <= _SMALL and np.issubdtype(array.dtype, np.integer):
        described['value'] = part.pieces[0][1].tolist()
    return described


def _stored(manifest: dict) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(tuple(entry['shape']), jax.numpy.dtype(entry['dtype']))
        for name, entry in manifest['arrays'].items()
    }


def _mesh_of(leaves: dict) -> dict[str, int]:
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


def _explained(error: Exception, found: Found) -> RunError:
    """Whether what could not be read is damaged, or only out of reach."""
    step, root = found.commit.step, found.store.storage.root
    text = explain(error, found.store)
    if _FORBIDDEN.search(str(error)):
        return PermissionDeniedError(f'checkpoint {step} in {root} may not be read: {text}')
    if isinstance(error, TimeoutError) or _OUT_OF_REACH.search(str(error)):
        return UnavailableError(f'checkpoint {step} in {root} cannot be reached: {text}')
    return found.store.damaged(step, f'it cannot be read: {text}')


def _check_room(store: Store, nbytes: int, count: int) -> None:
    have, need = store.storage.free_bytes(), nbytes * count
    if have is not None and have < need:
        raise StorageError(
            f'no room for checkpoints in {store.storage.root}: '
            f'need {_gib(need)} ({count} of {_gib(nbytes)}), have {_gib(have)}'
        )


def _gib(nbytes: int) -> str:
    return f'{nbytes / 2**30:.3g} GiB'

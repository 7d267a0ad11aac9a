"""Saves a run without stopping it: `save` copies the state to the host, a `saver` thread writes it.

With several processes, all of them call every method. The primary process decides for all of them,
for example whether a save has failed.
"""

import dataclasses
import functools
import json
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxfm.checkpoint import CheckpointConfig, arrays
from jaxfm.checkpoint.base import Base
from jaxfm.checkpoint.fingerprint import Fingerprint
from jaxfm.checkpoint.reader import Arrays, Reader, mesh_of
from jaxfm.checkpoint.saver import Job, Save
from jaxfm.checkpoint.store import Store, new_attempt
from jaxfm.distributed import agree
from jaxfm.errors import RunError, StorageError, human_bytes
from jaxfm.storage.lease import Lease

log = logging.getLogger('jaxfm')

# How long training waits for the previous save to finish; after that it skips the new one.
PATIENCE_SECONDS = 10
# The manifest holds the values of integer arrays up to this many elements: step, counters, key.
_SMALL = 8


@dataclasses.dataclass
class Tier:
    """A place for saves, their cadence, and the state of its saves on the primary process.

    private: every process has its own store.
    """

    store: Store
    every: int
    keep: int
    private: bool
    under_way: Save | None = None
    failures: int = 0  # in a row
    blocking: float = 0.0  # seconds that the save under way has blocked training
    nbytes: int = 0  # size of the save under way, over all processes

    @property
    def name(self) -> str:
        """The prefix of its names in records."""
        return 'checkpoint/local' if self.private else 'checkpoint'

    def is_due(self, step: int) -> bool:
        return bool(self.every) and step % self.every == 0


class Checkpointer(Reader):
    """Reads and writes the checkpoints of one run; holds the lease on them until `close`.

    directory: where the checkpoints are, unless the config names another place.
    milestones: steps whose checkpoints are never deleted, such as the ends of phases.
    about: JSON that is added to every manifest, such as the config of the run.
    base: arrays of the state that are not saved, because they can be read from elsewhere again.

    Raises:
      LockedError: another run holds the lease.
      PermissionDeniedError, UnavailableError, ConfigError: the place cannot be used.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        directory: str | Path,
        milestones: Iterable[int] = (),
        about: dict[str, Any] | None = None,
        base: Base | None = None,
    ):
        super().__init__(config, directory)
        self._about = about or {}
        self._base = base or Base(frozenset())
        self._base_prints: dict[str, Fingerprint] = {}  # these arrays never change
        self._milestones = frozenset(milestones)
        self._lease = Lease(self._store.storage, config.lease_seconds)
        self._durable = Tier(self._store, config.every, config.keep, private=False)
        self._tiers = [self._durable]
        if config.local:
            local = Tier(self._local, config.local.every, config.local.keep, private=True)
            self._tiers.append(local)
        self._lost = 0
        self._steps = set(agree.from_primary(self._open))  # committed steps of the durable tier
        self._open_local()

    def is_due(self, step: int) -> bool:
        """Whether any tier is to save a checkpoint at this step."""
        return step > 0 and any(tier.is_due(step) for tier in self._tiers)

    def check_room(self, nbytes: int, at: int | None = None) -> None:
        """Raises StorageError unless there is space for every checkpoint that will exist at once.

        That is one more than `keep`, because a new checkpoint is written before the oldest is
        deleted, plus the milestones still to come.

        nbytes: size of one checkpoint, over all processes. at: the step that the run will go back
        to; later checkpoints will be set aside, so they keep their space but are not replaced.
        """

        def left(steps) -> list[int]:
            return [step for step in steps if at is None or step <= at]

        steps = left(self._steps)
        to_come = sum(step > max(steps, default=0) for step in self._milestones)
        error = None
        try:
            missing = max(self._config.keep + 1 - len(steps), 1)
            agree.from_primary(lambda: _check_room(self._store, nbytes, missing + to_come))
            if self._local:
                missing = self._config.local.keep + 1 - len(left(self._local.commits()))
                _check_room(self._local, nbytes // jax.process_count(), max(missing, 1))
        except StorageError as raised:
            error = raised
        agree.first_error(error)

    def save(
        self,
        step: int,
        state: Arrays,
        extra: dict[str, Any],
        must: bool = False,
        due: int | None = None,
        last_good: int = 0,
    ) -> None:
        """Starts a save and returns as soon as the state is copied; the caller may then donate it.

        A failed save is logged and counted, and training goes on to the next one. A step that is
        already saved is skipped. If the previous save is stuck, this one is dropped.

        state: {name: global array}. extra: JSON. must: save on the durable tier, retry after
        failures, and return only when the step is committed. due: the step since which this save
        has been due, if it had to wait. last_good: the newest checkpoint before this step is not
        deleted, because it is not known whether the weights of later ones are good.

        Raises:
          StorageError: `max_failures` consecutive saves on the durable tier have failed.
          LockedError: another run has taken over the lease.
        """
        extra = json.loads(json.dumps(extra))  # a copy: the data source moves on during the write
        since = range(due or step, step + 1)
        tier = next((t for t in self._tiers if any(map(t.is_due, since))), self._durable)
        tier = self._durable if must else tier
        while True:
            started = time.monotonic()
            attempt, epoch = agree.from_primary(lambda: self._decide(tier, step, must))
            if attempt in ('skip', 'drop'):
                return
            self._start(tier, step, attempt, epoch, state, extra, last_good)
            tier.blocking = time.monotonic() - started
            if not must or self._await_save(tier):
                return

    def wait(self) -> None:
        """Blocks until the saves under way have ended, successfully or not."""
        for tier in self._tiers:
            self._await_save(tier)

    def set_aside(self, first: int, are_ruined: bool = False) -> list[int]:
        """Makes the checkpoints from step `first` on count no longer -> their steps.

        Nothing of them is deleted. With a local tier, every process does this for its own.

        are_ruined: no update can be applied to their weights; then each replaces an earlier one of
        the same step that was ruined as well.

        Raises:
          LockedError: another run has taken over the lease.
          UnavailableError, PermissionDeniedError: the storage cannot be changed.
        """
        self.wait()
        steps, damaged, error = [], [], None
        try:
            if agree.is_primary():
                self._lease.confirm()
                steps, damaged = _set_aside(self._store, first, are_ruined)
            if self._local:
                steps += _set_aside(self._local, first, are_ruined)[0]
        except (RunError, OSError) as raised:
            error = raised if isinstance(raised, RunError) else StorageError(str(raised))
        agree.first_error(error)
        steps, damaged = agree.from_primary(lambda: (sorted(set(steps)), damaged))
        self._steps -= {*steps, *damaged}
        self._damaged |= {(self.root, step) for step in damaged}  # the next save deletes them
        self._events += [{'checkpoint/set_aside': step} for step in steps]
        return steps

    def close(self) -> None:
        """Waits up to PATIENCE_SECONDS per tier for saves under way, then releases the lease."""
        stuck = False
        for tier in self._tiers:
            if tier.under_way is not None and not tier.under_way.wait(PATIENCE_SECONDS):
                tier.under_way.abandon()
                stuck = True
            else:
                self._settle(tier)
        self._lease.release(is_empty=not (self._steps or stuck))

    def _open(self) -> list[int]:
        """Acquires the lease and deletes orphans -> the committed steps."""
        self._store.storage.prepare()
        self._lease.acquire(self._store.epochs)
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
                self._local.sweep(with_set_aside=True)  # the durable tier keeps its own
        except RunError as raised:
            error = raised
        try:
            agree.first_error(error)
        except RunError:
            self._lease.release()
            raise

    def _decide(self, tier: Tier, step: int, must: bool) -> tuple[str, int]:
        """('skip', 'drop' or the name of the attempt to start, the lease's epoch)."""
        self._lease.check()
        before = tier.under_way
        if before is not None and not before.wait(None if must else PATIENCE_SECONDS):
            # Not counted as a failure: the previous save has its own time-out.
            self._lose(step, f'checkpoint {before.step} is still being written')
            return 'drop', 0
        self._settle(tier)
        if tier is self._durable and tier.failures >= self._config.max_failures:
            raise StorageError(
                f'{tier.failures} checkpoints in a row could not be saved to {self.root}; '
                f'the newest one there is {max(self._steps, default="none")}'
            )
        is_there = step in self._steps and (self.root, step) not in self._damaged
        return 'skip' if is_there else new_attempt(), self._lease.epoch

    def _start(
        self,
        tier: Tier,
        step: int,
        attempt: str,
        epoch: int,
        state: Arrays,
        extra: dict,
        last_good: int,
    ) -> None:
        if tier.under_way is not None:  # never on the primary process: `_decide` settled it
            tier.under_way.wait()
        left_out = self._base.names
        base = {name: array for name, array in state.items() if name in left_out}
        state = {name: array for name, array in state.items() if name not in left_out}
        # The only device-to-host transfer that the training loop intends.
        with jax.transfer_guard('allow'):
            # Started first, so the devices compute them while the host copies.
            prints = {name: Fingerprint(array) for name, array in state.items()}
            if not self._base_prints:
                self._base_prints = {name: Fingerprint(array) for name, array in base.items()}
            parts = arrays.snapshots(state, every_local=tier.private)
        manifest = {
            'epoch': epoch,
            'arrays': {name: _describe(state[name], parts[name]) for name in state},
            **({'base': self._describe_base(base)} if base else {}),
            'mesh': mesh_of(state),
            'processes': jax.process_count(),
            'extra': extra,
        }
        root = tier.store.storage.root
        tier.nbytes = sum(array.nbytes for array in state.values())
        tier.under_way = Save(
            Job(
                store=tier.store,
                step=step,
                attempt=attempt,
                parts=parts,
                prints=prints | self._base_prints,
                manifest=manifest | self._about,
                keep=tier.keep,
                milestones=frozenset() if tier.private else self._milestones,
                damaged=frozenset(bad for place, bad in self._damaged if place == root),
                last_good=last_good,
                private=tier.private,
                deadline=arrays.Deadline.after(self._config.timeout_seconds),
                lease=self._lease if agree.is_primary() else None,
            )
        )

    def _describe_base(self, arrays: Arrays) -> dict[str, Any]:
        described = {name: _describe(array) for name, array in arrays.items()}
        return {'origin': dict(self._base.origin), 'arrays': described}

    def _await_save(self, tier: Tier) -> bool:
        """Waits for the save under way -> whether it was committed, the same on all processes."""
        if tier.under_way is not None:
            tier.under_way.wait()
        committed = agree.from_primary(lambda: self._settle(tier))
        tier.under_way = None
        return committed

    def _settle(self, tier: Tier) -> bool:
        """Records how the save ended -> False if it failed; True if there was none."""
        save, tier.under_way = tier.under_way, None
        if save is None:
            return True
        if save.error is not None:
            tier.failures += 1
            limit = '' if tier.private else f' of {self._config.max_failures}'
            self._lose(save.step, save.error, f' ({tier.failures}{limit} in a row)')
            return False
        tier.failures = 0
        if not tier.private:
            self._steps.add(save.step)
        self._damaged.discard((tier.store.storage.root, save.step))
        self._events.append(
            {
                f'{tier.name}/step': save.step,
                f'{tier.name}/save_seconds': save.seconds,
                f'{tier.name}/blocking_seconds': tier.blocking,
                f'{tier.name}/bytes': tier.nbytes,
                'storage/retries': self._store.storage.retries(),
            }
        )
        return True

    def _lose(self, step: int, reason: str, count: str = '') -> None:
        self._lost += 1
        self._events.append({'checkpoint/lost': self._lost})
        log.warning('checkpoint %d was not saved%s: %s', step, count, reason)


def _set_aside(store: Store, first: int, are_ruined: bool) -> tuple[list[int], list[int]]:
    """(the steps set aside, the steps whose commit is damaged and does not name its attempt)."""
    found = [commit for step, commit in store.commits().items() if step >= first]
    # The newest first, so that what counts is a part of one history if this is interrupted.
    for commit in reversed(found):
        if commit.attempt:
            store.set_aside(commit, are_ruined)
    whole = [commit.step for commit in found if commit.attempt]
    return whole, [commit.step for commit in found if not commit.attempt]


def _describe(array: jax.Array, part: arrays.Snapshot | None = None) -> dict[str, Any]:
    described = {'shape': list(array.shape), 'dtype': array.dtype.name}
    if part is None:
        return described
    whole = len(part.pieces) == 1 and part.pieces[0][1].shape == array.shape
    if whole and array.size <= _SMALL and np.issubdtype(array.dtype, np.integer):
        described['value'] = part.pieces[0][1].tolist()
    return described


def _check_room(store: Store, nbytes: int, count: int) -> None:
    have, need = store.storage.free_bytes(), nbytes * count
    gib = functools.partial(human_bytes, digits=3, unit='GiB')
    if have is not None and have < need:
        raise StorageError(
            f'no room for checkpoints in {store.storage.root}: '
            f'need {gib(need)} ({count} of {gib(nbytes)} each), have {gib(have)}'
        )

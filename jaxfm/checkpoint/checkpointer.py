"""Saves a run without stopping it: a save copies the state to the host, a thread writes (`saver`).

With several processes every method is called by all of them. What one of them finds out, such as
that a save has failed, the primary process decides for all.
"""

import json
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxfm import distributed
from jaxfm.checkpoint import CheckpointConfig, arrays
from jaxfm.checkpoint.fingerprint import start_fingerprint
from jaxfm.checkpoint.lease import Lease
from jaxfm.checkpoint.reader import Arrays, Reader, mesh_of
from jaxfm.checkpoint.saver import Job, Save
from jaxfm.checkpoint.store import Store, new_attempt
from jaxfm.errors import RunError, StorageError

log = logging.getLogger('jaxfm')

# Training waits so long for the save before this one, then goes on without this one.
PATIENCE_SECONDS = 10
# The values of integers no larger than this are in the manifest: steps, counters, the key.
_SMALL = 8


class Checkpointer(Reader):
    """The checkpoints of one run, and the right to write them until `close`.

    directory: where they are, unless the config names another place.
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
        milestones: Iterable[int] = (),
        about: dict[str, Any] | None = None,
    ):
        super().__init__(config, directory)
        self._about = about or {}
        self._milestones = frozenset(milestones)
        self._lease = Lease(self._store.storage, config.lease_seconds)
        # What follows is known to the primary process alone, which decides for all.
        self._save: Save | None = None
        self._failures = 0  # saves that were lost in a row
        self._lost = 0  # in all
        self._blocking = 0.0  # seconds that training stood for the save under way
        self._steps = set(distributed.from_primary(self._open))
        self._open_local()

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
            attempt, epoch = distributed.from_primary(lambda: self._decide(step, must))
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
        if self._save is not None:
            if self._save.wait(PATIENCE_SECONDS):
                self._settle()
            else:
                self._save.abandon()
        self._lease.release(is_empty=not self._steps)

    def _open(self) -> list[int]:
        """Takes the lease and deletes what nobody will use; the steps that are there."""
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
                self._local.sweep()
        except RunError as raised:
            error = raised
        try:
            distributed.first_error(error)
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
        is_there = step in self._steps and (self.root, step) not in self._damaged
        return 'skip' if is_there else new_attempt(), self._lease.epoch

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
            parts, prints = _copy(state, every_local=private)
        manifest = {
            'epoch': epoch,
            'arrays': {name: _described(state[name], parts[name], prints[name]) for name in state},
            'mesh': mesh_of(state),
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
        committed = distributed.from_primary(self._settle)
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
        self._lost += 1
        self._events.append({'checkpoint/lost': self._lost})
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


def _copy(state: Arrays, every_local: bool) -> tuple[dict[str, arrays.Snapshot], dict[str, int]]:
    """Copies on the host, and fingerprints, which the devices compute while the host copies."""
    parts, prints = {}, {}
    copies = arrays.snapshots(state, every_local)
    for name, array in state.items():
        started = start_fingerprint(array)
        parts[name] = next(copies)
        prints[name] = int(started)
    return parts, prints


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


def _check_room(store: Store, nbytes: int, count: int) -> None:
    have, need = store.storage.free_bytes(), nbytes * count
    if have is not None and have < need:
        raise StorageError(
            f'no room for checkpoints in {store.storage.root}: '
            f'need {_gib(need)} ({count} of {_gib(nbytes)}), have {_gib(have)}'
        )


def _gib(nbytes: int) -> str:
    return f'{nbytes / 2**30:.3g} GiB'

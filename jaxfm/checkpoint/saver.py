"""One background save: a thread on each process writes, and the primary process commits.

This thread does all the I/O of a save: the training loop gives it copies of the arrays and never
waits for a server. A failure is stored in `Save.error`, not raised.
"""

import dataclasses
import logging
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from jaxfm.checkpoint import arrays, orbax_tree
from jaxfm.checkpoint.base import arrays_of
from jaxfm.checkpoint.fingerprint import Fingerprint, add_up
from jaxfm.checkpoint.store import METADATA, Commit, Store
from jaxfm.distributed import agree
from jaxfm.errors import LockedError, RunError, StorageError
from jaxfm.storage.lease import Lease

log = logging.getLogger('jaxfm')

_NOTES = re.compile(r'\[(tensorstore_spec|os_error|source|http_|curl_|x-amzn)')


@dataclasses.dataclass(frozen=True)
class Job:
    """What one save has to do. private: the store belongs to this process only."""

    store: Store
    step: int
    attempt: str
    parts: dict[str, arrays.Snapshot]
    prints: dict[str, Fingerprint]  # of all arrays in the manifest
    manifest: dict[str, Any]
    keep: int
    milestones: frozenset[int]
    damaged: frozenset[int]  # steps in the store that a restore found damaged
    last_good: int  # the newest checkpoint before this step stays
    private: bool
    deadline: arrays.Deadline
    lease: Lease | None  # None except on the primary process

    @property
    def directory(self) -> str:
        return f'{self.step}/{self.attempt}'

    @property
    def state(self) -> str:
        return f'{self.directory}/state'


class Save:
    """A save under way. Once it has ended, `error` is None if it was committed, else the reason."""

    def __init__(self, job: Job):
        self.step, self.private = job.step, job.private
        self._deadline = job.deadline
        self.error: str | None = None
        self.seconds = 0.0
        # Set before the commit is sent: if only the reply is lost, the data must stay.
        self._may_count = False
        self._started = time.monotonic()
        self._thread = threading.Thread(
            target=self._run, args=(job,), name='checkpoint', daemon=True
        )
        self._thread.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Waits at most `seconds` (None: without limit) -> whether the save has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def abandon(self) -> None:
        """Cancels the save: a thread inside TensorStore would abort the process at exit."""
        self._deadline.expire()
        self._thread.join(10 * arrays.POLL_SECONDS)

    def _run(self, job: Job) -> None:
        try:
            _write(job)
            self._commit(job)
        except Exception as error:  # no failure of a save may end the run
            self.error = explain(error, job.store)
            log.debug('checkpoint %d', job.step, exc_info=True)
            if not self._may_count:
                _discard(job)
        self.seconds = time.monotonic() - self._started
        if self.error is None:
            _clean(job)

    def _commit(self, job: Job) -> None:
        """Commits the save: returns on all processes once it counts, or raises on all of them."""
        name = f'{job.attempt}/committed'
        if not job.private:
            patience = job.deadline.left + 60
            agree.from_primary(lambda: self._try(_merge, job), name, patience)
            return
        error = None
        try:
            self._try(_describe, job)
        except RunError as raised:
            error = raised
        # No process deletes an older step before every process has this one.
        agree.first_error(error, name, job.deadline.left + 60)

    def _try(self, prepare: Callable[[Job], Commit], job: Job) -> None:
        try:
            ready = prepare(job)
            self._may_count = True
            job.store.commit(ready)
        except LockedError:
            raise
        except Exception as error:
            raise StorageError(explain(error, job.store)) from error


def _write(job: Job) -> None:
    """Writes the arrays, and adds their fingerprints to the manifest.

    Returns once those of all processes are stored, or raises on all of them.
    """
    part = job.state if job.private else _part(job.state, jax.process_index())
    storage, error = job.store.storage, None
    try:
        metadata = orbax_tree.save(storage.kvstore(part), job.parts, job.deadline, job.private)
        if metadata is not None:
            storage.write(f'{job.state}/{METADATA}', metadata)
        parts = [one.part() for one in job.prints.values()]
    except Exception as raised:
        error = StorageError(explain(raised, job.store))
    agree.first_error(error, f'{job.attempt}/written', job.deadline.left)
    prints = add_up(parts, f'{job.attempt}/fingerprints', job.deadline.left)
    described = job.manifest['arrays'] | arrays_of(job.manifest)
    for name, fingerprint in zip(job.prints, prints, strict=True):
        described[name]['fingerprint'] = fingerprint


def _merge(job: Job) -> Commit:
    if jax.process_count() > 1:
        storage = job.store.storage
        parts = [_part(job.state, index) for index in range(jax.process_count())]
        arrays.merge(storage.kvstore(job.state), map(storage.kvstore, parts), job.deadline)
    return _describe(job)


def _describe(job: Job) -> Commit:
    """Writes the manifest and confirms the lease -> the commit, which is not yet written."""
    digest = job.store.write_manifest(job.step, job.attempt, job.manifest)
    if job.deadline.passed:
        raise TimeoutError
    if job.lease is not None:
        job.lease.confirm()
    return Commit(job.step, job.attempt, job.manifest['epoch'], digest)


def _clean(job: Job) -> None:
    """Deletes outdated steps; if a deletion fails, it is tried again after the next save."""
    if not (job.private or agree.is_primary()):
        return
    try:
        listing = job.store.storage.list()
        commits = job.store.commits(listing)
        if job.step not in commits or commits[job.step].attempt != job.attempt:
            return  # another run has taken over: this one may no longer delete anything here
        for step in find_outdated(commits, job):
            job.store.remove(commits[step], listing)
    except Exception as error:
        log.warning('old checkpoints could not be deleted: %s', explain(error, job.store))


def _discard(job: Job) -> None:
    """Deletes what a failed save has written, to free the space on a full disk."""
    if not (job.private or agree.is_primary()):
        return
    try:
        job.store.storage.remove(job.directory)
    except (RunError, OSError) as error:
        log.debug('the sweep of the next run will delete checkpoint %d: %s', job.step, error)


def find_outdated(commits: dict[int, Commit], job: Job) -> list[int]:
    """The steps to delete: damaged ones, and all but `keep` and the milestones.

    Those are the newest; but if none of them is before `last_good`, one that is takes the place of
    the oldest. On a local tier, also newer steps of earlier epochs: the run was restored from an
    older step (a host was away, or the mesh changed), so those steps are not part of its history.
    """
    bad = {
        step
        for step, commit in commits.items()
        if step in job.damaged
        or (job.private and step > job.step and commit.epoch < job.manifest['epoch'])
    }
    whole = sorted(set(commits) - bad)
    kept = whole[-job.keep :]
    followed = [step for step in whole if step < job.last_good]
    if followed and followed[-1] < kept[0]:
        kept[0] = followed[-1]
    return sorted((set(whole) - {*kept} - job.milestones | bad) - {job.step})


def explain(error: Exception, store: Store) -> str:
    """The error as one readable line, without the notes and the full spec TensorStore appends."""
    if isinstance(error, TimeoutError):
        return 'it took longer than checkpoint.timeout_seconds'
    if isinstance(error, RunError):
        return str(error)
    text = _NOTES.split(str(error))[0]
    text = ' '.join(text.replace(f'{store.storage.root}/', '').split())
    return text[:400] or type(error).__name__


def _part(state: str, process: int) -> str:
    return f'{state}/process_{process}' if jax.process_count() > 1 else state

"""One save in the background: a thread on every process writes, the primary one commits.

The thread owns the network: the training loop gives it copies of the arrays and never waits for an
answer of a server. What goes wrong is an outcome, not an exception.
"""

import dataclasses
import logging
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from jaxfm.checkpoint import arrays
from jaxfm.checkpoint.store import Commit, Store
from jaxfm.distributed import agree
from jaxfm.errors import LockedError, RunError, StorageError
from jaxfm.storage.lease import Lease

log = logging.getLogger('jaxfm')

_NOTES = re.compile(r'\[(tensorstore_spec|os_error|source|http_|curl_|x-amzn)')


@dataclasses.dataclass(frozen=True)
class Job:
    """What one save is to do. private: the store is of this process alone."""

    store: Store
    step: int
    attempt: str
    parts: dict[str, arrays.Snapshot]
    manifest: dict[str, Any]
    keep: int
    milestones: frozenset[int]
    damaged: frozenset[int]  # steps there that a restore has found bad
    private: bool
    deadline: arrays.Deadline
    lease: Lease | None  # of the primary process

    @property
    def directory(self) -> str:
        return f'{self.step}/{self.attempt}'

    @property
    def state(self) -> str:
        return f'{self.directory}/state'


class Save:
    """A save on its way. `error` is None once it is committed, a sentence once it has failed."""

    def __init__(self, job: Job):
        self.step, self.private = job.step, job.private
        self._deadline = job.deadline
        self.error: str | None = None
        self.seconds = 0.0
        # A commit was sent: if only its answer was lost, it must keep its data.
        self._may_count = False
        self._started = time.monotonic()
        self._thread = threading.Thread(
            target=self._run, args=(job,), name='checkpoint', daemon=True
        )
        self._thread.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it has ended, after so long at most."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def abandon(self) -> None:
        """Stops waiting for it. A thread inside TensorStore would abort a process that exits."""
        self._deadline.expire()
        self._thread.join(10 * arrays.POLL_SECONDS)

    def _run(self, job: Job) -> None:
        try:
            _write(job)
            self._commit(job)
        except Exception as error:  # a save may fail in any way and must not end the run
            self.error = explain(error, job.store)
            log.debug('checkpoint %d', job.step, exc_info=True)
            if not self._may_count:
                _discard(job)
        self.seconds = time.monotonic() - self._started
        if self.error is None:
            _clean(job)

    def _commit(self, job: Job) -> None:
        """The save counts when it returns, on every process, or it raises on all."""
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
        # Nothing older is deleted before every process has this step.
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
    """The arrays of every process are in the store when it returns, or it raises on all."""
    part = job.state if job.private else _part(job.state, jax.process_index())
    error = None
    try:
        arrays.write(job.store.storage.kvstore(part), job.parts, job.deadline)
    except Exception as raised:
        error = StorageError(explain(raised, job.store))
    agree.first_error(error, f'{job.attempt}/written', job.deadline.left)


def _merge(job: Job) -> Commit:
    if jax.process_count() > 1:
        storage = job.store.storage
        parts = [_part(job.state, index) for index in range(jax.process_count())]
        arrays.merge(storage.kvstore(job.state), map(storage.kvstore, parts), job.deadline)
    return _describe(job)


def _describe(job: Job) -> Commit:
    """Everything but the commit itself, which is returned."""
    digest = job.store.write_manifest(job.step, job.attempt, job.manifest)
    if job.deadline.passed:
        raise TimeoutError
    if job.lease is not None:
        job.lease.confirm()
    return Commit(job.step, job.attempt, job.manifest['epoch'], digest)


def _clean(job: Job) -> None:
    """Deletes what need not stay; what cannot be deleted now will be after the next save."""
    if not (job.private or agree.is_primary()):
        return
    try:
        listing = job.store.storage.list()
        commits = job.store.commits(listing)
        if job.step not in commits or commits[job.step].attempt != job.attempt:
            return  # replaced since it looked: what is here is no longer this run's to delete
        for step in find_outdated(commits, job):
            job.store.remove(step)
    except Exception as error:
        log.warning('old checkpoints could not be deleted: %s', explain(error, job.store))


def _discard(job: Job) -> None:
    """Deletes what a failed save has written: a full disk gets no fuller."""
    if not (job.private or agree.is_primary()):
        return
    try:
        job.store.storage.remove(job.directory)
    except (RunError, OSError) as error:
        log.debug('the sweep of the next run will delete checkpoint %d: %s', job.step, error)


def find_outdated(commits: dict[int, Commit], job: Job) -> list[int]:
    """The steps that are neither among the newest nor to be kept whatever comes, and bad ones.

    On a local tier the newer steps of earlier writers too: what could not be restored from there,
    because a host was away or the mesh was another one, is of a time that did not happen.
    """
    bad = {
        step
        for step, commit in commits.items()
        if step in job.damaged
        or (job.private and step > job.step and commit.epoch < job.manifest['epoch'])
    }
    good = sorted(set(commits) - bad)
    return sorted((set(good[: -job.keep]) - job.milestones | bad) - {job.step})


def explain(error: Exception, store: Store) -> str:
    """One line a person can read: TensorStore appends notes, its whole specification too."""
    if isinstance(error, TimeoutError):
        return 'it took longer than checkpoint.timeout_seconds'
    if isinstance(error, RunError):
        return str(error)
    text = _NOTES.split(str(error))[0]
    text = ' '.join(text.replace(f'{store.storage.root}/', '').split())
    return text[:400] or type(error).__name__


def _part(state: str, process: int) -> str:
    return f'{state}/process_{process}' if jax.process_count() > 1 else state

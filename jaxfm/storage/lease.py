"""A lease next to the checkpoints, so that one process at a time writes them.

The holder creates `lease/<epoch>.json`. Creation is exclusive (If-None-Match on S3, a hard link on
disk), so exactly one of several contenders gets an epoch, and the highest epoch is in force. The
holder's heartbeat is a counter in its file. A contender that sees the counter unchanged for the
duration of the lease, by its own monotonic clock, may take the next epoch. Clocks of different
machines are never compared.

The epoch is a fencing token. A holder that was only suspended cannot commit after its successor
took over: a commit carries its epoch, and counts only if that epoch is in force, or if the holder
in force found the commit when it took over.
"""

import dataclasses
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable

from jaxfm.errors import LockedError, RunError
from jaxfm.storage.base import Storage
from jaxfm.storage.holder import Holder
from jaxfm.storage.seal import seal, unseal

log = logging.getLogger('jaxfm')

# How long a run that ends waits for a storage that does not answer.
PATIENCE_SECONDS = 10
_NAME = re.compile(r'lease/(\d{8})\.json')


@dataclasses.dataclass(frozen=True)
class Record:
    """The content of a lease file. The holder is None if the file cannot be read."""

    epoch: int
    holder: Holder | None
    seconds: float = 0  # the holder may be replaced after this long without a renewal
    renewals: int = 0
    released: bool = False
    inherited: tuple[str, ...] = ()  # the commits found when this epoch began

    @property
    def is_held(self) -> bool:
        """Whether the holder may still be writing, as far as one look can tell."""
        return not (self.released or self.holder is not None and self.holder.is_gone())

    def to_json(self) -> bytes:
        return seal(dataclasses.asdict(self))

    def admits(self, commit: str, epoch: int) -> bool:
        """Whether a commit that carries `epoch` counts while this lease is in force."""
        return epoch == self.epoch or commit in self.inherited


def read_lease(storage: Storage, names: Iterable[str]) -> Record | None:
    """The lease in force among the names of a listing; None if there has never been one."""
    epochs = [int(found[1]) for name in names if (found := _NAME.fullmatch(name))]
    return _read(storage, max(epochs)) if epochs else None


class Lease:
    """The right to write checkpoints to a storage, held from `acquire` to `release`.

    seconds: how long a holder may go without a renewal before it is replaced; a contender waits for
    the longer of its own value and the holder's. A thread renews three times in that period.
    """

    def __init__(self, storage: Storage, seconds: float):
        self._storage, self._seconds = storage, seconds
        self._record: Record | None = None
        self._taken_by: Holder | str | None = None
        self._stopped = threading.Event()
        self._is_empty = False
        self._thread: threading.Thread | None = None

    @property
    def epoch(self) -> int:
        return self._record.epoch

    def acquire(self, commits: Callable[[], dict[str, int]]) -> None:
        """Takes the lease, after waiting for a holder that may be dead.

        Args:
          commits: called once the lease is free; returns {commit that counts: its epoch}.

        Raises:
          LockedError: another process holds it; the message names that process.
        """
        before = read_lease(self._storage, self._storage.list('lease'))
        if before is not None and before.is_held:
            self._outwait(before)
        inherited = commits()
        # If the lease file was lost, its epoch must still be above those of the commits.
        epoch = max([before.epoch if before else 0, *inherited.values()]) + 1
        record = Record(epoch, Holder.here(), self._seconds, inherited=tuple(inherited))
        try:
            self._storage.write(_name(epoch), record.to_json(), exclusive=True)
        except FileExistsError:
            self._refuse(_read(self._storage, epoch))
        self._record = record
        for name in self._storage.list('lease'):
            if (found := _NAME.fullmatch(name)) and int(found[1]) < epoch:
                self._storage.remove(name)
        self._thread = threading.Thread(target=self._hold, name='lease', daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises LockedError if another process is known to have taken the lease."""
        if self._taken_by is not None:
            raise LockedError(
                f'{self._storage.root} was taken over by {self._taken_by}: '
                'this run may no longer write there'
            )

    def confirm(self) -> None:
        """Like `check`, but reads the storage first. Call it before a commit."""
        self._look()
        self.check()

    def release(self, is_empty: bool = False) -> None:
        """Releases the lease, so that the next run need not wait. A failure is only logged.

        is_empty: nothing was ever committed, so the lease file is removed as well.
        """
        if self._thread is None:
            return
        self._is_empty = is_empty
        self._stopped.set()
        self._thread.join(PATIENCE_SECONDS)
        self._thread = None

    def _outwait(self, record: Record) -> None:
        """Returns once the holder has ended or missed its renewals; raises LockedError if not."""
        if record.holder == Holder.here():  # an earlier attempt of this process
            return
        seconds = max(self._seconds, record.seconds)
        log.warning(
            '%s may be in use by %s: waiting %g s to see whether it is alive',
            self._storage.root,
            record.holder or 'another process',
            seconds,
        )
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(min(1.0, seconds / 10))
            now = read_lease(self._storage, self._storage.list('lease'))
            if now is None or not now.is_held:  # None: it ended before its first checkpoint
                return
            if now != record and now.holder is not None:  # it was renewed, and is readable
                self._refuse(now)

    def _refuse(self, record: Record) -> None:
        raise LockedError(
            f'{self._storage.root} is written by {record.holder or "another process"}; '
            'end that run first, or give this one another place'
        )

    def _hold(self) -> None:
        """Renews the lease until it is released or lost; the thread that may wait for storage."""
        while not self._stopped.wait(self._seconds / 3):
            try:
                self._look()
                if self._taken_by is not None:
                    return
                renewals = self._record.renewals + 1
                self._record = dataclasses.replace(self._record, renewals=renewals)
                self._storage.write(_name(self.epoch), self._record.to_json())
            except (RunError, OSError) as error:
                # During an outage nobody else can take the lease over, either: keep trying.
                log.debug('the lease could not be renewed: %s', error)
        try:
            self._give_back()
        except (RunError, OSError) as error:
            log.debug('the lease could not be released: %s', error)

    def _give_back(self) -> None:
        if self._taken_by is not None:
            return
        if self._is_empty:
            self._storage.remove(_name(self.epoch))
        else:
            record = dataclasses.replace(self._record, released=True)
            self._storage.write(_name(self.epoch), record.to_json())

    def _look(self) -> None:
        """Notes another holder: of a later epoch, or of this one if our file had been lost."""
        newest = read_lease(self._storage, self._storage.list('lease'))
        if newest is None or newest.epoch < self.epoch:
            return
        if newest.epoch > self.epoch or newest.holder not in (None, self._record.holder):
            self._taken_by = newest.holder or 'another process'


def _name(epoch: int) -> str:
    return f'lease/{epoch:08d}.json'


def _read(storage: Storage, epoch: int) -> Record:
    """The record of an epoch; without a holder if the file is damaged or was just removed."""
    try:
        fields = unseal(storage.read(_name(epoch)))
        holder = Holder(**fields['holder'])
        inherited = tuple(fields['inherited'])
        rest = fields['seconds'], fields['renewals'], fields['released']
        return Record(epoch, holder, *rest, inherited)
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return Record(epoch, None)

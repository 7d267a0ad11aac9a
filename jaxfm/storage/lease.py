"""One writer a run: a lease beside the checkpoints, with a holder, an epoch and a heartbeat.

Each holder makes `lease/<epoch>.json`, which cannot be made twice (If-None-Match on S3, a link on
disk): of two who take over, one wins. The highest epoch holds. While it runs, the holder renews a
number in its file; whoever sees that number stand still for the time of a lease, on its own
monotonic clock, may take the next epoch. No clock of another machine is ever compared.

A holder that was only asleep cannot commit behind its successor's back: a commit carries its epoch,
and counts if that is the newest, or if the newest holder saw the commit when it took over.
"""

import dataclasses
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from jaxfm.errors import LockedError, RunError
from jaxfm.storage.base import Storage
from jaxfm.storage.seal import seal, unseal

log = logging.getLogger('jaxfm')

# A run that ends waits no longer than this for a storage that does not answer.
PATIENCE_SECONDS = 10
_NAME = re.compile(r'lease/(\d{8})\.json')


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who writes: enough for a person to find the process, and for this host to see it gone."""

    host: str
    pid: int
    started: str  # of the process, since the boot of the host; pids come again
    space: str  # of pids: the boot of the host, and the container's own numbers

    @classmethod
    def here(cls) -> 'Holder':
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _start_of(pid) or '', _pid_space())

    def __str__(self):
        return f'process {self.pid} on {self.host}'

    def is_gone(self) -> bool:
        """Whether it has ended for sure, which only its own host can know."""
        if not self.space or self.space != _pid_space() or self.host != socket.gethostname():
            return False
        return _start_of(self.pid) != self.started


@dataclasses.dataclass(frozen=True)
class Record:
    """What a lease file says; None of holder: it cannot be read."""

    epoch: int
    holder: Holder | None
    seconds: float = 0  # without a renewal, after which the holder agrees to be replaced
    renewals: int = 0
    released: bool = False
    inherited: tuple[str, ...] = ()  # commits that were there when this epoch began

    @property
    def is_held(self) -> bool:
        """Whether somebody may be writing, as far as can be seen without waiting."""
        return not (self.released or self.holder is not None and self.holder.is_gone())

    def to_json(self) -> bytes:
        return seal(dataclasses.asdict(self))

    def admits(self, commit: str, epoch: int) -> bool:
        """Whether a commit made in some epoch counts in this one."""
        return epoch == self.epoch or commit in self.inherited


def read_lease(storage: Storage, names: Iterable[str]) -> Record | None:
    """The lease in force, among the names of a listing; None when nobody has ever held one."""
    epochs = [int(found[1]) for name in names if (found := _NAME.fullmatch(name))]
    return _read(storage, max(epochs)) if epochs else None


class Lease:
    """The right to write checkpoints to a storage, once `acquire` has returned.

    seconds: after so long without a renewal others may take it over, or after what the holder says
    if that is longer. It is renewed three times as often, by a thread.
    """

    def __init__(self, storage: Storage, seconds: float):
        self._storage, self._seconds = storage, seconds
        self._record: Record | None = None
        self._taken_by: Holder | None = None
        self._stopped = threading.Event()
        self._is_empty = False
        self._thread: threading.Thread | None = None

    @property
    def epoch(self) -> int:
        return self._record.epoch

    def acquire(self, commits: Callable[[], dict[str, int]]) -> None:
        """Takes the lease; `commits` gives those that count, with their epochs, once it is free.

        Raises:
          LockedError: somebody else holds it, with the name of the holder.
        """
        before = read_lease(self._storage, self._storage.list('lease'))
        if before is not None and before.is_held:
            self._outwait(before)
        inherited = commits()
        # A lease that was lost does not make the commits under it younger.
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
        """Raises LockedError when somebody else has taken the lease."""
        if self._taken_by is not None:
            raise LockedError(
                f'{self._storage.root} was taken over by {self._taken_by}: '
                'this run may no longer write there'
            )

    def confirm(self) -> None:
        """As `check`, after a look at the storage: before a commit."""
        self._look()
        self.check()

    def release(self, is_empty: bool = False) -> None:
        """Gives it back, so that the next run need not wait; quietly where that fails.

        Where nothing has ever been committed nothing is left, as if nobody had been there.
        """
        if self._thread is None:
            return
        self._is_empty = is_empty
        self._stopped.set()
        self._thread.join(PATIENCE_SECONDS)
        self._thread = None

    def _outwait(self, record: Record) -> None:
        """Returns when the holder has ended, or has not renewed for as long as a lease lasts."""
        if record.holder == Holder.here():  # an earlier attempt of this very process
            return
        seconds = max(self._seconds, record.seconds)
        log.warning(
            '%s may be in use by %s: waiting %g s for a sign of life',
            self._storage.root,
            record.holder or 'somebody',
            seconds,
        )
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(min(1.0, seconds / 10))
            now = read_lease(self._storage, self._storage.list('lease'))
            if now is None or not now.is_held:  # it has ended, without a checkpoint or with
                return
            if now != record and now.holder is not None:  # or it is just gone, or torn
                self._refuse(now)

    def _refuse(self, record: Record) -> None:
        raise LockedError(
            f'{self._storage.root} is written by {record.holder or "somebody else"}; '
            'end that run first, or give this one another place'
        )

    def _hold(self) -> None:
        """Renews it until it is released or lost: a thread, which alone waits for the storage."""
        while not self._stopped.wait(self._seconds / 3):
            try:
                self._look()
                if self._taken_by is not None:
                    return
                renewals = self._record.renewals + 1
                self._record = dataclasses.replace(self._record, renewals=renewals)
                self._storage.write(_name(self.epoch), self._record.to_json())
            except (RunError, OSError) as error:
                # An outage is no reason to stop: nobody else can take it over meanwhile, either.
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
        """Notes who else holds it: by a later epoch, or this one after the file was lost."""
        newest = read_lease(self._storage, self._storage.list('lease'))
        if newest is None or newest.epoch < self.epoch:
            return
        if newest.epoch > self.epoch or newest.holder not in (None, self._record.holder):
            self._taken_by = newest.holder or 'somebody'


def _name(epoch: int) -> str:
    return f'lease/{epoch:08d}.json'


def _read(storage: Storage, epoch: int) -> Record:
    """A file that is damaged or just gone says nothing: its holder has to be waited for."""
    try:
        fields = unseal(storage.read(_name(epoch)))
        holder = Holder(**fields['holder'])
        inherited = tuple(fields['inherited'])
        rest = fields['seconds'], fields['renewals'], fields['released']
        return Record(epoch, holder, *rest, inherited)
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return Record(epoch, None)


def _start_of(pid: int) -> str | None:
    """When a process of this host started, in ticks since boot; None when there is none."""
    try:
        fields = Path(f'/proc/{pid}/stat').read_text('utf-8').rpartition(')')[2].split()
    except OSError:
        return None
    return None if fields[0] in 'ZX' else fields[19]  # a zombie has ended


def _pid_space() -> str:
    try:
        boot = Path('/proc/sys/kernel/random/boot_id').read_text('utf-8').strip()
        return f'{boot} {os.readlink("/proc/self/ns/pid")}'
    except OSError:
        return ''

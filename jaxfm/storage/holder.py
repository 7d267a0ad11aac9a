"""Identifies the process that holds a lease, and tells whether it has certainly ended.

A process that may still be alive is never reported as ended. If this host cannot tell, the lease
has to run out: the process is on another host or in another container, there is no /proc (macOS),
or /proc hides the processes of other users.
"""

import dataclasses
import os
import socket
import uuid
from pathlib import Path

_PROC = Path('/proc')
_TOKEN = uuid.uuid4().hex  # identifies this process where there is no /proc


@dataclasses.dataclass(frozen=True)
class Holder:
    """A process, identified by more than its pid, which the system reuses.

    started: clock ticks from the boot of the host to the start of the process; without /proc, a
    random token. space: the boot of the host and the pid namespace, in which the pair (pid,
    started) is unique; without /proc, ''.
    """

    host: str
    pid: int
    started: str
    space: str

    @classmethod
    def here(cls) -> 'Holder':
        """This process."""
        host, pid, space = socket.gethostname(), os.getpid(), _pid_space()
        started = _start_of(pid) if space else None
        return cls(host, pid, started, space) if started else cls(host, pid, _TOKEN, '')

    def __str__(self):
        return f'process {self.pid} on {self.host}'

    def is_gone(self) -> bool:
        """Whether the process has certainly ended; False if this process cannot tell."""
        if not self.space or self.space != _pid_space() or self.host != socket.gethostname():
            return False
        started = _start_of(self.pid)
        return started != self.started if started is not None else not _exists(self.pid)


def _start_of(pid: int) -> str | None:
    """When a process of this host started, in clock ticks since boot.

    '' for a zombie, which has ended. None if it cannot be read, which does not prove that there is
    no such process.
    """
    try:
        stat = (_PROC / str(pid) / 'stat').read_bytes()
    except OSError:
        return None
    fields = stat.rpartition(b')')[2].split()  # the program's name may contain spaces and )
    return '' if fields[0] in (b'Z', b'X') else fields[19].decode()


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to another user
        return True
    return True


def _pid_space() -> str:
    try:
        boot = (_PROC / 'sys/kernel/random/boot_id').read_text('utf-8').strip()
        return f'{boot} {os.readlink(_PROC / "self/ns/pid")}'
    except OSError:
        return ''

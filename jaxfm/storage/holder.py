"""The process that holds a lease: a name for people, and whether it has certainly ended.

A process that may be alive is never judged dead. Where this host cannot tell, the lease has to run
out: on another host or in another container, without /proc (macOS), or where /proc hides the
processes of other users.
"""

import dataclasses
import os
import socket
import uuid
from pathlib import Path

_PROC = Path('/proc')
_TOKEN = uuid.uuid4().hex  # tells this process from all others where /proc cannot


@dataclasses.dataclass(frozen=True)
class Holder:
    """A process, identified beyond its pid, which the system gives to others after its end.

    started: ticks from the boot of the host to the start of the process; a random token without
    /proc. space: the boot of the host and the pid namespace, where `pid` and `started` together are
    unique; '' without /proc.
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
        """Whether the process has certainly ended; False wherever only its own host could tell."""
        if not self.space or self.space != _pid_space() or self.host != socket.gethostname():
            return False
        started = _start_of(self.pid)
        return started != self.started if started is not None else not _exists(self.pid)


def _start_of(pid: int) -> str | None:
    """When a process of this host started, in ticks since boot.

    '' for a zombie, which has ended. None where it cannot be read: that alone does not mean that
    there is no such process.
    """
    try:
        stat = (_PROC / str(pid) / 'stat').read_bytes()
    except OSError:
        return None
    fields = stat.rpartition(b')')[2].split()  # the name of the program may contain anything
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

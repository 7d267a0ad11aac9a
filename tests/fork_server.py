"""Starts processes whose imports are already done.

Most of the CPU time of a tiny run goes into importing jax and jaxfm. One server process does this
once and forks a child for every process that a test needs. The child gets the arguments,
environment, working directory and streams that `subprocess.Popen` would give it. It is a separate
process: it can be killed, stopped and signalled, and it initialises its own devices.

Forking is safe because the server has imported jax but never used it, so XLA has started no thread.

Tests of what happens before or during the imports use `subprocess.Popen`.
"""

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LARGEST_REQUEST = 1 << 17  # bytes

# Modules that runs import, at the start or later.
IMPORTS = """
jaxfm.main jaxfm.modes.train jaxfm.modes.evaluate jaxfm.modes.sample jaxfm.modes.chat
jaxfm.modes.export jaxfm.data.sources.files jaxfm.data.corpus.build jaxfm.models.transformer
jaxfm.objectives.next_token jaxfm.evals.loss jaxfm.evals.generate jaxfm.checkpoint.checkpointer
jaxfm.report.page matplotlib.backends.backend_agg
""".split()


class ForkServer:
    """Starts the server process, and starts processes through it."""

    def __init__(self):
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, '-m', 'tests.fork_server', str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {'JAX_PLATFORMS': 'cpu'},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )

    def start(
        self, target, *, env, cwd=ROOT, stdin=None, stdout=None, stderr=None, text=True
    ) -> 'Forked':
        """Starts a process, as `subprocess.Popen` does.

        Args:
          target: ['-m', MODULE, arguments...] or ['-c', PROGRAM, arguments...].
          env: the complete environment.
          stdin, stdout, stderr: a file, a file descriptor, `subprocess.PIPE`, or None for the
            stream of the test process.
        """
        with contextlib.ExitStack() as stack:
            pipes, passed = {}, []
            for number, (name, stream) in enumerate(
                dict(stdin=stdin, stdout=stdout, stderr=stderr).items()
            ):
                if stream == subprocess.PIPE:
                    ends = os.pipe()
                    pipes[name], stream = ends[::-1] if name == 'stdin' else ends
                    stack.callback(os.close, stream)
                elif stream is None:
                    stream = number
                passed.append(stream if isinstance(stream, int) else stream.fileno())
            status, ours = os.pipe()
            stack.callback(os.close, ours)
            request = json.dumps([[str(word) for word in target], dict(env), str(cwd)]).encode()
            assert len(request) < LARGEST_REQUEST
            socket.send_fds(self._socket, [request], [*passed, ours])
            pid = self._socket.recv(4)
        if not pid:
            raise RuntimeError('the fork server has died')
        return Forked(*struct.unpack('i', pid), status, pipes, target, text)

    def run(self, target, *, input=None, timeout=None, **options) -> subprocess.CompletedProcess:
        """Runs a process to its end and captures its output, as `subprocess.run` does."""
        pipes = dict.fromkeys(('stdin', 'stdout', 'stderr'), subprocess.PIPE)
        process = self.start(target, **pipes, **options)
        try:
            out, error = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            raise
        return subprocess.CompletedProcess(target, process.returncode, out, error)

    def stop(self) -> None:
        """Ends the server; nothing waits for children that are still running."""
        self._socket.close()
        self._process.wait()


class Forked:
    """A process that the server has forked, with the methods of `subprocess.Popen`.

    It is not a child of this process, so its exit status comes from the server through a pipe.
    """

    def __init__(self, pid: int, status: int, pipes: dict[str, int], args, text: bool):
        self.args, self.pid, self.returncode = args, pid, None
        self._status = open(status, 'rb')
        self.stdin = self.stdout = self.stderr = None
        for name, fd in pipes.items():
            mode = ('w' if name == 'stdin' else 'r') + ('' if text else 'b')
            setattr(self, name, open(fd, mode, buffering=-1 if text else 0))

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            code = self._status.read(4)
            if not code:
                raise RuntimeError('the fork server has died')
            [self.returncode] = struct.unpack('i', code)
            self._status.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, input=None, timeout: float | None = None):
        """Writes the input, reads both outputs and waits -> (stdout, stderr)."""
        found = {}

        def read(name, stream):
            with stream:
                found[name] = stream.read()

        outputs = [(n, s) for n in ('stdout', 'stderr') if (s := getattr(self, n))]
        readers = [
            threading.Thread(target=read, args=output, daemon=True)
            for output in outputs
            if not output[1].closed
        ]
        for reader in readers:
            reader.start()
        if self.stdin and not self.stdin.closed:
            with contextlib.suppress(BrokenPipeError), self.stdin:
                if input:
                    self.stdin.write(input)
        for reader in readers:
            reader.join(timeout)
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(timeout)
        return found.get('stdout'), found.get('stderr')


def _serve(requests: socket.socket) -> tuple[list[str], ...] | None:
    """Forks until the socket is closed; returns the request in each child, None in the server."""
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    statuses = {}
    while True:
        ready, _, _ = select.select([requests, woken], [], [])
        if woken in ready:
            os.read(woken, 1024)
            _report_ends(statuses)
        if requests not in ready:
            continue
        message, fds, _, _ = socket.recv_fds(requests, LARGEST_REQUEST, 4)
        if not message:
            return None
        *streams, status = fds
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            requests.close()
            for fd in (woken, wakes, status, *statuses.values()):
                os.close(fd)
            for number, fd in enumerate(streams):
                os.dup2(fd, number)
                os.close(fd)
            return json.loads(message)
        statuses[pid] = status
        for fd in streams:
            os.close(fd)
        requests.send(struct.pack('i', pid))


def _report_ends(statuses: dict[int, int]) -> None:
    """Writes the exit code of each ended child to its pipe, in the form of `Popen.returncode`."""
    while statuses:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        with contextlib.suppress(BrokenPipeError):  # the test does not wait for it
            os.write(statuses[pid], struct.pack('i', os.waitstatus_to_exitcode(status)))
        os.close(statuses.pop(pid))


def _adopt(env: dict[str, str], cwd: str) -> None:
    """Sets environment and directory, and updates jax, which read its variables at import."""
    import jax

    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for name, value in env.items():
        option = name.lower()
        if name.startswith('JAX_') and option in jax.config.values:
            before = jax.config.values[option]
            if isinstance(before, bool):
                value = value.lower() in ('1', 'true', 'yes', 'on')
            elif isinstance(before, int | float):
                value = type(before)(value)
            jax.config.update(option, value)


def _open_streams() -> None:
    """Opens the standard streams as the interpreter does at start-up."""
    encoding, _, errors = os.environ.get('PYTHONIOENCODING', '').partition(':')
    how = dict(encoding=encoding or None, closefd=False)
    sys.stdin = sys.__stdin__ = open(0, errors=errors or None, **how)
    line_buffered = 1 if os.isatty(1) else -1
    sys.stdout = sys.__stdout__ = open(1, 'w', line_buffered, errors=errors or None, **how)
    sys.stderr = sys.__stderr__ = open(2, 'w', 1, errors='backslashreplace', **how)


def _run(target: list[str]) -> None:
    """Runs a target as a new interpreter would."""
    kind, what, *arguments = target
    if kind == '-m':
        sys.argv = [what, *arguments]
        sys.modules.pop(what, None)  # imported before, but not as __main__
        runpy.run_module(what, run_name='__main__', alter_sys=True)
    else:
        sys.argv = ['-c', *arguments]
        main = type(sys)('__main__')
        sys.modules['__main__'] = main
        exec(compile(what, '<string>', 'exec'), main.__dict__)


if __name__ == '__main__':
    for module in IMPORTS:
        importlib.import_module(module)
    request = _serve(socket.socket(fileno=int(sys.argv[1])))
    if request:
        target, env, cwd = request
        _adopt(env, cwd)
        _open_streams()
        _run(target)

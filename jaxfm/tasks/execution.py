"""Runs a generated Python program in a process of its own, with limits. No security boundary.

The limits stop accidents: endless loops, too much memory, output or processes. They do not stop a
program that means harm: it has the network, and the files that its user may read and write. Run
untrusted models in a container or a virtual machine.
"""

import dataclasses
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Set in the child itself: a function between fork and exec may hang in a process with threads,
# such as JAX's. Processes are limited to none, because the limit counts all those of the user; it
# does not bind root. The program passes if it comes to its end, so exit(0) does not.
START = """
import resource, sys
program, cpu, memory, output, token = sys.argv[1:]
for limit, value in (
    ('CPU', cpu), ('AS', memory), ('FSIZE', output), ('NOFILE', 64), ('NPROC', 0), ('CORE', 0),
):
    resource.setrlimit(getattr(resource, 'RLIMIT_' + limit), (int(value), int(value)))
del sys.argv[1:]
with open(program, encoding='utf-8') as file:
    source = file.read()
exec(compile(source, program, 'exec'), {'__name__': '__main__'})
with open('passed', 'w', encoding='utf-8') as file:
    file.write(token)
"""
MAX_OUTPUT = 16 << 20  # bytes of one file
POLL = 0.002  # seconds


@dataclasses.dataclass(frozen=True)
class Result:
    """How a program ended: `passed`, or why not ('timeout', 'signal 9', 'AssertionError: ...')."""

    passed: bool
    reason: str = ''
    output: str = ''  # the beginning of what it printed, if that was asked for


def run_program(source: str, seconds: float, memory_mb: int, max_output: int = 0) -> Result:
    """Runs a program in an empty temporary directory, and kills its process group at the end.

    seconds: of CPU time, rounded up, and of wall-clock time.
    memory_mb: MiB of address space.
    max_output: bytes of its standard output to keep.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        token, program = secrets.token_hex(16), Path(directory, 'program.py')
        # A lone surrogate, which a tokenizer may give, cannot be written; it is no valid Python.
        program.write_bytes(source.encode('utf-8', 'replace'))
        limits = (math.ceil(seconds), memory_mb << 20, MAX_OUTPUT, token)
        arguments = [str(program), *map(str, limits)]
        has_ended, status, output, errors = _run(arguments, directory, seconds, max_output)
        if not has_ended:
            return Result(False, 'timeout', output)
        passed = Path(directory, 'passed')
        is_done = passed.is_file() and passed.read_text(encoding='utf-8') == token
    if is_done and status == 0:
        return Result(True, output=output)
    return Result(False, _explain(status, errors), output)


def _run(
    arguments: list[str], directory: str, seconds: float, max_output: int
) -> tuple[bool, int, str, str]:
    """(whether it ended in time, exit status, the beginning of stdout, the end of stderr)."""
    path = os.environ.get('PATH', os.defpath)
    # Libraries would start a thread per core, and are limited to one process.
    environment = {'PATH': path, 'HOME': directory, 'TMPDIR': directory, 'OMP_NUM_THREADS': '1'}
    environment |= {'OPENBLAS_NUM_THREADS': '1', 'PYTHONHASHSEED': '0'}
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            [sys.executable, '-I', '-c', START, *arguments],
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout if max_output else subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            has_ended = _wait(process.pid, time.monotonic() + seconds)
        finally:
            # Before the process is reaped, no other group can have its id.
            os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        stdout.seek(0)
        stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - 2000))
        output, errors = stdout.read(max_output), stderr.read()
        return has_ended, status, *(b.decode('utf-8', 'replace') for b in (output, errors))


def _wait(pid: int, deadline: float) -> bool:
    """Waits until the process ends, without reaping it; False at the deadline."""
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL)
    return True


def _explain(status: int, errors: str) -> str:
    if status < 0:
        return f'signal {-status}'
    lines = errors.strip().split('\n')
    return lines[-1][:200] or f'it ended early, with exit status {status}'

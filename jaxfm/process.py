"""Process-level setup for command lines: Ctrl-C, standard streams, malloc settings, CPU cores.

`begin` runs before the heavy imports, so this module imports only the standard library.
"""

import contextlib
import os
import signal
import sys

INTERRUPTED = 130  # exit code after Ctrl-C, by the convention of shells (128 + SIGINT)

# By default glibc returns the large temporaries of every step to the system and maps them again, in
# small pages; on CPU that costs 14 % of the speed. It reads GLIBC_TUNABLES when a process starts.
HUGE_PAGES = (
    'glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296'
    ':glibc.malloc.trim_threshold=8589934592'
)

_interrupts: list[str] = []  # 'received' once Ctrl-C has raised, 'told' once it is reported


def begin() -> None:
    """Prepares this process to run one command line, before the heavy imports.

    Until `unwind_on_interrupt` is called, Ctrl-C ends the process at once: nothing has been written
    yet, and an exception could be raised in the middle of an import.
    """
    if sys.platform == 'win32':
        sys.exit('error: jaxfm runs on Linux and macOS; on Windows use it inside WSL')
    # Background jobs of a script, for example, start with SIGINT ignored; that stays.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _end_at_once)
        sys.unraisablehook = _end_if_interrupted
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # blocked by `use_huge_pages`
    _open_closed_streams()
    replace_unprintable()


def unwind_on_interrupt() -> None:
    """From now on the first Ctrl-C raises KeyboardInterrupt: there is something to clean up.

    The second one ends the process at once. Does nothing unless `begin` has been called.
    """
    if signal.getsignal(signal.SIGINT) is _end_at_once:
        signal.signal(signal.SIGINT, _raise_once)


def end_on_interrupt() -> None:
    """From now on Ctrl-C ends the process at once, and the interpreter prints nothing."""
    if signal.getsignal(signal.SIGINT) is _raise_once:
        signal.signal(signal.SIGINT, _end_at_once)


def is_interrupted() -> bool:
    """Whether Ctrl-C has raised a KeyboardInterrupt, even if a library has caught it."""
    return 'received' in _interrupts


def report_interrupt() -> int:
    """Writes one line about the interruption to stderr, once; returns the exit code."""
    if 'told' not in _interrupts:
        _interrupts.append('told')
        # A terminal has echoed ^C, which the carriage return overwrites.
        line = b'\rinterrupted\n' if os.isatty(2) else b'interrupted\n'
        with contextlib.suppress(OSError):
            os.write(2, line)
    return INTERRUPTED


def _end_at_once(*_) -> None:
    os._exit(report_interrupt())


def _raise_once(*_) -> None:
    _interrupts.append('received')
    signal.signal(signal.SIGINT, _end_at_once)
    raise KeyboardInterrupt


def _end_if_interrupted(unraisable) -> None:
    """Ends the process if Ctrl-C arrived in a finalizer: Python would print it and continue."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        _end_at_once()
    else:
        sys.__unraisablehook__(unraisable)


@contextlib.contextmanager
def interrupts_blocked():
    """Blocks SIGINT, also in processes started inside; a terminal sends it to the whole group."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# Streams


def replace_unprintable() -> None:
    """Makes stdout and stderr write `?` for characters that their encoding lacks, and not raise."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='replace')


def print_line(line: str) -> None:
    """Writes a line to stderr; ignores a closed stream or pipe."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def print_text(text: str, end: str = '\n') -> bool:
    """Writes text to stdout; returns False if the reader has gone, as after `| head -1`."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        _discard(sys.stdout)
        return False
    return True


def flush() -> None:
    """Flushes stdout and stderr; discards what has no reader, or Python would print an error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _discard(stream)


def _discard(stream) -> None:
    """Redirects a stream to /dev/null, including what it has buffered."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _open_closed_streams() -> None:
    """Opens closed streams (`>&-`) as /dev/null, or the next open file would get their number."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name, mode in (('stdin', 'r'), ('stdout', 'w'), ('stderr', 'w')):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding='utf-8'))


# The machine


def use_huge_pages() -> None:
    """Restarts this process once with HUGE_PAGES, if it will compute on CPU with glibc."""
    platform = os.environ.get('JAX_PLATFORMS', '').split(',')[0]
    on_gpu = platform != 'cpu' if platform else has_nvidia_gpu()
    if not sys.platform.startswith('linux') or on_gpu or 'GLIBC_TUNABLES' in os.environ:
        return
    os.environ['GLIBC_TUNABLES'] = HUGE_PAGES
    # Ctrl-C stays blocked until `begin`: before it, the interpreter would print a traceback.
    with interrupts_blocked(), contextlib.suppress(OSError):
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def has_nvidia_gpu() -> bool:
    """Whether the system has a device of the NVIDIA driver."""
    import glob  # imports `re`, which would delay `begin`

    return bool(glob.glob('/dev/nvidia[0-9]*'))


def num_cores() -> int:
    """How many CPU cores this process may use; all of the machine's if the system cannot tell."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

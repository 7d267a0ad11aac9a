"""What a command line needs of its process: Ctrl-C, streams, malloc, cores.

`begin` runs before anything heavy is imported, so this module imports the standard library alone.
"""

import contextlib
import os
import signal
import sys

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it

# By default glibc returns the large temporaries of every step to the system and maps them anew, in
# small pages; on CPU that costs 14 % of the speed. It reads this variable when a process starts.
HUGE_PAGES = (
    'glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296'
    ':glibc.malloc.trim_threshold=8589934592'
)

_interrupts: list[str] = []  # 'received' once Ctrl-C has raised, 'told' once the line is written


def begin() -> None:
    """Prepares this process to run one command line, before the heavy imports.

    Ctrl-C during start-up ends it at once: nothing is written yet, and an exception could be raised
    anywhere inside an import. `unwind_on_interrupt` changes that.
    """
    if sys.platform == 'win32':
        sys.exit('error: jaxfm runs on Linux and macOS; on Windows use it inside WSL')
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGINT, _end_at_once)
        sys.unraisablehook = _end_if_interrupted
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # blocked by `use_huge_pages`
    _open_closed_streams()
    replace_unprintable()


def unwind_on_interrupt() -> None:
    """From here on the first Ctrl-C raises KeyboardInterrupt: there is something to clean up.

    The second one ends the process at once. Nothing changes where `begin` has not been called.
    """
    if signal.getsignal(signal.SIGINT) is _end_at_once:
        signal.signal(signal.SIGINT, _raise_once)


def end_on_interrupt() -> None:
    """From here on Ctrl-C ends the process at once, without a word from the interpreter's exit."""
    if signal.getsignal(signal.SIGINT) is _raise_once:
        signal.signal(signal.SIGINT, _end_at_once)


def is_interrupted() -> bool:
    """Whether Ctrl-C has raised a KeyboardInterrupt, which somebody may have caught."""
    return 'received' in _interrupts


def report_interrupt() -> int:
    """Writes the one line that Ctrl-C leaves on stderr; returns the exit code."""
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
    """Python cannot raise inside a finalizer: it would print the traceback there and go on."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        _end_at_once()
    else:
        sys.__unraisablehook__(unraisable)


@contextlib.contextmanager
def interrupts_blocked():
    """Processes started inside never receive Ctrl-C, which a terminal sends to all of a group."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# Streams


def replace_unprintable() -> None:
    """stdout and stderr show `?` for a character that their encoding lacks, and do not fail."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='replace')


def print_line(line: str) -> None:
    """Writes a line to stderr, whether or not anybody reads it."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def print_text(text: str, end: str = '\n') -> bool:
    """Writes text to stdout; False if nobody reads it any more, as after `| head -1`."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        _discard(sys.stdout)
        return False
    return True


def flush() -> None:
    """Flushes stdout and stderr: what nobody reads is discarded, or Python would complain of it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _discard(stream)


def _discard(stream) -> None:
    """All that a stream still holds, and all that follows, goes to /dev/null."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _open_closed_streams() -> None:
    """A stream that was closed (`>&-`) becomes /dev/null; the next file would take its number."""
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
    """Starts this process over with HUGE_PAGES, once, where it computes on CPU with glibc."""
    platform = os.environ.get('JAX_PLATFORMS', '').split(',')[0]
    on_gpu = platform != 'cpu' if platform else has_nvidia_gpu()
    if not sys.platform.startswith('linux') or on_gpu or 'GLIBC_TUNABLES' in os.environ:
        return
    os.environ['GLIBC_TUNABLES'] = HUGE_PAGES
    # Ctrl-C waits for `begin`: until then the interpreter would show a traceback of its own.
    with interrupts_blocked(), contextlib.suppress(OSError):
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def has_nvidia_gpu() -> bool:
    """Whether the system has a device of the NVIDIA driver."""
    import glob  # brings `re`, and `begin` should come early

    return bool(glob.glob('/dev/nvidia[0-9]*'))


def num_cores() -> int:
    """The CPU cores that this process may use; all of the machine's where the system cannot say."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

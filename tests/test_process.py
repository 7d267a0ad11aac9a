"""The process of a command line: Ctrl-C ends it in one line, and no stream can make it fail."""

import contextlib
import io
import os
import signal
import subprocess
import sys

import pytest

from jaxfm import process
from tests.runs import PATIENCE


@pytest.fixture(autouse=True)
def everything_as_before(monkeypatch):
    """Signal handlers, the mask, the hook and what this process knows of interrupts."""
    monkeypatch.setattr(process, '_interrupts', [])
    monkeypatch.setattr(sys, 'unraisablehook', sys.unraisablehook)
    # A shell that starts the tests in the background has Ctrl-C ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    signal.signal(signal.SIGINT, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@pytest.fixture
def exits(monkeypatch):
    """Exit codes of the ends of this process, which it survives."""
    codes = []
    monkeypatch.setattr(os, '_exit', codes.append)
    return codes


@pytest.fixture
def begun(monkeypatch, capfd):
    """A process that has begun a command line."""
    monkeypatch.setattr(process, 'replace_unprintable', lambda: None)  # of pytest's own streams
    process.begin()


# Ctrl-C


def test_ctrl_c_during_start_up_ends_at_once_in_one_line(begun, exits, capfd):
    signal.raise_signal(signal.SIGINT)
    assert exits == [130]
    assert capfd.readouterr() == ('', 'interrupted\n')


def test_once_there_is_something_to_clean_up_ctrl_c_raises_and_a_second_one_ends(
    begun, exits, capfd
):
    process.unwind_on_interrupt()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert process.is_interrupted() and exits == []
    signal.raise_signal(signal.SIGINT)
    assert exits == [130]
    assert process.report_interrupt() == 130  # as `main` does at last
    assert capfd.readouterr().err == 'interrupted\n'


def test_ctrl_c_inside_a_finalizer_ends_the_process_without_a_traceback(begun, exits, capfd):
    class Finalized:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    process.unwind_on_interrupt()
    Finalized()
    assert exits == [130]
    assert capfd.readouterr().err == 'interrupted\n'


def test_at_the_end_ctrl_c_no_longer_raises(begun, exits):
    process.unwind_on_interrupt()
    process.end_on_interrupt()
    signal.raise_signal(signal.SIGINT)
    assert exits == [130]


def test_where_a_command_line_has_not_begun_handlers_stay():
    before = signal.getsignal(signal.SIGINT)
    process.unwind_on_interrupt()
    process.end_on_interrupt()
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_that_the_caller_ignores_stays_ignored(monkeypatch):
    monkeypatch.setattr(process, 'replace_unprintable', lambda: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nohup, or `&` in a script
    process.begin()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_an_interrupt_that_came_while_it_was_blocked_is_not_lost(exits, monkeypatch):
    """As between the start of the interpreter and `begin`, after starting over."""
    monkeypatch.setattr(process, 'replace_unprintable', lambda: None)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # begin installs its handler before it unblocks
    with process.interrupts_blocked():
        signal.raise_signal(signal.SIGINT)
        assert exits == []
        process.begin()
        assert exits == [130]


def test_starting_over_keeps_the_command_line_and_blocks_interrupts(monkeypatch):
    started = []

    def execute(program, arguments):
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        started.append((program, arguments, signal.SIGINT in blocked))

    monkeypatch.setattr(os, 'execv', execute)
    monkeypatch.setattr(sys, 'platform', 'linux')
    monkeypatch.setattr(sys, 'orig_argv', ['python', '-X', 'dev', '-m', 'jaxfm.main', '--a'])
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    monkeypatch.delenv('GLIBC_TUNABLES', raising=False)
    process.use_huge_pages()
    process.use_huge_pages()  # the variable says that it is done
    assert started == [(sys.executable, [sys.executable, *sys.orig_argv[1:]], True)]
    assert 'hugetlb' in os.environ['GLIBC_TUNABLES']
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    del os.environ['GLIBC_TUNABLES']  # monkeypatch would put it back
    monkeypatch.setattr(sys, 'platform', 'darwin')
    process.use_huge_pages()
    assert len(started) == 1


def test_ctrl_c_during_the_imports_of_the_command_line_is_one_line(tmp_path):
    """A real process, held in the first import that is not of the standard library.

    It has the default handler of SIGINT, because this process has one (see the fixture above).
    """
    (tmp_path / 'pydantic').mkdir()
    holds = "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"
    (tmp_path / 'pydantic' / '__init__.py').write_text(holds)
    path = os.pathsep.join([str(tmp_path), os.getcwd()])
    run = subprocess.Popen(
        [sys.executable, '-m', 'jaxfm.main', '--config', 'configs/quickstart.py'],
        env=os.environ | {'PYTHONPATH': path, 'JAX_PLATFORMS': 'cpu'},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout.readline() == 'importing\n'
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=PATIENCE) == ('', 'interrupted\n')
    assert run.returncode == 130


# Streams


@contextlib.contextmanager
def streams(out, error):
    """Replaces stdout and stderr; not a fixture, because pytest sets its own ones before a test."""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        yield


def test_characters_that_a_stream_lacks_are_replaced():
    raw = io.BytesIO(), io.BytesIO()
    with streams(*(io.TextIOWrapper(one, encoding='ascii', line_buffering=True) for one in raw)):
        with pytest.raises(UnicodeEncodeError):
            print('é', flush=True)
        process.replace_unprintable()
        assert process.print_text('é 字 \udcff')
        process.print_line('run ü')
        assert [one.getvalue() for one in raw] == [b'? ? ?\n', b'run ?\n']


@contextlib.contextmanager
def closed_early():
    """stdout and stderr are pipes that nobody reads any more."""
    with contextlib.ExitStack() as stack:
        files = []
        for _ in range(2):
            reader, writer = os.pipe()
            os.close(reader)
            files.append(stack.enter_context(open(writer, 'w', encoding='utf-8')))
        with streams(*files):
            yield


def test_text_that_nobody_reads_is_no_error():
    with closed_early():
        assert not process.print_text('first')
        assert process.print_text('second'), 'it goes to /dev/null from then on'
        process.print_line('to stderr')
        process.flush()


def test_what_is_still_buffered_for_nobody_is_discarded():
    with closed_early():
        sys.stdout.write('not flushed')
        process.flush()
        sys.stdout.flush()


def test_closed_streams_become_dev_null(monkeypatch):
    """Or the next file that is opened would be written to by whoever writes to stderr."""
    opened = []

    def refuse(number):
        opened.append(number)
        raise OSError

    for name in ('stdin', 'stdout', 'stderr'):
        monkeypatch.setattr(sys, name, None)
    with monkeypatch.context() as patch:
        patch.setattr(os, 'fstat', refuse)
        patch.setattr(os, 'open', lambda path, flags: opened.append(path))
        process._open_closed_streams()
    assert opened == [0, os.devnull, 1, os.devnull, 2, os.devnull]
    for name in ('stdout', 'stderr'):
        print('nowhere', file=getattr(sys, name))
    assert sys.stdin.read() == ''
    for name in ('stdin', 'stdout', 'stderr'):
        getattr(sys, name).close()


# The machine


def test_an_unknown_system_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, 'platform', 'win32')
    with pytest.raises(SystemExit, match='^error: jaxfm runs on Linux and macOS; .*WSL$'):
        process.begin()


def test_where_the_system_has_no_affinity_all_cores_count(monkeypatch):
    assert process.num_cores() >= 1
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0, 3}, raising=False)
    assert process.num_cores() == 2
    monkeypatch.delattr(os, 'sched_getaffinity')  # macOS
    monkeypatch.setattr(os, 'cpu_count', lambda: 7)
    assert process.num_cores() == 7

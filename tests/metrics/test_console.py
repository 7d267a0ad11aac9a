"""The console: readable in a log file, live on a terminal, and never on stdout."""

import logging
import os
import pty
import re
import subprocess
import sys

import pytest

from jaxfm.metrics.console import Console, _wrap, format_seconds

log = logging.getLogger('jaxfm')


def record(step, kind='train', **values):
    return {'step': step, 'phase': '', 'time': 0.0, 'kind': kind, **values}


def perf(step):
    values = {'perf/tokens_per_second': 11234.5, 'perf/mfu': 0.4321, 'perf/eta_seconds': 190.0}
    return record(step, 'perf', **values, **{'perf/total_tokens': 5})


@pytest.fixture
def console(tmp_path):
    made = Console(2000, tmp_path / 'run' / 'log.txt')
    yield made
    made.close()


def test_off_a_terminal_each_log_is_one_plain_line(console, capsys, tmp_path):
    console.write(perf(40))
    console.write(record(40, **{'train/loss': 3.21094, 'train/learning_rate': 3e-4}))
    counts = {'eval/held_out/samples/failed': 0.0, 'eval/held_out/cost/flops': 1e9}
    console.write(record(40, 'eval', **counts, **{'eval/held_out/bits_per_byte': 1.75}))
    console.write(record(40, 'event', resumed=True))
    log.warning('a disk is slow')
    out, err = capsys.readouterr()
    assert out == ''
    assert err.splitlines() == [
        'step 40/2000  loss 3.211  lr 0.0003  tokens/s 11.23k  MFU 43.2%  eta 3m10s',
        'step 40/2000  held_out/bits_per_byte 1.75',
        'warning: a disk is slow',
    ]
    lines = (tmp_path / 'run' / 'log.txt').read_text().splitlines()
    assert [re.sub(r'^[\d-]+ [\d:,]+ ', '', line) for line in lines] == [
        f'INFO {err.splitlines()[0]}',
        f'INFO {err.splitlines()[1]}',
        'WARNING a disk is slow',
    ]
    assert all(re.match(r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ', line) for line in lines)


def test_old_perf_does_not_join_a_later_step(console, capsys):
    console.write(perf(40))
    console.write(record(50, **{'train/loss': 3.0}))
    assert capsys.readouterr().err == 'step 50/2000  loss 3\n'


def test_the_summary_is_for_the_screen_and_says_all_of_its_rows(console, capsys, tmp_path):
    console.show_summary([('model', '[red]odd[/red]'), ('work directory', 'w' * 200)])
    out, err = capsys.readouterr()
    assert (out, err) == ('', f'model           [red]odd[/red]\nwork directory  {"w" * 200}\n')
    assert (tmp_path / 'run' / 'log.txt').read_text() == ''


def test_on_a_terminal_the_summary_keeps_its_columns():
    line = 'work directory  a directory, with words, of several lines'
    wrapped = [
        'work directory  a directory,',
        '                with words, of',
        '                several lines',
    ]
    assert _wrap(line, 30, 16).splitlines() == wrapped
    assert _wrap('data  ' + 'w' * 50, 20, 6).splitlines() == ['data', '      ' + 'w' * 50]


def test_tables_are_for_the_log_say_everything_and_take_brackets_for_text(
    console, capsys, tmp_path
):
    console.log_tables(
        {'model': [('parameters', '8.4M'), ('[red]odd[/red]', '[/]')], 'mesh': [('fsdp', 8)]}
    )
    console.log_parameters(
        [
            ('embed', (2048, 256), 'float32', "('fsdp', None)", 'adamw'),
            ('layers.0.q', (256, 256), 'float32', '()', 'adamw, decay'),
            ('layers.1.q', (256, 256), 'float32', '()', 'adamw, decay'),
            ('layers.0.scale', (256,), 'float32', '()', 'adamw'),
        ]
    )
    assert capsys.readouterr() == ('', '')
    logged = (tmp_path / 'run' / 'log.txt').read_text('utf-8')
    assert re.search(r'INFO model$', logged, re.MULTILINE)
    for row in (r'parameters +8\.4M', r'\[red\]odd\[/red\] +\[/\]', r'fsdp +8'):
        assert re.search(row, logged), row
    assert re.search(r'layers\.\*\.q \(2\) +\(256, 256\) +float32 +\(\) +adamw, decay', logged)
    assert re.search(r'layers\.0\.scale +\(256,\)', logged)


def test_numbers_that_are_none_do_not_break_a_line(console, capsys):
    values = {'train/loss': float('nan'), 'a': float('inf'), 'b': None, 'c': True, 'd': 12_345_678}
    console.write(record(1, **values))
    assert capsys.readouterr().err == 'step 1/2000  loss nan  a inf  b None  c True  d 12.35M\n'


def test_the_loss_comes_first_and_what_never_changes_is_left_out(console, capsys):
    usual = {'train/grad_norm': 1.0, 'train/loss': 2.5, 'train/target_tokens': 2048}
    console.write(record(1, **usual, **{'train/skipped_steps': 0}))
    norms = {'train/update_norm/head': 1.0, 'train/param_norm/head': 1.0}
    console.write(record(2, **usual, **{'train/skipped_steps': 3}, **norms))
    assert capsys.readouterr().err.splitlines() == [
        'step 1/2000  loss 2.5  grad_norm 1',
        'step 2/2000  loss 2.5  grad_norm 1  skipped_steps 3',
    ]


def test_a_spike_is_a_warning_when_it_happens(console, capsys):
    values = {'spike/step': 7, 'spike/loss': 9.25, 'spike/limit': 4.5, 'spike/policy': 'skip'}
    console.write(record(7, 'event', **values))
    console.write(record(4, 'event', **values, **{'spike/rewinds': 1}))
    assert capsys.readouterr().err == (
        'warning: the loss of step 7, 9.25, is a spike, above 4.5: its update was skipped\n'
    )


def test_a_line_that_stderr_or_the_log_cannot_show_is_no_error(
    console, capsys, tmp_path, monkeypatch
):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, 'w', encoding='utf-8') as closed_early, monkeypatch.context() as patch:
        patch.setattr('sys.stderr', closed_early)
        log.warning('a path with \udcff')
        console.show_summary([('work directory', 'somewhere')])
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)
    assert capsys.readouterr() == ('', '')
    assert (tmp_path / 'run' / 'log.txt').read_text('utf-8').endswith('a path with \\udcff\n')


def test_other_processes_show_warnings_alone(tmp_path, capsys):
    console = Console(10, tmp_path / 'log.txt', enabled=False)
    log.info('made the model')
    log.warning('slow host')
    console.close()
    assert capsys.readouterr().err == 'warning: slow host\n'
    assert not (tmp_path / 'log.txt').exists()


def test_a_closed_console_leaves_the_logger_as_it_was(tmp_path):
    before = (log.level, list(log.handlers))
    Console(10, tmp_path / 'log.txt').close()
    assert (log.level, list(log.handlers)) == before


def test_a_resumed_run_appends_to_its_log(tmp_path):
    for line in ('first', 'second'):
        console = Console(10, tmp_path / 'log.txt')
        log.info(line)
        console.close()
    assert [line.split()[-1] for line in open_lines(tmp_path / 'log.txt')] == ['first', 'second']


def open_lines(path):
    return path.read_text().splitlines()


@pytest.mark.parametrize(
    ('seconds', 'text'),
    [(0.25, '0.2s'), (42, '42s'), (59.9, '1m00s'), (190, '3m10s'), (7500, '2h05m'), (3e5, '3d11h')],
)
def test_durations_are_short(seconds, text):
    assert format_seconds(seconds) == text


ON_A_TERMINAL = """
import logging, sys
from jaxfm.metrics.console import Console
console = Console(100, sys.argv[1])
console.show_summary([('parameters', '8.4M')])
for step in range(10, 101, 10):
    head = {'step': step, 'phase': '', 'time': 0.0}
    console.write(head | {'kind': 'perf', 'perf/tokens_per_second': 5e4, 'perf/eta_seconds': 9.0})
    console.write(head | {'kind': 'train', 'train/loss': step / 8, 'train/grad_norm': 77.7})
    if step == 50:
        console.write(head | {'kind': 'eval', 'eval/held_out/loss': 2.5})
        logging.getLogger('jaxfm').info('checkpoint saved')
    if step == 60:
        print('generated text')
console.close()
"""


def read_terminal(descriptor):
    shown = b''
    while True:
        try:
            part = os.read(descriptor, 65536)
        except OSError:  # the other end is closed
            return shown.decode()
        if not part:
            return shown.decode()
        shown += part


@pytest.mark.parametrize(
    'columns, encoding',
    [(120, 'utf-8'), (80, 'ascii'), (40, 'utf-8')],
    ids=['wide', 'ascii and no colour', 'narrow'],
)
def test_on_a_terminal_a_bar_shows_the_step_and_stdout_stays_clean(tmp_path, columns, encoding):
    mine, theirs = pty.openpty()
    environment = os.environ | {
        **{'TERM': 'xterm', 'COLUMNS': str(columns), 'PYTHONIOENCODING': encoding},
        **({} if encoding == 'utf-8' else {'NO_COLOR': '1'}),
    }
    process = subprocess.Popen(
        [sys.executable, '-c', ON_A_TERMINAL, str(tmp_path / 'log.txt')],
        stderr=theirs,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    os.close(theirs)
    shown = read_terminal(mine)
    os.close(mine)
    assert process.communicate(timeout=30)[0] == 'generated text\n'
    assert process.returncode == 0, shown
    plain = re.sub(r'\x1b\[[\d;?]*[A-Za-z]', '', shown)
    assert max(map(len, re.split(r'[\r\n]', plain))) <= columns
    # A process that is killed could not bring the cursor back.
    assert shown.index('\x1b[?25h') < shown.index('10/100'), 'the cursor is hidden'
    if encoding == 'ascii':
        assert not re.search(r'\x1b\[[\d;]*3\dm', shown), 'NO_COLOR is set'
    parts = ['100/100', 'loss 12.5']
    if columns >= 80:
        parts += ['━' if encoding == 'utf-8' else '-', 'tokens/s 50k', 'eta 9.0s']
    for part in parts:
        assert part in plain, part
    assert 'grad_norm' not in plain
    for once in ('checkpoint saved', 'held_out/loss 2.5', '8.4M'):
        assert plain.count(once) == 1, once
    logged = open_lines(tmp_path / 'log.txt')
    assert sum('grad_norm 77.7' in line for line in logged) == 10
    assert any('checkpoint saved' in line for line in logged)


def test_a_log_that_cannot_be_opened_is_told_in_a_line_and_stops_nothing(tmp_path, capsys):
    (tmp_path / 'log.txt').mkdir()
    (tmp_path / 'file').write_text('')
    for path, reason in ((tmp_path / 'log.txt', 'Is a directory'), (tmp_path / 'file/log.txt', '')):
        console = Console(2000)
        console.log_to(path)
        console.write(record(40, **{'train/loss': 3.0}))
        console.close()
        warning, line = capsys.readouterr().err.splitlines()
        assert warning.startswith(f'warning: {path} cannot be written, lines are lost: [Errno ')
        assert reason in warning and line == 'step 40/2000  loss 3'


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='there is no /dev/full')
def test_a_full_disk_costs_lines_of_the_log_and_is_said_once(tmp_path, capsys):
    full = tmp_path / 'log.txt'
    full.symlink_to('/dev/full')
    console = Console(2000, full)
    for step in (40, 50):
        console.write(record(step, **{'train/loss': 3.0}))
    console.close()
    assert capsys.readouterr().err.splitlines() == [
        'step 40/2000  loss 3',
        f'warning: {full} cannot be written, lines are lost: [Errno 28] No space left on device',
        'step 50/2000  loss 3',
    ]

"""The console: readable in a log file, live on a terminal, and never on stdout."""

import logging
import os
import pty
import re
import subprocess
import sys

import pytest

from jaxfm.metrics.console import Console, format_seconds

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
    console.write(record(40, 'eval', **{'eval/held_out/bits_per_byte': 1.75}))
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


def test_tables_say_everything_and_take_brackets_for_text(console, capsys, tmp_path):
    console.show_tables(
        {'model': [('parameters', '8.4M'), ('[red]odd[/red]', '[/]')], 'mesh': [('fsdp', 8)]}
    )
    console.show_parameters(
        [
            ('embed', (2048, 256), 'float32', "('fsdp', None)", 'adamw'),
            ('layers.0.q', (256, 256), 'float32', '()', 'adamw, decay'),
            ('layers.1.q', (256, 256), 'float32', '()', 'adamw, decay'),
            ('layers.0.scale', (256,), 'float32', '()', 'adamw'),
        ]
    )
    out, err = capsys.readouterr()
    assert out == ''
    assert re.search(r'^model$', err, re.MULTILINE)
    for row in (r'parameters +8\.4M', r'\[red\]odd\[/red\] +\[/\]', r'fsdp +8'):
        assert re.search(row, err), row
    assert re.search(r'layers\.\*\.q \(2\) +\(256, 256\) +float32 +\(\) +adamw, decay', err)
    assert re.search(r'layers\.0\.scale +\(256,\)', err)
    logged = (tmp_path / 'run' / 'log.txt').read_text()
    assert '8.4M' in logged and 'layers.*.q (2)' in logged


def test_numbers_that_are_none_do_not_break_a_line(console, capsys):
    values = {'train/loss': float('nan'), 'a': float('inf'), 'b': None, 'c': True, 'd': 12_345_678}
    console.write(record(1, **values))
    assert capsys.readouterr().err == 'step 1/2000  loss nan  a inf  b None  c True  d 12.35M\n'


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
console.show_tables({'model': [('parameters', '8.4M')]})
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


def test_on_a_terminal_a_bar_shows_the_step_and_stdout_stays_clean(tmp_path):
    mine, theirs = pty.openpty()
    environment = os.environ | {'TERM': 'xterm', 'COLUMNS': '120'}
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
    for part in ('100/100', '━', 'loss 12.5', 'tokens/s 50k', 'eta 9.0s'):
        assert part in plain, part
    assert 'grad_norm' not in plain
    for once in ('checkpoint saved', 'held_out/loss 2.5', '8.4M'):
        assert plain.count(once) == 1, once
    logged = open_lines(tmp_path / 'log.txt')
    assert sum('grad_norm 77.7' in line for line in logged) == 10
    assert any('checkpoint saved' in line for line in logged)

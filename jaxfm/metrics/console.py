"""What a run shows: a summary at the start, progress, and a line for each train and eval record.

stderr gets the summary and the progress, as a live bar on a terminal and as plain lines elsewhere.
log.txt gets every line, and tables that are too long for a screen. stdout is reserved for generated
text.
"""

import contextlib
import io
import logging
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console as RichConsole
from rich.console import Group
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

from jaxfm import process
from jaxfm.metrics import is_detail

log = logging.getLogger('jaxfm')

_LOG_WIDTH = 110  # columns of the tables in log.txt
_ALREADY_SHOWN = {'shown': True}  # `extra` of log lines that the screen must not show again


class Console:
    """Summary, log lines and progress; a sink for a Recorder.

    total_steps: of the run, for the bar. log_path: as for `log_to`.
    enabled: False on all processes except the first; these show only warnings.
    Always close it, or the terminal keeps a dead bar.
    """

    def __init__(
        self, total_steps: int = 0, log_path: str | Path | None = None, enabled: bool = True
    ):
        self._total_steps, self._enabled = total_steps, enabled
        self._console = RichConsole(stderr=True, highlight=False)
        self._live = enabled and self._console.is_terminal and not self._console.is_dumb_terminal
        self._perf: Mapping[str, Any] = {}
        self._progress: Progress | None = None
        self._task = None
        self._handlers = [_ScreenHandler(self._console, self._live)]
        self._level, self._propagate = log.level, log.propagate
        log.propagate = False  # libraries add handlers to the root logger, which would repeat lines
        log.setLevel(logging.INFO if enabled else logging.WARNING)
        for handler in self._handlers:
            log.addHandler(handler)
        if log_path is not None:
            self.log_to(log_path)

    def log_to(self, path: str | Path) -> None:
        """Also appends all further lines to a file, with time stamps; does nothing if disabled."""
        if not self._enabled:
            return
        try:
            handler = _file_handler(Path(path))
        except OSError as error:
            _warn_of_lost_lines(path, error)
            return
        self._handlers.append(handler)
        log.addHandler(handler)

    def show_summary(self, rows: Iterable[tuple[str, str]]) -> None:
        """Prints the summary of the run, [(name, value), ...], to the screen but not to log.txt."""
        rows = list(rows)
        indent = max(len(name) for name, _ in rows) + 2
        # A terminal would break lines inside words; in a file, unbroken lines are easier to search.
        width = max(self._console.width, 2 * indent) if self._console.is_terminal else None
        for name, value in rows if self._enabled else ():
            line = f'{name:<{indent}}{value}'
            process.print_line(_wrap(line, width, indent) if width else line)

    def log_tables(self, sections: Mapping[str, Iterable[tuple[str, Any]]]) -> None:
        """Writes the full description of the run, {title: [(name, value), ...]}, to log.txt."""
        _log_plain(Group(*(_section(title, rows) for title, rows in sections.items())))

    def log_parameters(self, rows: Iterable[tuple[str, Any, Any, Any, str]]) -> None:
        """Writes a table of (name, shape, dtype, sharding, optimizer rule) to log.txt.

        Parameters that differ only in the numbers in their names share a line.
        """
        table = Table(box=SIMPLE, title='parameters', title_justify='left', pad_edge=False)
        for column in ('name', 'shape', 'dtype', 'sharding', 'optimizer'):
            table.add_column(column, overflow='fold')
        for row in _condense(rows):
            table.add_row(*map(Text, row))
        _log_plain(table)

    def write(self, record: Mapping[str, Any]) -> None:
        """Shows a train or eval record as a line; on a terminal, training moves the bar instead.

        A perf record is merged into the train record of the same step. Of the events, only spikes
        are shown, when they happen.
        """
        if record['kind'] == 'perf':
            self._perf = record
        elif record['kind'] == 'train':
            if self._perf.get('step') == record['step']:
                record = record | {k: v for k, v in self._perf.items() if k in _SHOWN_PERF}
            line = format_record(record, self._total_steps)
            log.info('%s', line, extra=_ALREADY_SHOWN if self._live else None)
            if self._live:
                self._advance(record)
        elif 'spike/loss' in record and 'spike/rewinds' not in record:
            log.warning('%s', _describe_spike(record))
        elif record['kind'] == 'eval':
            log.info('%s', format_record(record, self._total_steps))

    def stop_bar(self) -> None:
        """Leaves the bar as it is; further output goes below it."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def close(self) -> None:
        """Stops the bar and restores the logger."""
        self.stop_bar()
        for handler in self._handlers:
            log.removeHandler(handler)
            handler.close()
        log.setLevel(self._level)
        log.propagate = self._propagate

    def _advance(self, record: Mapping[str, Any]) -> None:
        if self._progress is None:
            self._start_bar()
        step = f'{record["step"]}/{self._total_steps}'
        # As Text, so that a metric called "[x]" is not read as markup.
        values = Text(_values({k: v for k, v in record.items() if k in _ON_BAR})).markup
        self._progress.update(self._task, completed=record['step'], step=step, values=values)
        self._progress.refresh()

    def _start_bar(self) -> None:
        # No thread repaints the bar: it moves when a record arrives.
        self._progress = Progress(
            TextColumn('{task.fields[step]}', table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn('{task.fields[values]}', table_column=Column(no_wrap=True)),
            console=self._console,
            auto_refresh=False,
            expand=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._progress.start()
        self._console.show_cursor(True)  # if the process is killed, it stays visible
        self._task = self._progress.add_task('', total=self._total_steps, step='', values='')


def format_record(record: Mapping[str, Any], total_steps: int) -> str:
    """Formats a record as one line, like `step 40/2000  loss 3.211  tokens/s 11.2k  eta 3m10s`.

    metrics.jsonl has all values; the line leaves out those that hardly ever change.
    """
    step = f'step {record["step"]}' + (f'/{total_steps}' if total_steps else '')
    return f'{step}  {_values(record)}'.rstrip()


def format_seconds(seconds: float) -> str:
    """A duration in its two largest units: 4.2s, 3m10s, 2h05m, 3d04h."""
    if seconds < 59.5:
        return f'{seconds:.1f}s' if seconds < 10 else f'{seconds:.0f}s'
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f'{minutes}m{rest:02d}s'
    hours, minutes = divmod(minutes, 60)
    return f'{hours}h{minutes:02d}m' if hours < 48 else f'{hours // 24}d{hours % 24:02d}h'


_HEAD = ('step', 'phase', 'time', 'kind')
_SPEED = ('perf/tokens_per_second', 'perf/mfu', 'perf/eta_seconds')
_REWARD = ('rollout/reward', 'rollout/reward_low', 'rollout/reward_high')
_SHOWN_PERF = (*_REWARD, 'rollout/length', 'rollout/truncated', 'rollout/failed', *_SPEED)
_IF_ANY = (
    *('train/skipped_steps', 'train/spikes', 'train/clip_fraction'),
    *('rollout/truncated', 'rollout/failed'),
)
# Only in metrics.jsonl and the report.
_DETAILS = ('train/update_norm/', 'train/param_norm/', 'train/ratio', 'train/sampler_kl')
_FIRST = ('rollout/reward', 'train/loss')  # also on a screen too narrow for the rest
_ON_BAR = ('rollout/reward', 'train/loss', *_SPEED)
# Metrics with a shorter name in the line; all others only lose the prefix `train/` or `eval/`.
_SHORT = {
    'perf/tokens_per_second': 'tokens/s',
    'perf/mfu': 'MFU',
    'perf/eta_seconds': 'eta',
    'train/learning_rate': 'lr',
    'train/entropy_estimate': 'entropy',
}


def _values(record: Mapping[str, Any]) -> str:
    hidden = {f'{name}{end}' for name in record for end in ('_low', '_high')}
    hidden |= {n for n in record if n.startswith(_DETAILS) or is_detail(n)}
    hidden |= {*_HEAD, 'train/target_tokens', *(name for name in _IF_ANY if not record.get(name))}
    first = [name for name in _FIRST if name in record]
    names = [*first, *(name for name in record if name not in hidden and name not in first)]
    named = [(name, record[name]) for name in names]
    return '  '.join(f'{_short(k)} {_value(k, v)}{_interval(k, record)}' for k, v in named)


def _describe_spike(record: Mapping[str, Any]) -> str:
    done = {
        'warn': 'its update was applied',
        'skip': 'its update was skipped',
        'rewind': 'the run goes back',
    }
    return (
        f'the loss of step {record["spike/step"]}, {record["spike/loss"]:.4g}, is a spike, above '
        f'{record["spike/limit"]:.4g}: {done[record["spike/policy"]]}'
    )


def _interval(name: str, record: Mapping[str, Any]) -> str:
    low, high = (record.get(f'{name}{end}') for end in ('_low', '_high'))
    return '' if low is None or high is None else f' ({low:.3g} to {high:.3g})'


def _short(name: str) -> str:
    return _SHORT.get(name) or re.sub(r'^(train|eval|rollout)/', '', name)


def _value(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if name == 'perf/eta_seconds':
        return format_seconds(value)
    if name == 'perf/mfu':
        return f'{value:.1%}'
    for size, letter in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e4, 'k')):
        if abs(value) >= size and value == value and abs(value) != float('inf'):
            return f'{value / (1e3 if letter == "k" else size):.4g}{letter}'
    return f'{value:.4g}' if isinstance(value, float) else str(value)


def _section(title: str, rows: Iterable[tuple[str, Any]]) -> Table:
    table = Table(box=None, title=Text(title), title_justify='left', show_header=False, padding=0)
    table.add_column(width=24)
    table.add_column(overflow='fold')
    for name, value in rows:
        table.add_row(Text(f'  {name}'), Text(str(value)))
    return table


def _condense(rows: Iterable[tuple]) -> list[tuple[str, ...]]:
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, *rest in rows:
        key = (re.sub(r'\d+', '*', name), *map(str, rest))
        groups.setdefault(key, []).append(name)
    return [
        (names[0] if len(names) == 1 else f'{key[0]} ({len(names)})', *key[1:])
        for key, names in groups.items()
    ]


def _wrap(line: str, width: int, indent: int) -> str:
    return textwrap.fill(
        line,
        width,
        subsequent_indent=' ' * indent,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )


def _log_plain(renderable) -> None:
    """Renders as plain text, for log.txt only."""
    plain = RichConsole(file=io.StringIO(), width=_LOG_WIDTH, color_system=None)
    plain.print(renderable)
    lines = [line.rstrip() for line in plain.file.getvalue().rstrip().splitlines()]
    log.info('%s', '\n'.join(lines), extra=_ALREADY_SHOWN)


class _ScreenHandler(logging.Handler):
    """Writes log lines to stderr, above the bar if there is one."""

    def __init__(self, console: RichConsole, live: bool):
        super().__init__()
        self._console, self._live = console, live

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, 'shown', False):
            return
        level = '' if record.levelno < logging.WARNING else f'{record.levelname.lower()}: '
        line = level + self.format(record)
        try:
            if self._live:
                style = 'yellow' if level else None
                self._console.print(Text(line, style=style or ''), soft_wrap=True)
            else:
                print(line, file=sys.stderr, flush=True)
        except OSError:  # the reader of stderr has gone
            pass
        except Exception:
            self.handleError(record)


class _LogFile(logging.FileHandler):
    """A log file that may lose lines, for example on a full disk, but never stops the run."""

    def __init__(self, path: Path):
        # Paths may contain bytes that are not UTF-8.
        super().__init__(path, encoding='utf-8', errors='backslashreplace')
        self._warned = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Says once why lines are lost, where logging would print a traceback for each."""
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._warned:
            self._warned = True
            _warn_of_lost_lines(self.baseFilename, error)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written is still in the buffer
            super().close()


def _warn_of_lost_lines(path: str | Path, error: OSError) -> None:
    process.print_line(f'warning: {path} cannot be written, lines are lost: {error}')


def _file_handler(path: Path) -> logging.Handler:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(path)
    handler.setFormatter(logging.Formatter('%(asctime)s %(levelname)s %(message)s'))
    return handler

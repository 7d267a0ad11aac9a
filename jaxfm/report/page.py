"""Writes report.html and plots/*.png of a run, using only config.json and metrics.jsonl.

The page embeds its pictures and loads nothing from the network. It shows whatever has been recorded
so far, so a run that has just started, or has crashed, has a report too.
"""

import base64
import html
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxfm.errors import listed
from jaxfm.metrics import goodput
from jaxfm.metrics.console import format_seconds
from jaxfm.metrics.writers import read_records
from jaxfm.report.plots import draw_plots
from jaxfm.report.series import (
    BOUNDS,
    CONTAMINATION,
    Series,
    collect_data,
    collect_series,
    count_skipped,
    find_spikes,
    is_bound,
    last_account,
    read_config,
)

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { text-align: left; padding: .2rem 1.2rem .2rem 0; border-bottom: 1px solid #ddd }
img { max-width: 100% } pre { background: #f6f6f6; padding: 1rem; overflow: auto }
"""


def write_report(workdir: str | Path) -> Path:
    """Writes the report of a run into its work directory -> the path of the page."""
    workdir = Path(workdir)
    records = list(read_records(workdir / 'metrics.jsonl'))
    series, data = collect_series(records), collect_data(records)
    config = read_config(workdir / 'config.json')
    pictures = draw_plots(series, data, config, workdir / 'plots')
    page = _page(workdir.absolute().name, series, data, config, pictures)
    path = workdir / 'report.html'
    # The name of the run may hold bytes that are not UTF-8.
    path.write_text(page, encoding='utf-8', errors='replace')
    return path


def _page(name: str, series: Series, data: dict, config: Any, pictures: list[Path]) -> str:
    title = html.escape(name)
    images = {picture.stem: _image(picture) for picture in pictures}
    goodput_picture = images.pop('goodput', '')
    missing = 'config.json is missing or damaged'
    given = html.escape(json.dumps(config, indent=2, ensure_ascii=False)) if config else missing
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<style>{_STYLE}</style></head><body><h1>{title}</h1>'
        f'<h2>Run</h2>{_table(("", ""), _run_rows(series, config))}'
        f'<h2>Evaluation</h2>{_table(("metric", "last", "first"), _eval_rows(series))}'
        f'{"".join(images.values())}{_goodput_section(series, config, goodput_picture)}'
        f'{_data_tables(data)}'
        f'<h2>Config</h2><pre>{given}</pre></body></html>\n'
    )


def _data_tables(data: dict[str, dict[str, Any]]) -> str:
    """A table of data statistics for each phase, with one column per source."""
    tables = []
    for phase, values in data.items():
        title = f'Data of {html.escape(phase)}' if phase else 'Data'
        tables.append(f'<h2>{title}</h2>{_by_source(values, "source")}')
        found = {
            name.removeprefix(CONTAMINATION): value
            for name, value in values.items()
            if name.startswith(CONTAMINATION)
        }
        if found:
            tables.append(f'<h3>Contamination</h3>{_by_source(found, "evaluator")}')
    return ''.join(tables)


def _by_source(values: Mapping[str, Any], what: str) -> str:
    """A table of {'<column>/<name>': value}. what: what the columns are, such as 'source'."""
    rows: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if '_length_histogram/' not in name and not name.startswith(CONTAMINATION):
            source, _, statistic = name.rpartition('/')
            rows.setdefault(statistic, {})[source] = value
    sources = list(dict.fromkeys(source for row in rows.values() for source in row))
    cells = [(name, *(_cell(row.get(source)) for source in sources)) for name, row in rows.items()]
    return _table((what if any(sources) else '', *sources), cells)


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return f'{value:,}'
    return _number(value) if isinstance(value, float) else str(value or '')[:32]


def _run_rows(series: Series, config: Any) -> list[tuple[str, ...]]:
    rows = []
    steps = [points[-1][0] for points in series.values()]
    total = _total_steps(config) if isinstance(config, dict) else None
    if steps:
        rows.append(('steps', f'{max(steps)}' + (f' of {total}' if total is not None else '')))
    for name in sorted(series):
        if name.startswith('train/') and 'loss' in name:
            rows.append((name, _number(series[name][-1][1])))
    rows += _trouble_rows(series)
    rows += _speed_rows(series)
    return rows


def _trouble_rows(series: Series) -> list[tuple[str, ...]]:
    """How many steps were skipped, and which losses were spikes; [] if there was nothing."""
    rows = []
    if skipped := count_skipped(series):
        rows.append(('skipped steps', f'{skipped}'))
    if spikes := find_spikes(series):
        told = listed([f'{_number(loss)} at step {step}' for step, loss in spikes])
        rows.append(('loss spikes', f'{len(spikes)}: {told}'))
    if 'spike/rewinds' in series:
        rows.append(('went back', listed([f'to step {at}' for at, _ in series['spike/rewinds']])))
    return rows


def _total_steps(config: dict) -> int | None:
    phases = config.get('phases')
    return sum(phase['steps'] for phase in phases) if phases else config.get('steps')


def _speed_rows(series: Series) -> list[tuple[str, ...]]:
    rows = []
    for name, label in (('perf/tokens_per_second', 'tokens/s'), ('perf/mfu', 'MFU')):
        if name in series:
            values = sorted(value for _, value in series[name])
            rows.append((f'{label} (median)', _number(values[len(values) // 2])))
    if 'perf/total_tokens' in series:
        rows.append(('training tokens', f'{series["perf/total_tokens"][-1][1]:,.0f}'))
    if 'perf/elapsed_seconds' in series:
        rows.append(('elapsed time', format_seconds(series['perf/elapsed_seconds'][-1][1])))
    return rows


def _eval_rows(series: Series) -> list[tuple[str, ...]]:
    names = [
        name for name in sorted(series) if name.startswith('eval/') and not is_bound(name, series)
    ]
    return [(name, _score(name, series, -1), _score(name, series, 0)) for name in names]


def _goodput_section(series: Series, config: Any, picture: str) -> str:
    """Where the run's time went, and the recommended checkpoint interval; '' without records."""
    account = last_account(series)
    elapsed = sum(account.values())
    if not elapsed:
        return ''
    rows = [
        (bucket, format_seconds(seconds), f'{seconds / elapsed:.1%}')
        for bucket, seconds in account.items()
    ]
    tables = _table(('bucket', 'time', 'share'), rows)
    if advice := _checkpoint_rows(series, config):
        tables += _table(('', ''), advice)
    return f'<h2>Where the time went</h2>{tables}{picture}'


def _checkpoint_rows(series: Series, config: Any) -> list[tuple[str, ...]]:
    """The recommended checkpoint.every; [] unless saves and steps have been measured."""
    measured = ('checkpoint/blocking_seconds', 'checkpoint/save_seconds', 'perf/step_seconds')
    failures = _value(config, 'metrics', 'failures_per_day')
    if not failures or not all(name in series for name in measured):
        return []
    blocks, takes, step = (statistics.median(v for _, v in series[name]) for name in measured)
    steps = goodput.checkpoint_every(blocks, takes, step, failures)
    now = _value(config, 'checkpoint', 'every') or '0 (saves only at the end)'
    text = (
        f'{steps} steps ({format_seconds(steps * step)}) for {failures:g} '
        f'failure{"" if failures == 1 else "s"} per day; a save blocks training for '
        f'{format_seconds(blocks)} and takes {format_seconds(takes)}; current value: {now}'
    )
    return [('recommended checkpoint.every', text)]


def _value(config: Any, group: str, name: str) -> Any:
    """The config value at group.name; None if it, or the config, does not exist."""
    found = config.get(group) if isinstance(config, dict) else None
    return found.get(name) if isinstance(found, dict) else None


def _score(name: str, series: Series, which: int) -> str:
    """One value with its interval and step. which: 0 is the first record, -1 the last."""
    step, value = series[name][which]
    low, high = (dict(series.get(name + end, ())).get(step) for end in BOUNDS)
    text = _number(value)
    if low is not None and high is not None:
        text += f' ({_number(low)} to {_number(high)})'
    return f'{text} at step {step}'


def _number(value: float) -> str:
    return f'{value:.4g}' if abs(value) < 1e4 else f'{value:,.0f}'


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return '<p>nothing recorded yet</p>'
    lines = [''.join(f'<th>{html.escape(cell)}</th>' for cell in head)]
    lines += [''.join(f'<td>{html.escape(cell)}</td>' for cell in row) for row in rows]
    return '<table>' + ''.join(f'<tr>{line}</tr>' for line in lines) + '</table>'


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}"></p>'

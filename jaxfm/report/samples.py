"""Draws the score on a task against samples and against tokens, of all its evaluators.

Evaluators of one task share their axes, so that what costs the same is compared: the curves of
several samples, greedy decoding as a level, and each strategy of test-time compute as a point.
"""

import dataclasses
import json
import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxfm.report.series import BOUNDS, Series

# Of k samples of a question; `jaxfm/evals/statistics.py` says how each is estimated.
_CURVES = {
    'pass@': 'any is right (oracle)',
    'best@': 'the likeliest (best of n)',
    'maj@': 'their vote',
    'pass^': 'all are right',
}
_NAME = re.compile(r'eval/(.+)/(pass@|best@|maj@|pass\^)(\d+)')
_MARKERS = 'sD^vP*Xp<>'
_MOST_TICKS = 8  # labels of ticks that fit below a panel
_LEGEND = 150  # letters that fit below two panels


class Point(NamedTuple):
    """A score, the ends of its interval, and what a question takes on average."""

    samples: float
    tokens: float  # generated; 0 if they were not recorded
    score: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Line:
    """One entry of a legend."""

    label: str
    form: Literal['curve', 'level', 'point']
    points: list[Point]  # by samples; a level and a point have one


def is_of_samples(name: str) -> bool:
    """Whether a series belongs to these curves, so that it needs no plot of its own."""
    found = _NAME.fullmatch(name)
    return found is not None and int(found[3]) > 1


def find_panels(series: Series, config: Any) -> dict[str, list[Line]]:
    """{title: its lines} at the last step of each evaluator; nothing for a score that is alone.

    config: of the run; None if it is missing. Evaluators that it does not have share no panel.
    """
    tasks: dict[str, dict[str, dict]] = {}
    for name in _evaluators(series):
        group = _group(config, name)
        # A task on held-out documents has those of a phase.
        subject = [group['task'], group.get('phase')] if group else name
        tasks.setdefault(json.dumps(subject, sort_keys=True), {})[name] = group
    panels = {}
    for groups in tasks.values():
        found = [(name, line) for name in groups for line in _lines(name, groups[name], series)]
        if len(found) > 1 or any(line.form == 'curve' for _, line in found):
            panels[_title(groups)] = _tell_apart(found)
    return panels


def _evaluators(series: Series) -> list[str]:
    """Those with samples that are judged."""
    matches = filter(None, map(_NAME.fullmatch, series))
    return [match[1] for match in matches if match[2] + match[3] == 'pass@1']


def _group(config: Any, name: str) -> dict:
    """The config of an evaluator that generates; {} if it is not there, or of another kind."""
    evals = config.get('evals') if isinstance(config, dict) else None
    group = evals.get(name) if isinstance(evals, dict) else None
    is_known = isinstance(group, dict) and group.get('name') == 'generate'
    return group if is_known and isinstance(group.get('task'), dict) else {}


def _title(groups: dict[str, dict]) -> str:
    names = ', '.join(groups)
    task = next(iter(groups.values())).get('task')
    return f'{task.get("name")}: {names}' if task else names


def _lines(name: str, group: dict, series: Series) -> Iterator[Line]:
    """What there is of one evaluator."""
    counts = {curve: _counts(name, curve, series) for curve in _CURVES}
    n = max(max(each, default=1) for each in counts.values())
    tokens = _tokens_of_a_question(name, series)
    # One sample is right, the likeliest, and a vote of its own.
    first = Point(1, tokens / n, *_last(series, f'eval/{name}/pass@1'))
    for curve, label in _CURVES.items():
        if counts[curve]:
            rest = [
                Point(k, k * tokens / n, *_last(series, f'eval/{name}/{curve}{k}'))
                for k in counts[curve]
            ]
            yield Line(label, 'curve', [first, *rest])
    strategy, samples = group.get('strategy'), series.get(f'eval/{name}/strategy/samples')
    if strategy and samples:
        point = first._replace(samples=samples[-1][1])
        yield Line(f'{name}: {strategy["name"]}', 'point', [point])
    elif not strategy and group.get('n') == 1 and group.get('temperature') == 0:
        yield Line('greedy', 'level', [first])


def _counts(name: str, curve: str, series: Series) -> list[int]:
    """The numbers of samples, from 2 on, for which a curve has a score."""
    matches = filter(None, map(_NAME.fullmatch, series))
    found = (int(match[3]) for match in matches if match[1] == name and match[2] == curve)
    return sorted(k for k in found if k > 1)


def _tokens_of_a_question(name: str, series: Series) -> float:
    """Generated tokens of all samples of a question, on average; 0 if they were not recorded."""
    both = [series.get(f'eval/{name}/{which}') for which in ('cost/generated_tokens', 'prompts')]
    if not all(both):
        return 0.0
    tokens, prompts = (points[-1][1] for points in both)
    return tokens / prompts


def _last(series: Series, name: str) -> tuple[float, float, float]:
    """The last value of a series, and the ends of its interval."""
    value = series[name][-1][1]
    low, high = (series[name + end][-1][1] if name + end in series else value for end in BOUNDS)
    return value, low, high


def _tell_apart(found: list[tuple[str, Line]]) -> list[Line]:
    """The lines; where several evaluators have the same, their labels say whose."""
    counts = Counter(line.label for _, line in found)
    return [
        line
        if counts[line.label] == 1
        else dataclasses.replace(line, label=f'{name}: {line.label}')
        for name, line in found
    ]


def plot_samples(panels: dict[str, list[Line]], path: Path) -> Path:
    """Two panels for each task: score against samples and against generated tokens.

    panels: as from `find_panels`.
    """
    from matplotlib.figure import Figure

    columns = [_columns(lines) for lines in panels.values()]
    heights = [
        3.2 + 0.2 * math.ceil(len(lines) / count) for lines, count in zip(panels.values(), columns)
    ]
    figure = Figure(figsize=(11, sum(heights)), dpi=90, layout='constrained')
    parts = figure.subfigures(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (title, lines), ncols in zip(parts, panels.items(), columns):
        # The title of a figure is cut at its edge.
        part.suptitle(textwrap.fill(title, 110), fontsize=10, parse_math=False)
        left, right = part.subplots(1, 2, sharey=True)
        _draw(left, lines, 'samples')
        _draw(right, lines, 'tokens')
        left.set(xlabel='samples of a question', ylabel='score')
        right.set(xlabel='generated tokens of a question')
        handles, labels = left.get_legend_handles_labels()
        part.legend(handles, labels, loc='outside lower center', ncols=ncols, fontsize=8)
    figure.savefig(path)
    return path


def _columns(lines: list[Line]) -> int:
    """Columns of a legend."""
    widest = max(len(line.label) for line in lines) + 6
    return max(1, min(len(lines), _LEGEND // widest))


def _draw(axes, lines: list[Line], scale: str) -> None:
    """scale: the field of a point that is its place, 'samples' or 'tokens'."""
    at = [x for line in lines for point in line.points if (x := getattr(point, scale)) > 0]
    if not at:
        axes.set_visible(False)
        return
    axes.set_xscale('log', base=2)
    # An octave at least, so that it has a power of two.
    ends = min(at) / 2**0.5, max(at) * 2**0.5
    axes.set_xlim(ends)
    for number, line in enumerate(lines):
        points = [point for point in line.points if getattr(point, scale) > 0]
        x = [getattr(point, scale) for point in points]
        look = {'color': f'C{number}', 'label': line.label}  # the same in both panels
        if line.form == 'curve':
            _draw_curve(axes, x, points, marker='.', **look)
            continue
        if line.form == 'level' and points:
            # One greedy sample is all that there is: more samples would be no better.
            start = ends[0] if scale == 'samples' else x[0]
            _draw_curve(axes, [start, ends[1]], points * 2, linestyle='--', **look)
            look.pop('label')
        if line.form == 'point' or scale == 'tokens':
            _draw_errors(axes, x, points, marker=_MARKERS[number % len(_MARKERS)], **look)
    powers = range(math.ceil(math.log2(ends[0])), math.floor(math.log2(ends[1])) + 1)
    ticks = [2.0**power for power in powers[:: -(-len(powers) // _MOST_TICKS)]]
    axes.set_xticks(ticks, [f'{x:,g}' for x in ticks])
    axes.grid(alpha=0.3)


def _draw_curve(axes, x: list[float], points: list[Point], **look) -> None:
    axes.plot(x, [point.score for point in points], **look)
    low, high = ([getattr(point, end) for point in points] for end in ('low', 'high'))
    axes.fill_between(x, low, high, alpha=0.12, color=look['color'], linewidth=0)


def _draw_errors(axes, x: list[float], points: list[Point], **look) -> None:
    scores = [point.score for point in points]
    errors = [(point.score - point.low, point.high - point.score) for point in points]
    axes.errorbar(x, scores, list(zip(*errors)) or None, linestyle='', capsize=3, **look)

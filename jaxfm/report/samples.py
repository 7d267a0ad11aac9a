"""Draws the accuracy of an evaluator with several samples, against samples and against tokens."""

import re
from pathlib import Path

from jaxfm.report.series import BOUNDS, Series

# Of k samples of a question; `jaxfm/evals/statistics.py` says how each is estimated.
_CURVES = {
    'pass@': 'any is right (oracle)',
    'best@': 'the likeliest',
    'maj@': 'their vote',
    'pass^': 'all are right',
}
_NAME = re.compile(r'(eval/.+)/(pass@|best@|maj@|pass\^)(\d+)')

Point = tuple[int, float, float, float]  # samples, score, the ends of its interval


def is_of_samples(name: str) -> bool:
    """Whether a series belongs to these curves, so that it needs no plot of its own."""
    found = _NAME.fullmatch(name)
    return found is not None and int(found[3]) > 1


def find_curves(series: Series) -> dict[str, dict[str, list[Point]]]:
    """{evaluator: {curve: its points}} at the last step of each evaluator with several samples."""
    found: dict[str, dict[str, list[Point]]] = {}
    for name in series:
        match = _NAME.fullmatch(name)
        if match and match[2] in _CURVES and is_of_samples(name):
            points = found.setdefault(match[1], {}).setdefault(match[2], [])
            points.append((int(match[3]), *_last(series, name)))
    for evaluator, curves in found.items():
        for points in curves.values():
            points.append((1, *_last(series, f'{evaluator}/pass@1')))
            points.sort()
    return found


def _last(series: Series, name: str) -> tuple[float, float, float]:
    """The last value of a series, and the ends of its interval."""
    value = series[name][-1][1]
    low, high = (series[name + end][-1][1] if name + end in series else value for end in BOUNDS)
    return value, low, high


def tokens_of_a_sample(series: Series, evaluator: str) -> float | None:
    """Generated tokens of a sample, on average; None if they were not recorded."""
    names = [f'{evaluator}/cost/generated_tokens', f'{evaluator}/prompts']
    if not all(name in series for name in names):
        return None
    tokens, prompts = (series[name][-1][1] for name in names)
    n = max(int(_NAME.fullmatch(name)[3]) for name in series if _is_of(name, evaluator))
    return tokens / prompts / n


def _is_of(name: str, evaluator: str) -> bool:
    match = _NAME.fullmatch(name)
    return match is not None and match[1] == evaluator


def plot_samples(found: dict[str, dict[str, list[Point]]], series: Series, path: Path) -> Path:
    """Two panels for each evaluator: score against samples and against generated tokens.

    found: as from `find_curves`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2 * len(found)), dpi=90, layout='constrained')
    for row, (evaluator, curves) in enumerate(found.items()):
        tokens = tokens_of_a_sample(series, evaluator)
        scales = {'samples of a question': 1.0}
        if tokens:
            scales['generated tokens of a question'] = tokens
        for column, (label, scale) in enumerate(scales.items()):
            axes = figure.add_subplot(len(found), 2, 2 * row + column + 1, xlabel=label)
            axes.set_title(evaluator, fontsize=10, parse_math=False)
            axes.set_xscale('log', base=2)
            axes.grid(alpha=0.3)
            for name, words in _CURVES.items():
                if name in curves:
                    count, score, low, high = zip(*curves[name], strict=True)
                    at = [scale * k for k in count]
                    axes.plot(at, score, marker='.', label=words)
                    axes.fill_between(at, low, high, alpha=0.15)
            axes.set_xticks(at, [f'{x:.4g}' for x in at])
            axes.legend(fontsize=8)
    figure.savefig(path)
    return path

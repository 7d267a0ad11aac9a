"""Draws plots/*.png of a run."""

from pathlib import Path
from typing import Any

from jaxfm.metrics import goodput, is_detail
from jaxfm.report.samples import find_panels, is_of_samples, plot_samples
from jaxfm.report.series import (
    BOUNDS,
    HISTOGRAM,
    XZ_SUFFIX,
    Series,
    find_spikes,
    is_bound,
    last_account,
    norms_by_group,
)

# Training steps are green, wasted time is red.
_COLORS = dict(zip(goodput.BUCKETS, ('C0', 'C1', 'C4', 'C6', 'C2', 'C9', 'C5', 'C8', 'C3', 'C7')))

# Of reinforcement learning: whether it gets better, and the ways in which it goes wrong.
_REWARDS = (
    *('rollout/reward', 'rollout/length', 'train/entropy_estimate', 'rollout/flat_groups'),
    *('rollout/truncated', 'train/ratio_max', 'train/reference_kl', 'train/clip_fraction'),
    'rollout/staleness',
)


def draw_plots(series: Series, data: dict, config: Any, directory: Path) -> list[Path]:
    """Draws {rewards,loss,norms,eval,samples,throughput,goodput,lengths}.png.

    Each as far as there is data for it.

    data, config: as from `collect_data` and `read_config`. Returns the paths of the files.
    """
    panels = {
        'rewards': [[n] for n in _REWARDS if _varies(series.get(n, ()))],
        'loss': [[n] for n in sorted(series) if n.startswith('train/') and 'loss' in n],
        'norms': norms_by_group(series),
        'eval': _eval_panels(series),
        'throughput': [[n] for n in ('perf/tokens_per_second', 'perf/mfu') if n in series],
    }
    drawn = []
    for name, panel in panels.items():
        if panel:
            directory.mkdir(parents=True, exist_ok=True)
            drawn.append(_plot_curves(panel, series, directory / f'{name}.png'))
    if panels := find_panels(series, config):
        directory.mkdir(parents=True, exist_ok=True)
        drawn.append(plot_samples(panels, directory / 'samples.png'))
    if account := last_account(series):
        directory.mkdir(parents=True, exist_ok=True)
        drawn.append(_plot_goodput(account, directory / 'goodput.png'))
    histograms = _histograms(data)
    if histograms:
        directory.mkdir(parents=True, exist_ok=True)
        drawn.append(_plot_lengths(histograms, directory / 'lengths.png'))
    return drawn


def _varies(points) -> bool:
    """Whether a curve of these (step, value) is worth a plot."""
    return len({value for _, value in points}) > 1


def _histograms(data: dict[str, dict[str, Any]]) -> dict[str, dict[str, int]]:
    """{phase and source: {'64': number of training documents of 33 to 64 tokens}}."""
    histograms: dict[str, dict[str, int]] = {}
    for phase, values in data.items():
        for name, count in values.items():
            source, is_one, bucket = name.partition(HISTOGRAM)
            if is_one:
                title = ' '.join(filter(None, (phase, source.strip('/')))) or 'documents'
                histograms.setdefault(title, {})[bucket] = count
    return histograms


def _eval_panels(series: Series) -> list[list[str]]:
    """Names of series by panel: one per score; bits per byte share theirs with the xz baseline.

    Counts and costs of samples are only in the table, and scores of k of them in `samples.png`.
    """
    names = [n for n in sorted(series) if n.startswith('eval/') and not is_detail(n)]
    names = [n for n in names if not is_bound(n, series) and not is_of_samples(n)]
    panels = []
    for name in names:
        if name.endswith(XZ_SUFFIX):
            continue
        xz = name.rsplit('/', 1)[0] + XZ_SUFFIX
        beside = [xz] if name.endswith('/bits_per_byte') and xz in series else []
        panels.append([name, *beside])
    return panels


def _plot_goodput(account: dict[str, float], path: Path) -> Path:
    """One horizontal bar, with a segment for every bucket that took time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.8), dpi=90, layout='constrained')
    axes = figure.add_subplot(xlabel='seconds', yticks=[])
    axes.set_title('Where the time went', fontsize=10)
    begin = 0.0
    for bucket, seconds in account.items():
        if seconds > 0:
            axes.barh(0, seconds, left=begin, color=_COLORS[bucket], label=bucket)
            begin += seconds
    axes.set_xlim(0, begin)
    figure.legend(loc='outside right upper', fontsize=8)
    figure.savefig(path)
    return path


def _plot_lengths(histograms: dict[str, dict[str, int]], path: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2 * len(histograms)), dpi=90, layout='constrained')
    for index, (title, counts) in enumerate(histograms.items()):
        axes = figure.add_subplot(len(histograms), 1, index + 1)
        axes.set(xlabel='tokens per document, up to', ylabel='documents')
        axes.set_title(f'{title}: lengths of training documents', fontsize=10, parse_math=False)
        axes.bar(list(counts), list(counts.values()))
    figure.savefig(path)
    return path


def _plot_curves(panels: list[list[str]], series: Series, path: Path) -> Path:
    # Imported here because it takes longer than the rest of the report. Figure, unlike pyplot,
    # needs no display and keeps no reference to the figures.
    from matplotlib.figure import Figure

    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.5 * columns, 3.2 * rows), dpi=90, layout='constrained')
    for index, names in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1, xlabel='step')
        is_grouped = names[0].count('/') > 1 and names[0].startswith('train/')
        title = names[0].rpartition('/')[0] if is_grouped else names[0]
        axes.set_title(title, fontsize=10, parse_math=False)
        axes.grid(alpha=0.3)
        _draw_curves(axes, names, series)
        if is_grouped:
            if any(value > 0 for name in names for _, value in series[name]):
                axes.set_yscale('log')  # the sizes of the groups are very different
            axes.legend([name.rpartition('/')[2] for name in names], fontsize=8)
        elif names == ['train/loss'] and (spikes := find_spikes(series)):
            axes.plot(*zip(*spikes), 'rx', label='spikes')
            axes.legend()
    figure.savefig(path)
    return path


def _draw_curves(axes, names: list[str], series: Series) -> None:
    for name in names:
        steps, values = zip(*series[name], strict=True)
        if name.endswith(XZ_SUFFIX):
            axes.axhline(values[-1], linestyle='--', color='gray', label='xz -9e')
            axes.legend()
            continue
        axes.plot(steps, values, marker='.' if len(steps) < 50 else None)
        low, high = (dict(series.get(name + end, ())) for end in BOUNDS)
        both = [step for step in steps if step in low and step in high]
        if both:
            axes.fill_between(both, [low[s] for s in both], [high[s] for s in both], alpha=0.2)

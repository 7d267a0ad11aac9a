"""Collects the records of a run by name: series of numbers, and statistics of the data."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxfm.metrics import goodput

# The name under which an evaluator records what `xz -9e` reaches on the same text as
# bits_per_byte.
XZ_SUFFIX = '/xz_bits_per_byte'
BOUNDS = ('_low', '_high')
CONTAMINATION = 'contamination/'  # followed by the name of an evaluator
HISTOGRAM = 'train_length_histogram/'  # followed by the largest document length, in tokens

Series = dict[str, list[tuple[int, float]]]  # {name: [(step, value), ...]}, as recorded


def read_config(path: Path) -> Any:
    """The config.json of a run; None if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None


def collect_series(records: Iterable[Mapping[str, Any]]) -> Series:
    """Every number recorded under a name with a '/', except statistics of the data."""
    series: Series = {}
    for record in records:
        for name, value in record.items():
            if name.startswith('data/'):
                continue
            if '/' in name and isinstance(value, int | float) and not isinstance(value, bool):
                series.setdefault(name, []).append((record['step'], value))
    return series


def collect_data(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{phase: {name: last value}} of the statistics of the data, names without 'data/'."""
    data: dict[str, dict[str, Any]] = {}
    for record in records:
        for name, value in record.items():
            if name.startswith('data/'):
                phase = data.setdefault(record['phase'], {})
                phase[name.removeprefix('data/')] = value
    return data


def count_skipped(series: Series) -> int:
    """How many steps of the run were skipped; every phase counts its own."""
    counts = [int(count) for _, count in series.get('train/skipped_steps', ())]
    ends = [one for one, then in zip(counts, [*counts[1:], 0]) if then < one]
    return sum(ends)


def find_spikes(series: Series) -> list[tuple[int, float]]:
    """[(step, loss)] of the losses that were spikes, also of those that a rewind has undone."""
    steps, losses = series.get('spike/step', ()), series.get('spike/loss', ())
    return [(int(step), loss) for (_, step), (_, loss) in zip(steps, losses)]


def norms_by_group(series: Series) -> list[list[str]]:
    """The names of the norms: of the gradient, and of updates and parameters by group."""
    kinds = 'train/grad_norm', 'train/update_norm/', 'train/param_norm/'
    names = [[name for name in sorted(series) if name.startswith(kind)] for kind in kinds]
    return [found for found in names if found]


def last_account(series: Series) -> dict[str, float]:
    """{bucket: seconds} as last recorded."""
    names = {bucket: goodput.name_of(bucket) for bucket in goodput.BUCKETS}
    return {bucket: series[name][-1][1] for bucket, name in names.items() if name in series}


def is_bound(name: str, series: Series) -> bool:
    """Whether a series is the lower or upper bound of another one."""
    return any(name.endswith(end) and name.removesuffix(end) in series for end in BOUNDS)

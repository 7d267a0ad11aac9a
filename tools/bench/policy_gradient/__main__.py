"""Writes the bias and the variance of every policy-gradient estimator, against the true gradient.

    python -m tools.bench.policy_gradient --out tools/bench/results [--batches 5000]

Prompts are so small (`world`) that the true gradient is a sum over all completions. Estimators
that look at one completion at a time are exact, too; those with groups are means of --batches
sampled batches of 12 prompts with 8 samples each. They are measured on samples of the policy itself
and of policies whose logits differ from it by noise of some standard deviation, the staleness.
docs/policy_gradient.md has the tables, and what they say.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from tools.bench import machine
from tools.bench.policy_gradient import estimators
from tools.bench.policy_gradient.measure import CHUNKS, Moments, measure, share
from tools.bench.policy_gradient.world import (
    DIFFICULTIES,
    REWARDS,
    SUCCESS,
    World,
    make_world,
    probabilities,
    token_logprobs,
)

PACKAGES = ('jax', 'jaxlib', 'numpy')
STALENESS = (0.0, 0.1, 0.25, 0.5, 1.0)
_UNIT = 'no baseline (exact)'  # whose variance is 1
SECTIONS = {
    'baselines': estimators.BASELINES,
    'pieces': estimators.PIECES,
    'presets': estimators.PRESETS,
    'values': estimators.VALUES,
    'corrections': estimators.CORRECTIONS,
}


def main(argv: list[str] | None = None) -> None:
    flags = parse(argv)
    record = machine.about(PACKAGES) | run(flags.batches)
    flags.out.mkdir(parents=True, exist_ok=True)
    path = flags.out / f'policy_gradient-{record["date"]}.json'
    path.write_text(json.dumps(record, indent=1) + '\n', 'utf-8')
    print(show(record))
    print(path)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line -> flags."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--out', type=Path, required=True, help='directory for the results')
    parser.add_argument('--batches', type=int, default=5000, help=f'a multiple of {CHUNKS}')
    flags = parser.parse_args(argv)
    if flags.batches < 2 * CHUNKS or flags.batches % CHUNKS:
        least = f'a multiple of {CHUNKS}, at least {2 * CHUNKS}'
        parser.error(f'--batches {flags.batches} must be {least}')
    return flags


def run(batches: int) -> dict:
    """Measures every estimator with every kind of rewards and at every staleness."""
    record = {'batches': batches, 'group': estimators.GROUP, 'policies': [], 'results': []}
    for rewards in REWARDS:
        world = make_world(rewards)
        for staleness in STALENESS:
            sampler_PXV = world.sampler(staleness)
            case = {'rewards': rewards, 'staleness': staleness}
            record['policies'].append(case | _compare(world, sampler_PXV))
            for section, members in SECTIONS.items():
                for estimator in members:
                    moments = measure(world, estimator, sampler_PXV, batches)
                    names = {'section': section, 'estimator': estimator.name}
                    found = describe(estimator, moments, world.true_gradient(), staleness)
                    record['results'].append(names | case | found)
    return record


def _compare(world: World, sampler_PXV: np.ndarray) -> dict:
    """How the sampler differs from the policy, and how rewards vary with the policy."""
    ours_PY, theirs_PY = probabilities(world.logits_PXV), probabilities(sampler_PXV)
    ratios_PY = ours_PY / theirs_PY
    mean_P = (ours_PY * world.rewards_PY).sum(axis=1)
    variance_P = (ours_PY * np.square(world.rewards_PY)).sum(axis=1) - np.square(mean_P)
    tokens_PYT = token_logprobs(world.logits_PXV) - token_logprobs(sampler_PXV)
    return {
        'kl': float((theirs_PY * -np.log(ratios_PY)).sum(axis=1).mean()),
        'largest_ratio': float(ratios_PY.max()),
        'largest_token_ratio': float(np.exp(tokens_PYT.max())),
        'reward_mean': [_round(mean) for mean in mean_P],
        'reward_std': [_round(std) for std in np.sqrt(variance_P)],
    }


def describe(
    estimator: estimators.Estimator, moments: Moments, true_PXV: np.ndarray, staleness: float
) -> dict:
    """One row: what is expected of the estimator, and what it does.

    `scale` is the length of the mean along the true gradient, divided by what theory says of it (if
    it says something). `bias` is the distance from there, as a share of it; without theory, only
    the distance from the direction of the true gradient. `noise` is the variance as a share of the
    squared signal, the mean along the true gradient.
    """
    along, theory = share(moments.mean_PXV, true_PXV), estimator.scale
    expected, length = theory or along, float(np.linalg.norm(true_PXV))
    distance = max(moments.squared_distance(expected * true_PXV), 0.0) ** 0.5
    # Without the noise, whose part would make every angle larger.
    whole = max(moments.squared_distance(np.zeros_like(true_PXV)), (along * length) ** 2) ** 0.5
    kinds = {kind: np.equal(DIFFICULTIES, kind) for kind in SUCCESS}
    scales = {kind: share(moments.mean_PXV[is_P], true_PXV[is_P]) for kind, is_P in kinds.items()}
    row = {
        'theory': theory,
        'is_unbiased': theory is not None and (staleness == 0 or estimator.stays_unbiased),
        'scale': along / (theory or 1.0),
        'scales': {kind: _round(scale / (theory or 1.0)) for kind, scale in scales.items()},
        'bias': distance / abs(expected * length),
        'cosine': along * length / whole,
        'noise': moments.variance / (along * length) ** 2,
    }
    if moments.errors is not None:
        row['scale_error'] = moments.errors.scale / (theory or 1.0)
        if theory is not None:
            row['sigmas'] = moments.sigmas(theory * true_PXV, true_PXV)
    return {name: _round(each) if isinstance(each, float) else each for name, each in row.items()}


def _round(value: float) -> float:
    return float(f'{value:.6g}')


def show(record: dict) -> str:
    """The tables of docs/policy_gradient.md, in Markdown."""
    fresh = [('binary', 0.0), ('graded', 0.0)]
    ours = ('baselines', 'pieces', 'presets')
    return '\n\n'.join(
        [
            _table(record, ours, [*fresh, ('binary', 0.1), ('binary', 0.5)]),
            _prompts(record, ours),
            _table(record, ('corrections',), [('binary', staleness) for staleness in STALENESS]),
            _table(record, ('values',), fresh),
        ]
    )


def _rows(record: dict, rewards: str, sections: tuple[str, ...]) -> dict[str, dict[float, dict]]:
    """{estimator: {staleness: result}}."""
    rows = {}
    for result in record['results']:
        if result['rewards'] == rewards and result['section'] in sections:
            rows.setdefault(result['estimator'], {})[result['staleness']] = result
    return rows


def _table(record: dict, sections: tuple[str, ...], columns: list[tuple[str, float]]) -> str:
    """Scale / angle / variance, relative to no baseline and fresh samples."""
    lines = [['estimator', *(f'{rewards}, {_name(stale)}' for rewards, stale in columns)]]
    lines.append(['---'] * len(lines[0]))
    rows = {rewards: _rows(record, rewards, sections) for rewards, _ in columns}
    units = {rewards: _rows(record, rewards, ('values',))[_UNIT][0.0]['noise'] for rewards in rows}
    for name in rows[columns[0][0]]:
        cells = [
            _cell(rows[rewards][name][stale], rows[rewards][name][0.0], units[rewards])
            for rewards, stale in columns
        ]
        lines.append([name, *cells])
    return _join(lines)


def _name(staleness: float) -> str:
    return f'stale {staleness:g}' if staleness else 'fresh'


def _cell(result: dict, fresh: dict, unit: float) -> str:
    # Where theory knows no scale, it is that of fresh samples.
    scale = result['scale'] / (1.0 if fresh['theory'] else fresh['scale'])
    angle = np.degrees(np.arccos(np.clip(result['cosine'], -1, 1)))
    return f'{scale:.2f} / {angle:.0f}° / {result["noise"] / unit:.2f}'


def _prompts(record: dict, sections: tuple[str, ...]) -> str:
    """The weights that estimators give to the prompts, relative to the middling one."""
    lines = [['estimator', *SUCCESS], ['---'] * 4]
    for name, by_case in _rows(record, 'binary', sections).items():
        scales = by_case[0.0]['scales']
        lines.append([name, *(f'{scales[kind] / scales["middling"]:.2f}' for kind in SUCCESS)])
    return _join(lines)


def _join(lines: list[list[str]]) -> str:
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


if __name__ == '__main__':
    main()

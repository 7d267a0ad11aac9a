"""Case `evaluate`: the quickstart's 128 prompts now, against an earlier version of our code."""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.bench.decode.models import ROOT
from tools.bench.decode.peer import Peer
from tools.bench.decode.timing import alternate, bar, spread, timed

LIMIT = 1 / 3


def start(tree: Path, workdir: Path, smoke: bool) -> Peer:
    """An evaluation with the code of a source tree."""
    flags = [f'--root={tree}', f'--workdir={workdir}', *(['--smoke'] if smoke else [])]
    variables = {'JAX_ENABLE_COMPILATION_CACHE': 'false'}  # the first evaluation shall compile
    return Peer(sys.executable, 'quickstart_evaluation.py', *flags, path=str(tree), **variables)


def measure(before: Path, workdir: Path | None, repeats: int, smoke: bool = False) -> dict:
    """Seconds of an evaluation now and before.

    before: a source tree of the earlier version.
    workdir: of a run of the quickstart; None evaluates fresh weights.
    """
    with tempfile.TemporaryDirectory() as empty:
        place = workdir or Path(empty)
        with start(ROOT, place, smoke) as now, start(before, place, smoke) as then:
            peers = {'now': now, 'before': then}
            first = {name: timed(lambda peer=peer: peer.ask({})) for name, peer in peers.items()}
            works = {name: lambda peer=peer: peer.ask({}) for name, peer in peers.items()}
            results = alternate(works, repeats, warm_up=0)
            step = now.about['step']
    pairs = zip(results['now']['seconds'], results['before']['seconds'])
    return {
        'before': _revision(before),
        'step': step,
        'first': {name: one['seconds'] for name, one in first.items()},
        'prompts': first['now']['values']['prompts'],
        'values': {name: one['values'] for name, one in first.items()},
        'results': {
            name: {key: one[key] for key in ('seconds', 'cpu_seconds')}
            for name, one in results.items()
        },
        'share': [ours / theirs for ours, theirs in pairs],
    }


def _revision(tree: Path) -> str:
    command = ['git', '-C', str(tree), 'rev-parse', '--short', 'HEAD']
    done = subprocess.run(command, capture_output=True, text=True, encoding='utf-8')
    return done.stdout.strip()


def bars(figures: dict) -> list[dict]:
    """The share of the time before."""
    return [bar('evaluation vs before', figures['share'], LIMIT, is_least=False)]


def show(figures: dict) -> None:
    """The first evaluation, which compiles, and the others."""
    print(
        f'{figures["prompts"]:.0f} prompts, weights of step {figures["step"]}, '
        f'before: {figures["before"]}'
    )
    for name, result in figures['results'].items():
        cpu = statistics.median(result['cpu_seconds'])
        print(
            f'  {name:6} {spread(result["seconds"])} s, {cpu:.1f} CPU-s; the first '
            f'{figures["first"][name]:.1f} s, compiling included; '
            f'pass@1 {figures["values"][name]["pass@1"]:.3f}'
        )

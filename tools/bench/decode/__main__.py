"""Measures the speed of the sampling engine, case by case.

    python -m tools.bench.decode --out tools/bench/results [--case step ...]

step: tokens/s of the engine against the bare decode step. bandwidth: copies, and the share of them
that decoding reaches. requests: 128 requests of mixed lengths, against transformers and llama.cpp.
prefix: 32 chats with one system prompt. context: decoding and memory at contexts of 1k to 32k, and
at most 32k together. evaluate: the quickstart's prompts, against an earlier version.

Cases join the results of the same day and machine, DIR/decode-DATE.json. The model is
SmolLM2-135M in float32 (--model). Peers need environments of their own: --hf_python one with torch
and transformers, --llama_python one with xllamacpp; --before is a source tree of the earlier
version, made by `git worktree add`, and --workdir a run of the quickstart (default: fresh weights).
A case whose peer is not given measures ours alone; `evaluate` needs its own. Ours and peer
alternate --repeats times.
llama.cpp and torch wait for their threads by spinning, so on a machine that does other work,
or with more threads than cores, they appear many times slower than they are: use a quiet one.
--smoke runs tiny sizes, whose figures mean nothing.
"""

import argparse
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxfm.process import num_cores, use_huge_pages
from jaxfm.run.cache import cache_directory, keep_compiled_programs
from tools.bench import machine
from tools.bench.decode import (
    bandwidth,
    contexts,
    evaluation,
    models,
    prefixes,
    requests,
    steps,
)
from tools.bench.decode.timing import use_cores

CASES = ('step', 'bandwidth', 'requests', 'prefix', 'context', 'evaluate')
CONVERTED = cache_directory() / 'bench'  # the model as other libraries read it
PACKAGES = ('jax', 'jaxlib', 'numpy')


def main(argv: list[str] | None = None) -> None:
    flags = parse(argv)
    use_cores(flags.threads)
    keep_compiled_programs(cache_directory() / 'compile', min_seconds=0.3)
    if flags.context_once:
        print(json.dumps(contexts.measure_once(**json.loads(flags.context_once))))
        return
    flags.out.mkdir(parents=True, exist_ok=True)
    for case in flags.case:
        about = machine.about(PACKAGES)
        path = flags.out / f'decode-{about["date"]}.json'
        cases = _cases_of_today(path, about)
        load = os.getloadavg()[0]  # before anything is measured
        figures, bars = run(case, flags, cases)
        about_case = {'load': load, 'threads': num_cores(), 'repeats': flags.repeats}
        cases[case] = about_case | figures | {'bars': bars}
        path.write_text(json.dumps(about | {'cases': cases}, indent=1) + '\n', 'utf-8')
        print(path)


def _cases_of_today(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    if not path.exists():
        return {}
    recorded = json.loads(path.read_text('utf-8'))
    for name, value in about.items():
        if recorded[name] != value:
            raise SystemExit(
                f'{path} has figures with {name} {recorded[name]}, not {value}: give another --out'
            )
    return recorded['cases']


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line -> flags."""
    parser = argparse.ArgumentParser(
        prog='python -m tools.bench.decode',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--out', type=Path, required=True, help='directory for the results')
    parser.add_argument('--case', nargs='+', choices=CASES, default=list(CASES))
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--threads', type=int, default=2, help='CPU cores to use')
    parser.add_argument('--model', type=Path, default=models.MODEL, help='a .gguf file')
    parser.add_argument('--hf_python', help='an interpreter with torch and transformers')
    parser.add_argument('--llama_python', help='an interpreter with xllamacpp')
    parser.add_argument('--before', type=Path, help='a source tree of the earlier version')
    parser.add_argument('--workdir', type=Path, help='of a run of the quickstart')
    parser.add_argument('--smoke', action='store_true')
    parser.add_argument('--context_once', help=argparse.SUPPRESS)  # in a process of its own
    flags = parser.parse_args(argv)
    if 'evaluate' in flags.case and not flags.before and not flags.context_once:
        if flags.case != list(CASES):
            parser.error('--case evaluate needs --before')
        flags.case.remove('evaluate')
    return flags


def run(case: str, flags: argparse.Namespace, cases: dict[str, Any]) -> tuple[dict, list[dict]]:
    """Measures a case and shows it -> its figures and bars. cases: those of the same day."""
    print(f'\n{case}', flush=True)
    module, measure = MEASURE[case]
    figures = measure(flags, cases)
    module.show(figures)
    bars = module.bars(figures) if hasattr(module, 'bars') else []
    for one in bars:
        relation = 'at least' if one['is_least'] else 'at most'
        held = 'held' if one['held'] else 'MISSED'
        print(f'  {one["name"]}: {one["median"]:.3f}, bar: {relation} {one["limit"]:.3f}: {held}')
    return figures, bars


@functools.cache
def _model(path: Path) -> models.Model:
    return models.load(path)


def _step(flags: argparse.Namespace, cases) -> dict:
    sizes = {'batches': (1, 2), 'prompt': 20} if flags.smoke else {}
    return steps.measure(_model(flags.model), flags.repeats, **sizes)


def _bandwidth(flags: argparse.Namespace, cases) -> dict:
    size = 1 << 20 if flags.smoke else bandwidth.COPY_BYTES
    return bandwidth.measure(flags.repeats, num_cores(), cases.get('step'), size)


def _requests(flags: argparse.Namespace, cases) -> dict:
    libraries, threads = [], num_cores()
    if flags.hf_python:
        model = models.write_directory(flags.model, CONVERTED)
        libraries.append(requests.transformers(flags.hf_python, model, threads))
    if flags.llama_python:
        model = models.write_gguf(flags.model, CONVERTED)
        libraries.append(requests.llama_cpp(flags.llama_python, model, threads))
    sizes = {'count': 3, 'slots': (4,)} if flags.smoke else {}
    return requests.measure(_model(flags.model), libraries, flags.repeats, **sizes)


def _prefix(flags: argparse.Namespace, cases) -> dict:
    sizes = {'chats': 4} if flags.smoke else {}
    return prefixes.measure(_model(flags.model), flags.repeats, **sizes)


def _context(flags: argparse.Namespace, cases) -> dict:
    sizes = {'contexts': (64, 128)} if flags.smoke else {}
    return contexts.measure(flags.repeats, num_cores(), **sizes)


def _evaluate(flags: argparse.Namespace, cases) -> dict:
    return evaluation.measure(flags.before, flags.workdir, flags.repeats, flags.smoke)


MEASURE: dict[str, tuple[ModuleType, Callable[[argparse.Namespace, dict], dict]]] = {
    'step': (steps, _step),
    'bandwidth': (bandwidth, _bandwidth),
    'requests': (requests, _requests),
    'prefix': (prefixes, _prefix),
    'context': (contexts, _context),
    'evaluate': (evaluation, _evaluate),
}

if __name__ == '__main__':
    use_huge_pages()  # as a run does
    main()

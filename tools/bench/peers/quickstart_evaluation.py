"""Runs an evaluator of the quickstart, with whatever version of jaxfm PYTHONPATH names.

It is the peer of tools.bench.decode, which compares two versions. Each line of stdin asks for an
evaluation; each line of stdout says how long it took. The weights are the newest ones of --workdir;
in an empty one, those of step 0.
"""

import argparse
import contextlib
import inspect
import json
import sys
import time
from pathlib import Path

from jaxfm.process import use_huge_pages


def main() -> None:
    flags = parse()
    with contextlib.redirect_stdout(sys.stderr), _evaluate(flags) as (about, evaluate):
        _tell(about)
        for _ in sys.stdin:
            began, cpu = time.perf_counter(), time.process_time()
            values = evaluate()
            took = time.perf_counter() - began
            _tell({'seconds': took, 'cpu_seconds': time.process_time() - cpu, 'values': values})


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line -> flags."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--root', type=Path, required=True, help='directory of configs/')
    parser.add_argument('--workdir', type=Path, required=True, help='of a run of the quickstart')
    parser.add_argument('--smoke', action='store_true', help='fewer prompts')
    return parser.parse_args(argv)


@contextlib.contextmanager
def _evaluate(flags: argparse.Namespace):
    """Context: what there is to tell, and a function that evaluates."""
    from jaxfm.config.load import load_config
    from jaxfm.run.data import open_data
    from jaxfm.run.run import start_run
    from jaxfm.run.weights import current_params, initial_state

    path = f'{flags.root / "configs/quickstart.py"}:{"smoke" if flags.smoke else ""}'
    config = load_config(path.rstrip(':'), [])
    with start_run(config, flags.workdir) as run:
        if run.has_begun:
            params, step = current_params(run)
        else:
            params, step = _params_of(initial_state(run)), 0
        data = open_data(config, run.workdir)
        takes = 'tokenizer' in inspect.signature(run.sampler).parameters
        tokenizer = data.datasets[config.evals['functions'].phase].tokenizer
        sampler = run.sampler(tokenizer) if takes else run.sampler()
        evaluator = run.evaluators(data, sampler, None)['functions']
        yield {'step': step}, lambda: evaluator.run(params, step)


def _params_of(state) -> dict:
    return {**state.trainable, **state.frozen}


def _tell(record: dict) -> None:
    print(json.dumps(record), file=sys.__stdout__, flush=True)


if __name__ == '__main__':
    use_huge_pages()  # as a run does
    main()

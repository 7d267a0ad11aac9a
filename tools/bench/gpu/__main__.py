"""Runs the checks and benchmarks that need a GPU; each part takes under nine minutes.

    python -m tools.bench.gpu --part kernels|train|decode|determinism --out DIR [--smoke]

Results go to DIR/gpu-PART-DATE.json, which is rewritten after every row; a table is printed at the
end. `train`, `decode` and `determinism` need pydantic and ml_collections besides jax, flax and
optax; a resumed run needs everything that training needs. Whatever is not installed or does not fit
gets a row that says so.

--only 'GLOB' runs the rows or stages that it matches (stages: timing, numerics, speed, tests;
train, peer, train_ops) and keeps the other rows of the same day, so it can complete a run that was
cut off. --smoke runs the same code on a CPU with tiny shapes, in seconds. The exit code is 1 if
anything failed.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

from tools.bench.gpu.record import Record
from tools.bench.gpu.stages import Runner

PARTS = ('kernels', 'train', 'decode', 'determinism')
SECONDS = 510.0


def main(argv=None) -> int:
    arguments = parse(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.smoke:
        os.environ.setdefault('JAX_PLATFORMS', 'cpu')
        os.environ.setdefault('JAX_NUM_CPU_DEVICES', '8')  # the Pallas interpreter needs them
    part = importlib.import_module(f'tools.bench.gpu.{arguments.part}')
    record = Record(arguments.out, arguments.part, arguments.smoke, resume=bool(arguments.only))
    runner = Runner(
        record,
        arguments.seconds,
        arguments.smoke,
        tuple(arguments.only),
        in_process=arguments.smoke,
    )
    options = {'peer_python': arguments.peer_python} if arguments.part == 'train' else {}
    part.run(record, runner, **options)
    record.set(bars=part.bars(record), seconds=round(arguments.seconds - runner.left, 1))
    part.show(record)
    if arguments.record_proven:
        for entry in part.record_proven(record):
            print(f'proven: {entry["op"]} on {entry["device"]}')
    print(record.path)
    failed = any('failed' in row or row.get('held') is False for row in record.rows)
    return int(failed or bool(record.failed_tests))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line -> flags."""
    parser = argparse.ArgumentParser(
        prog='python -m tools.bench.gpu',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--part', choices=PARTS, required=True)
    parser.add_argument('--out', type=Path, required=True, help='directory for the results')
    parser.add_argument('--smoke', action='store_true')
    parser.add_argument('--seconds', type=float, default=SECONDS, help='limit for the part')
    parser.add_argument('--only', action='append', default=[], metavar='GLOB')
    parser.add_argument(
        '--record_proven', action='store_true', help='kernels: update pallas_kernels/proven.json'
    )
    parser.add_argument('--peer_python', help='train: a Python interpreter with torch')
    arguments = parser.parse_args(argv)
    if arguments.record_proven and (arguments.part != 'kernels' or arguments.smoke):
        parser.error('--record_proven is for --part kernels, on a GPU')
    return arguments


if __name__ == '__main__':
    sys.exit(main())

"""Finds the fastest tile sizes of a kernel on this machine's GPU.

    python -m tools.tune --op attention --out pallas_kernels [--dry_run]

Every candidate is compiled, checked against the output of the first one, and timed at the
benchmark's shapes. The winner is written to OUT/<op>/tiles.json, where kernels look it up. If
several shapes share a key of that table, the least total time wins. --dry_run needs no GPU: it
compiles all candidates for an H200 and prints registers, spills and shared memory.
"""

import argparse
import dataclasses
import datetime
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from pallas_kernels._tables import short_kind
from tools import deviceless
from tools.bench.gpu import speed
from tools.bench.gpu.numerics import OPS, kernels
from tools.bench.gpu.timing import microseconds

TOLERANCE = 0.02  # between candidates, relative to the norm: they sum in different orders
# Tuned in addition to the benchmark's shapes.
MORE_SHAPES = (
    speed.RmsNorm(16384, 2048),
    speed.Attention('causal', 2, 4096, 16, 16, 256),
    speed.DecodeAttention(64, 2048, 32, 8, 64),
    speed.TokenLogprobs(16384, 4096, 8192),  # a chunk of the op's backward pass
    speed.TokenLogprobs(32768, 2048, 4096),
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A kernel at a shape."""

    shape: object  # one of the shape classes of `speed`
    part: str

    @property
    def name(self) -> str:
        return f'{self.shape.name} {self.part}'

    @property
    def key(self) -> dict:
        """The key in the table, without the device."""
        return kernels(self.shape.op).table_key(self.part, **self.shape.words)

    @property
    def candidates(self) -> list:
        return kernels(self.shape.op).candidates(self.part, **self.shape.words)


def problems(op: str, shapes=(*speed.SHAPES, *MORE_SHAPES)) -> list[Problem]:
    """Every kernel of an op at every shape."""
    parts = [part for part in ('forward', 'backward') if hasattr(kernels(op), part)]
    return [Problem(shape, part) for shape in shapes if shape.op == op for part in parts]


def tune(op: str, table: Path, found: list[Problem], measure) -> None:
    """Measures the candidates of every key, and writes each winner as soon as it is known.

    measure: (problem, tiles, outputs of the first candidate or None) -> (microseconds, outputs).
    """
    by_key = {}
    for problem in found:
        by_key.setdefault(json.dumps(problem.key), []).append(problem)
    for key, same in by_key.items():
        totals = {}
        for problem in same:
            print(f'{problem.name}: {key}')
            expected = None
            for tiles in problem.candidates:
                try:
                    took, outputs = measure(problem, tiles, expected)
                except Exception as error:  # the compiler raises many types
                    said = f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'
                    print(f'  {tiles}: {said}')
                    totals[tiles] = float('inf')
                    continue
                expected = outputs if expected is None else expected
                totals[tiles] = totals.get(tiles, 0.0) + took
                print(f'  {tiles}: {took:.1f} us')
        best = min(totals, key=totals.get)
        if totals[best] < float('inf'):
            write(table, json.loads(key), best, totals[best] / len(same))
            print(f'  best: {best}')


def measure_on_gpu(problem: Problem, tiles, expected):
    """(median microseconds, outputs); raises ArithmeticError if outputs differ from `expected`."""
    call = problem.shape.kernel(problem.part, tiles=tiles)
    function = jax.jit(call.function)
    outputs = function(*call.arrays)
    if expected is not None:
        for got, wanted in zip(jax.tree.leaves(outputs), jax.tree.leaves(expected)):
            got, wanted = (x.astype(jnp.float32) for x in (got, wanted))
            error = jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted)
            if not error <= TOLERANCE:
                raise ArithmeticError(f'output differs by {error:.2g} from the first candidate')
    return microseconds(function, *call.arrays)['microseconds'], outputs


def write(path: Path, key: dict, tiles, took: float) -> None:
    """Writes the entry for a key on this device into the table, replacing an older one."""
    about = {'device': short_kind(jax.devices()[0].device_kind), **key}
    entries = json.loads(path.read_text('utf-8')) if path.exists() else []
    entries = [e for e in entries if {name: e.get(name) for name in about} != about]
    date = datetime.date.today().isoformat()
    measured = {'date': date, 'microseconds': round(took, 1)}
    entries.append({**about, 'tiles': dataclasses.asdict(tiles), 'measured': measured})
    entries.sort(key=lambda entry: json.dumps({**entry, 'measured': None}))
    path.write_text('[\n' + ',\n'.join(json.dumps(entry) for entry in entries) + '\n]\n', 'utf-8')


def compile_all(found: list[Problem]) -> bool:
    """Compiles every candidate once for an H200; returns whether none failed or spilled."""
    good, seen = True, set()
    for problem in found:
        for tiles in problem.candidates:
            if (case := (json.dumps(problem.key), tiles)) in seen:
                continue
            seen.add(case)
            try:
                codes = _compile(problem, tiles)
            except Exception as error:  # the compiler raises many types
                good = False
                print(f'{problem.name} {tiles}: {type(error).__name__}: {str(error)[:200]}')
                continue
            good &= not any(code.spilled_bytes for code in codes)
            told = [
                f'{code.registers} registers, {code.spilled_bytes} bytes spilled, '
                f'{code.smem_bytes >> 10} KiB'
                for code in codes
            ]
            print(f'{problem.name} {tiles}: {"; ".join(told)}')
    return good


def _compile(problem: Problem, tiles) -> list[deviceless.KernelCode]:
    function = None

    def arrays():
        nonlocal function
        call = problem.shape.kernel(problem.part, tiles=tiles)
        function = call.function  # holds options, no arrays
        return call.arrays

    with deviceless.target():
        shapes = jax.eval_shape(arrays)
    return deviceless.compile_kernels(function, *shapes)


def main(argv=None) -> None:
    arguments = parse(argv)
    found = problems(arguments.op)
    if arguments.dry_run:
        raise SystemExit(0 if compile_all(found) else 1)
    if jax.default_backend() != 'gpu':
        raise SystemExit('no GPU here: --dry_run compiles all candidates for an H200 without one')
    tune(arguments.op, arguments.out / arguments.op / 'tiles.json', found, measure_on_gpu)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line -> flags."""
    parser = argparse.ArgumentParser(
        prog='python -m tools.tune',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--op', choices=OPS, required=True)
    parser.add_argument('--out', type=Path, default=Path('pallas_kernels'))
    parser.add_argument('--dry_run', action='store_true')
    return parser.parse_args(argv)


if __name__ == '__main__':
    main()

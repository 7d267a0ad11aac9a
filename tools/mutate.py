"""Mutation testing: plants mistakes in the source, one by one, to see which the tests catch.

    nice python -m tools.mutate --seed 0 --count 100 --out mutants.json
    nice python -m tools.mutate --seed 1 --count 20 --rooms data storage

`tools.mutants` lists the kinds of mistakes. Each mutant is planted in a copy of the working tree.
Tests run there in three stages, until the first failure: the tests that `tools.pick_tests` picks
for the module, nearest first; then tests of the same package that reach the module through imports;
then the tests that take long. The fates:

    caught      a test failed, or the module could not be imported
    hangs       one test ran for more than half of the time limit
    survived    every test passed: a test is missing, or the change makes no difference
    unfinished  the time limit was reached while tests were passing
    untested    no test reads the module

--out is written after every mutant, and the same command continues after an interruption. At the
end, the tests that caught a mutant run once more without one. If a test fails there too, its
mutants are marked `doubtful`.
"""

import argparse
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from jaxfm.command_line import Parser, number
from jaxfm.errors import RunError, UsageError
from jaxfm.storage.whole import write_file
from tools.import_graph import ROOMS, Graph
from tools.mutants import Mutant, draw, list_rooms
from tools.pick_tests import ROOT, leave_out, list_files, order_tests, pick

# Imported once, in the process from which every test process is forked.
PRELOADED = (
    *('jax', 'jax.numpy', 'flax.nnx', 'optax', 'tensorstore', 'tokenizers', 'pydantic', 'jinja2'),
    *('ml_collections', 'safetensors', 'gguf', 'rich.console', 'pytest', 'numpy.testing'),
)
OPTIONS = ('-x', '-q', '--tb=line', '-p', 'no:cacheprovider')


@dataclasses.dataclass
class Fate:
    """What became of a mutant. test: the test that caught it, or the test that hangs."""

    fate: str
    test: str = ''
    message: str = ''
    num_tests: int = 0
    seconds: float = 0.0


class Copy:
    """A copy of a repository in which mutants are planted and tests run."""

    def __init__(self, root: Path, place: Path):
        self.place = place
        self._cache = place.with_name(f'{place.name}_compiled')
        self._log = place.with_name(f'{place.name}.log')
        self._context = multiprocessing.get_context('forkserver')
        self._context.set_forkserver_preload(list(PRELOADED))
        for name in list_files(root):
            if (root / name).is_file():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, place / name)
        for shared in (root / 'shared', root.parent / 'shared'):
            if shared.exists() and not (place / 'shared').exists():
                (place / 'shared').symlink_to(shared.resolve())

    def plant(self, mutant: Mutant) -> 'Planted':
        return Planted(self.place / mutant.path, mutant)

    def test(self, arguments: list[str], seconds: float) -> Fate:
        """Runs pytest in its own process, for at most this many seconds."""
        began = time.monotonic()
        self._log.write_text('', 'utf-8')
        arguments = [*OPTIONS, f'--rootdir={self.place}', *arguments]
        process = self._context.Process(
            target=_run_pytest, args=(str(self.place), arguments, str(self._log), str(self._cache))
        )
        process.start()
        process.join(seconds)
        if is_late := process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
        fate = read_fate(
            self._log.read_text('utf-8'), process.exitcode, time.time() if is_late else None
        )
        if fate.fate == 'unfinished' and fate.seconds > seconds / 2:
            fate.fate = 'hangs'
        fate.seconds = round(time.monotonic() - began, 1)
        return fate


class Planted:
    """Plants a mutant for the duration of a `with` block."""

    def __init__(self, path: Path, mutant: Mutant):
        self._path, self._mutant = path, mutant
        self._source, self._status = path.read_bytes(), path.stat()

    def __enter__(self):
        self._forget_compiled()
        self._path.write_bytes(self._mutant.apply(self._source))

    def __exit__(self, *error):
        self._path.write_bytes(self._source)
        os.utime(self._path, ns=(self._status.st_atime_ns, self._status.st_mtime_ns))
        self._forget_compiled()

    def _forget_compiled(self):
        """Python reuses compiled code if the source has the same time and size, and it may have."""
        Path(importlib.util.cache_from_source(self._path)).unlink(missing_ok=True)


def read_fate(log: str, exit_code: int, killed_at: float | None) -> Fate:
    """The fate of a mutant, from the records that `_Watch` wrote during a test run, one per line.

    killed_at: when the test run was killed, or None; `seconds` is then how long its last test ran.
    """
    records = [json.loads(line) for line in log.splitlines() if line.endswith('}')]
    started = [record for record in records if 'started' in record]
    for record in records:
        if 'failed' in record:
            return Fate('caught', record['failed'], record['message'], len(started))
    last = started[-1]['started'] if started else 'collection'
    if killed_at is not None:
        ran = killed_at - started[-1]['time'] if started else 0
        return Fate('unfinished', last, num_tests=len(started), seconds=ran)
    if exit_code in (0, 5):  # 5: nothing was collected
        return Fate('survived' if started else 'untested', num_tests=len(started))
    return Fate('caught', last, f'pytest ended with {exit_code}', len(started))


class _Watch:
    """A pytest plugin that records starts and failures of tests, one per line."""

    def __init__(self, path: str):
        self._file = open(path, 'a', buffering=1, encoding='utf-8')

    def _write(self, **record):
        self._file.write(json.dumps(record) + '\n')

    def pytest_runtest_logstart(self, nodeid):
        self._write(started=nodeid, time=time.time())

    def pytest_runtest_logreport(self, report):
        self._note_failure(report)

    def pytest_collectreport(self, report):
        self._note_failure(report)

    def _note_failure(self, report):
        if report.failed:
            crash = getattr(report.longrepr, 'reprcrash', None)
            text = crash.message if crash else str(report.longrepr)[-300:]
            self._write(failed=report.nodeid, message=' '.join(text.split())[:300])


def _run_pytest(place: str, arguments: list[str], log: str, cache: str) -> None:
    """Runs in a forked process with its own session, so that killing it kills its children too."""
    os.setsid()
    output = os.open(f'{log}.txt', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(place)
    os.environ['PYTHONPATH'] = place
    os.environ['JAXFM_TEST_CACHE'] = cache  # tests/kept.py keeps compiled programs there
    sys.path[:] = [place, *(entry for entry in sys.path if entry not in ('', str(ROOT)))]
    for name in list(sys.modules):  # modules of the working tree
        if name.split('.')[0] in ROOMS:
            del sys.modules[name]
    import pytest

    code = pytest.main(arguments, plugins=[_Watch(log)])
    sys.stdout.flush()
    os._exit(code)


def find_fate(copy: Copy, graph: Graph, mutant: Mutant, seconds: float) -> Fate:
    """Plants a mutant and runs the tests in three stages until one catches it."""
    total = Fate('untested')
    with copy.plant(mutant):
        for arguments in filter(None, make_stages(graph, mutant.path)):
            fate = copy.test(arguments, seconds)
            fate.num_tests += total.num_tests
            fate.seconds += total.seconds
            total = fate if fate.fate != 'untested' else total
            if total.fate not in ('survived', 'untested'):
                break
    return total


def make_stages(graph: Graph, path: str) -> list[list[str]]:
    """Arguments for pytest in each stage: near tests, more of the package's tests, long tests."""
    picked = pick(graph, [path])
    room = f'tests/{path.split("/")[path.startswith("jaxfm/")]}/'
    further = [
        name
        for name in order_tests(graph, path)
        if name.startswith(room) and name not in {*picked.files, *picked.left_out}
        if not leave_out(graph, name, picked.left_out)
    ]
    deselected = [f'--deselect={name}' for name in picked.left_out if '::' in name]
    stages = [*picked.files], further
    return [*([*deselected, *files] for files in stages if files), list(picked.left_out)]


def find_fates(
    copy: Copy, graph: Graph, mutants: list[Mutant], out: Path, seconds: float
) -> Iterator[tuple[Mutant, Fate]]:
    """Yields each mutant with its fate; a mutant that is in the file `out` is not tested again."""
    known = read_known(out)
    for mutant in mutants:
        if mutant not in known:
            known[mutant] = find_fate(copy, graph, mutant, seconds)
            write_fates(out, known)
        yield mutant, known[mutant]


def read_known(out: Path) -> dict[Mutant, Fate]:
    """{mutant: fate} from the file of an earlier run; {} if there is none."""
    if not out.exists():
        return {}
    names = [field.name for field in dataclasses.fields(Mutant)]
    return {
        Mutant(**{name: record[name] for name in names}): Fate(
            **{field.name: record[field.name] for field in dataclasses.fields(Fate)}
        )
        for record in json.loads(out.read_text('utf-8'))
    }


def write_fates(out: Path, fates: dict[Mutant, Fate]) -> None:
    records = [dataclasses.asdict(m) | dataclasses.asdict(f) for m, f in fates.items()]
    with write_file(out) as file:
        file.write(json.dumps(records, indent=1).encode())


def find_doubtful(copy: Copy, fates: list[Fate]) -> set[str]:
    """The tests that caught a mutant but also fail without one."""
    tests = sorted({fate.test for fate in fates if fate.fate == 'caught' and '::' in fate.test})
    doubtful = set()
    while tests:
        fate = copy.test(tests, 600)
        if fate.fate != 'caught':
            break
        doubtful.add(fate.test)
        tests = [test for test in tests if test != fate.test]
    return doubtful


def make_table(fates: list[tuple[Mutant, Fate]]) -> str:
    """A Markdown table of all mutants, and a line with the number of each fate."""
    lines = ['| | where | change | fate | test |', '|---|---|---|---|---|']
    for index, (mutant, fate) in enumerate(fates):
        change = f'`{mutant.before[:90]}` -> `{mutant.after[:90]}`'.replace('|', '\\|')
        where = f'{mutant.path}:{mutant.line}'
        lines.append(
            f'| {index} | {where} | {mutant.operator}: {change} | {fate.fate} | {fate.test} |'
        )
    sums = Counter(fate.fate for _, fate in fates)
    return '\n'.join([*lines, '', ', '.join(f'{n} {name}' for name, n in sums.most_common())])


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog='python -m tools.mutate', description=__doc__.partition('\n')[0])
    parser.add_argument('--seed', type=int, default=0, help='seed of the random draw')
    parser.add_argument('--count', type=number(int, 1), default=100, help='how many mutants')
    parser.add_argument('--rooms', nargs='*', default=[], help='packages to mutate (default: all)')
    parser.add_argument('--out', type=Path, default=Path('mutants.json'), help='file of results')
    parser.add_argument(
        '--timeout', type=number(float, 1), default=180, help='time limit of a test run, in seconds'
    )
    return parser.parse_args(argv)


def main(argv: list[str], root: Path = ROOT) -> int:
    """Runs one command line; returns its exit code, which is 1 if a mutant was not caught."""
    try:
        flags = parse(argv)
        paths = list_files(root)
        if unknown := set(flags.rooms) - list_rooms(paths).keys():
            names = ', '.join(list_rooms(paths))
            raise UsageError(f'--rooms: no package {min(unknown)}; there are: {names}')
        mutants = draw(root, paths, flags.seed, flags.count, flags.rooms)
    except RunError as error:
        print(f'error: {error}', file=sys.stderr)
        return error.exit_code
    fates = []
    with tempfile.TemporaryDirectory() as directory:
        copy = Copy(root, Path(directory) / 'copy')
        for mutant, fate in find_fates(copy, Graph(root, paths), mutants, flags.out, flags.timeout):
            fates.append((mutant, fate))
            where = f'{len(fates)}/{len(mutants)} {mutant.path}:{mutant.line} {mutant.operator}'
            print(where, fate.fate, fate.test, f'{fate.seconds:.0f} s', file=sys.stderr, flush=True)
        doubtful = find_doubtful(copy, [fate for _, fate in fates])
    for _, fate in fates:
        fate.fate = 'doubtful' if fate.test in doubtful else fate.fate
    write_fates(flags.out, read_known(flags.out) | dict(fates))
    print(make_table(fates))
    return int(any(fate.fate not in ('caught', 'hangs') for _, fate in fates))


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

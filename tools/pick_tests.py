"""Runs the tests of the files you changed, for feedback within a minute while you edit.

    python -m tools.pick_tests                    # what differs from the last commit
    python -m tools.pick_tests --since main       # what differs from a branch
    python -m tools.pick_tests --list             # lists the tests without running them
    python -m tools.pick_tests -- -k order        # arguments after -- go to pytest

A changed test file is picked itself. For any other changed file, it picks the test file that
mirrors it (tests/data/test_order.py for jaxfm/data/order.py) and every test file that reads it
directly, by an import or by its name in a string (`import_graph`). If there are none, it picks the
test files that reach it through the fewest imports. A changed helper in tests/ picks the test files
that read it.

What takes too long for this is left out and listed:
- tests that use a fixture in LONG_FIXTURES, directly or through other fixtures: complete runs of
  the program, a real model, kernels in the interpreter or compiled for a GPU, failing storage;
- test files in LONG_FILES, which take more than half a minute even without these fixtures.
A test file that has itself changed is never left out. Tests marked `slow` never run here.
"""

import argparse
import ast
import dataclasses
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from jaxfm.command_line import Parser
from jaxfm.errors import RunError, UsageError
from tools.import_graph import Graph, find_fixtures, is_test

ROOT = Path(__file__).resolve().parent.parent
LONG_FIXTURES = frozenset(
    ['tiny', 'start', 'straight', 'smollm2_gguf', 'interpreter', 'gpu_compiler', 'fault_proxy']
)
# 40 to 100 s each, with a cold compile cache on two quiet cores.
LONG_FILES = frozenset(
    f'tests/{name}.py'
    for name in (
        *('models/test_families', 'models/test_families_on_meshes', 'models/test_lora'),
        *('test_collectives', 'test_meshes', 'test_real_data', 'tools/test_gpu_bench'),
    )
)


@dataclasses.dataclass
class Picked:
    """What to run. files: {test file: why}; left_out: {test file or file::test: why}."""

    files: dict[str, str] = dataclasses.field(default_factory=dict)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)

    def arguments(self, root: Path) -> list[str]:
        """The arguments for pytest, for a repository at `root`."""
        tests = (name for name in self.left_out if '::' in name)
        files = (str(root / name) for name in self.files)
        return [*(f'--deselect={name}' for name in tests), *files]


def list_files(root: Path) -> list[str]:
    """The files that git tracks, and the untracked ones that it does not ignore."""
    return _git(root, 'ls-files', '--cached', '--others', '--exclude-standard')


def list_changes(root: Path, since: str) -> list[str]:
    """The files that differ from a commit, including deleted and untracked ones."""
    changed = _git(root, 'diff', '--name-only', '--no-renames', since, '--')
    return sorted({*changed, *_git(root, 'ls-files', '--others', '--exclude-standard')})


def order_tests(graph: Graph, path: str) -> dict[str, int]:
    """{test file: distance} of all test files that reach `path`, nearest first.

    Mirrors have distance 0. Among files of equal distance, those in the test directory of the same
    package come first; the rest is in alphabetical order.
    """
    mirrors, found = graph.mirrors_of(path), graph.tests_of(path)
    room = path.split('/')[1 if path.startswith('jaxfm/') else 0]
    others = sorted(
        (name for name in found if name not in mirrors),
        key=lambda name: (found[name], f'tests/{room}/' not in name, name),
    )
    return dict.fromkeys(mirrors, 0) | {name: found[name] for name in others}


def pick(graph: Graph, changed: Iterable[str]) -> Picked:
    """Picks the test files for the changed files, and leaves out what takes too long."""
    picked = Picked()
    for path in sorted(changed, key=is_test, reverse=True):
        if is_test(path):
            if (graph.root / path).exists():
                picked.files[path] = 'changed'
            continue
        found = order_tests(graph, path)
        reach = max(1, min(found.values(), default=0))
        for name, distance in found.items():
            why = f'mirrors {path}' if not distance else f'reads {path}'
            if distance > 1:
                why = f'{distance} imports from {path}, and no test file is nearer'
            if distance <= reach:
                picked.files.setdefault(name, why)
    for name, why in list(picked.files.items()):
        if why != 'changed' and leave_out(graph, name, picked.left_out):
            del picked.files[name]
    return picked


def leave_out(graph: Graph, path: str, left_out: dict[str, str]) -> bool:
    """Adds the long tests of a file to `left_out`; returns whether all of its tests are long."""
    if path in LONG_FILES:
        left_out[path] = 'takes more than half a minute'
        return True
    long = find_long_tests(graph, path)
    if long and None in long.values():
        left_out |= {f'{path}::{test}': f'fixture {why}' for test, why in long.items() if why}
        return False
    if long:
        left_out[path] = f'every test: fixture {" or ".join(sorted(set(long.values())))}'
    return bool(long)


def find_long_tests(graph: Graph, path: str) -> dict[str, str | None]:
    """{test: the fixture that makes it long, or None} for the tests of a file."""
    fixtures = {}
    for place in reversed([path, *graph.conftests_of(path)]):
        fixtures |= find_fixtures(graph.parse(place))

    def find_long(node: ast.FunctionDef, seen: frozenset[str]) -> str | None:
        for name in sorted(_fixtures_taken(node)):
            if name in LONG_FIXTURES:
                return name
            if name in fixtures and name not in seen:
                if found := find_long(fixtures[name], seen | {name}):
                    return found
        return None

    tests = [node for node in graph.parse(path).body if isinstance(node, ast.FunctionDef)]
    return {n.name: find_long(n, frozenset()) for n in tests if n.name.startswith('test_')}


def _fixtures_taken(function: ast.FunctionDef) -> set[str]:
    arguments = {argument.arg for argument in function.args.args + function.args.kwonlyargs}
    marks = [mark for mark in function.decorator_list if 'usefixtures' in ast.unparse(mark)]
    texts = (n.value for mark in marks for n in ast.walk(mark) if isinstance(n, ast.Constant))
    return arguments | set(texts)


def describe(picked: Picked) -> list[str]:
    """Lines that say what runs and why, and what is left out and why."""
    lines = [f'{name}  ({why})' for name, why in picked.files.items()]
    by_reason = {}
    for name, why in picked.left_out.items():
        path, _, test = name.partition('::')
        by_reason.setdefault((path, why if not test else f'of its tests: {why}'), []).append(test)
    if by_reason:
        lines.append('left out because they take too long here (CI runs them):')
    for (path, why), tests in by_reason.items():
        number = '' if tests == [''] else f'{len(tests)} '
        lines.append(f'  {path}  ({number}{why})')
    return lines


def main(argv: list[str], root: Path = ROOT) -> int:
    """Runs one command line; returns pytest's exit code, or 0 if there is nothing to run."""
    try:
        flags, rest = parse(argv)
        changed = list_changes(root, flags.since)
        picked = pick(Graph(root, {*list_files(root), *changed}), changed)
    except RunError as error:
        print(f'error: {error}', file=sys.stderr)
        return error.exit_code
    print(*describe(picked), sep='\n', flush=True)
    if not picked.files:
        print(f'no quick test reads any of the {len(changed)} changed files')
    if flags.list or not picked.files:
        return 0
    import pytest

    return int(pytest.main(['-x', '-q', f'--rootdir={root}', *picked.arguments(root), *rest]))


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Command line -> (flags, arguments for pytest)."""
    own = argv[: argv.index('--')] if '--' in argv else argv
    parser = Parser(prog='python -m tools.pick_tests', description=__doc__.partition('\n')[0])
    parser.add_argument(
        '--since',
        default='HEAD',
        metavar='REF',
        help='compare with this commit or branch (default: the last commit)',
    )
    parser.add_argument('--list', action='store_true', help='list the tests without running them')
    return parser.parse_args(own), argv[len(own) + 1 :]


def _git(root: Path, *arguments: str) -> list[str]:
    """The lines that git prints. Raises UsageError with git's message if it fails."""
    command = ['git', '-C', str(root), '-c', 'core.quotePath=false', *arguments]
    done = subprocess.run(command, capture_output=True, text=True, encoding='utf-8')
    if done.returncode:
        raise UsageError(done.stderr.strip())
    return done.stdout.splitlines()


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

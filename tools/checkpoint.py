"""Lists, verifies and downloads checkpoints, and deletes what interrupted saves left behind.

    python -m tools.checkpoint ls PATH                   # every save, and who holds the lease
    python -m tools.checkpoint verify PATH [--step N]    # read back all committed files and arrays
    python -m tools.checkpoint sweep PATH [--dry_run]    # delete files that no checkpoint uses
    python -m tools.checkpoint take_back PATH --step N   # a checkpoint set aside counts again
    python -m tools.checkpoint download PATH --step N --to DIR   # the arrays, for Orbax

PATH is a directory of checkpoints, the work directory of a run, or s3://bucket/prefix. `verify`
needs no accelerator and little memory, whatever mesh wrote the arrays.
"""

import argparse
import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jaxfm import process
from jaxfm.checkpoint import CheckpointConfig
from jaxfm.checkpoint.store import Commit, Store
from jaxfm.checkpoint.survey import SET_ASIDE, Attempt, survey
from jaxfm.command_line import Parser
from jaxfm.config.load import read_config
from jaxfm.errors import (
    DataError,
    MissingInputError,
    PermissionDeniedError,
    RunError,
    UsageError,
    human_bytes,
)
from jaxfm.storage import open_storage
from jaxfm.storage.base import S3
from jaxfm.storage.files import explain_write
from jaxfm.storage.lease import Lease, Record, read_lease
from jaxfm.storage.whole import make_directory, write_directory, write_file

COLUMNS = ('step', 'state', 'attempt', 'size', 'age', 'arrays', 'mesh', 'processes', 'phase')

log = logging.getLogger('jaxfm')


def main(argv: list[str]) -> int:
    """Runs one command line; returns its exit code."""
    process.replace_unprintable()
    logging.basicConfig(level=logging.INFO, format='%(message)s', stream=sys.stderr)
    try:
        flags = parse(argv)
        COMMANDS[flags.command](flags)
    except RunError as error:
        print(f'error: {error}', file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return process.report_interrupt()
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stdout = None
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """Command line -> flags."""
    parser = Parser(prog='python -m tools.checkpoint', description=__doc__.partition('\n')[0])
    commands = parser.add_subparsers(dest='command', required=True)
    _, verify_, sweep_, take_back_, download_ = (
        commands.add_parser(name, help=function.__doc__.partition('\n')[0])
        for name, function in COMMANDS.items()
    )
    for each in commands.choices.values():
        each.add_argument('path', metavar='PATH', help='checkpoints, a run, or s3://...')
    verify_.add_argument('--step', type=int, help='verify only this step')
    sweep_.add_argument('--dry_run', action='store_true', help='list the files, delete none')
    sweep_.add_argument('--set_aside', action='store_true', help='also what runs have set aside')
    take_back_.add_argument('--step', type=int, required=True, help='the step to take back')
    download_.add_argument('--step', type=int, required=True, help='the step to copy')
    download_.add_argument('--to', type=Path, required=True, help='a directory that is made')
    take_back_.add_argument(
        '--attempt', metavar='NAME', help='as ls lists it (default: the newest of the step)'
    )
    return parser.parse_args(argv)


def ls(flags) -> None:
    """Lists every save, complete or not, and who holds the write lease."""
    store = _open(flags.path)
    found = survey(store)
    if not found.attempts and found.lease is None:
        raise _explain_empty(store)
    table = Table(box=None)
    for title in COLUMNS:
        table.add_column(title, justify='right' if title in ('step', 'size', 'age') else 'left')
    for attempt in found.attempts:
        table.add_row(*_row(attempt))
    print(store.storage.root)
    if found.attempts:
        Console(width=1000, soft_wrap=True, highlight=False).print(table)  # never wraps names
    print(_describe(found.lease))


def verify(flags) -> None:
    """Reads back every file and every array of the committed steps."""
    store = _open(flags.path)
    commits = store.commits()
    if not commits:
        raise _explain_empty(store)
    if flags.step is not None:
        if flags.step not in commits:
            raise store.missing_error(flags.step, commits)
        commits = {flags.step: commits[flags.step]}
    damaged = [step for step, commit in commits.items() if not _is_whole(store, commit)]
    if damaged:
        raise DataError(
            f'{len(damaged)} of {len(commits)} checkpoints in {store.storage.root} are damaged: '
            f'{", ".join(map(str, damaged))}'
        )


def sweep(flags) -> None:
    """Deletes files that belong to no committed checkpoint."""
    store = _open(flags.path)
    listing = store.storage.list()
    if not survey(store).attempts and not store.orphans(listing, {}):
        raise _explain_empty(store)
    if flags.dry_run:
        lease = read_lease(store.storage, listing)
        if lease is not None and lease.is_held:
            log.warning('%s; this list may contain files of a save in progress', _describe(lease))
        orphans = store.orphans(listing, store.commits(listing), flags.set_aside)
    else:
        with _alone(store):
            orphans = store.sweep(flags.set_aside)
    for name, size in orphans.items():
        print(f'{name}  {human_bytes(size, 1000, 3)}')
    verb = 'would be deleted' if flags.dry_run else 'deleted'
    print(f'{len(orphans)} orphans, {human_bytes(sum(orphans.values()), 1000, 3)}: {verb}')


def take_back(flags) -> None:
    """Makes a checkpoint that a run has set aside count again."""
    store = _open(flags.path)
    aside = [one for one in survey(store).attempts if one.state == SET_ASIDE]
    found = [one for one in aside if one.step == flags.step]
    if not found:
        steps = ', '.join(map(str, sorted({one.step for one in aside}))) or 'none'
        raise MissingInputError(
            f'no checkpoint {flags.step} was set aside in {store.storage.root}; set aside: {steps}'
        )
    # Leases are numbered in the order of their runs; S3 tells times in whole seconds.
    chosen = max(found, key=lambda one: (one.manifest.get('epoch', -1), one.modified))
    if flags.attempt is not None:
        there = {one.name: one for one in found}
        if flags.attempt not in there:
            raise MissingInputError(
                f'no attempt {flags.attempt} of checkpoint {flags.step} was set aside in '
                f'{store.storage.root}; set aside: {", ".join(there)}'
            )
        chosen = there[flags.attempt]
    with _alone(store) as lease:
        if flags.step in store.commits():
            raise DataError(
                f'checkpoint {flags.step} in {store.storage.root} was saved again since, and '
                'counts; --resume_step with an earlier step would set it aside'
            )
        store.take_back(f'{chosen.step}/{chosen.name}', lease.epoch)
    print(f'checkpoint {flags.step} counts again; to go on from it give --resume_step={flags.step}')


def download(flags) -> None:
    """Copies the arrays of a step into a new directory, from which Orbax restores them."""
    store, target = _open(flags.path), flags.to.expanduser().absolute()
    if target.exists():
        raise UsageError(f'--to {target}: it exists already; name a directory to make')
    commits = store.commits()
    if flags.step not in commits:
        raise store.missing_error(flags.step, commits)
    commit = commits[flags.step]
    if not _is_whole(store, commit):
        raise DataError(f'checkpoint {flags.step} in {store.storage.root} is damaged')
    manifest = store.manifest(commit)
    with explain_write(target):
        make_directory(target.parent)
        with write_directory(target) as directory:
            for name in filter(lambda name: name.startswith('state/'), manifest['files']):
                path = directory / name.removeprefix('state/')
                path.parent.mkdir(parents=True, exist_ok=True)
                with write_file(path) as file:
                    file.write(store.storage.read(f'{commit.directory}/{name}'))
    print(f'{target}: restore it with orbax.checkpoint.StandardCheckpointer().restore')
    if base := manifest.get('base'):
        print(f'it has only adapters; they belong to {base["origin"]["init_from"]}')


COMMANDS = {
    'ls': ls,
    'verify': verify,
    'sweep': sweep,
    'take_back': take_back,
    'download': download,
}


def _open(path: str) -> Store:
    """Opens the checkpoints at a path; for a work directory, those that its config names."""
    if '://' in path:
        if not path.startswith(S3) or not path.removeprefix(S3).strip('/'):
            raise UsageError(f'PATH must be a directory or s3://bucket/prefix, got {path}')
        return Store(open_storage(path))
    directory = Path(path).expanduser()
    try:
        is_directory = directory.is_dir()
    except PermissionError:
        raise PermissionDeniedError(f'{path}: permission denied') from None
    if not is_directory:
        nearest = next(parent for parent in directory.absolute().parents if parent.is_dir())
        raise MissingInputError(f'{path}: no such directory; the nearest parent is {nearest}')
    place: str | Path = directory
    if (directory / 'config.json').is_file():
        config = read_config(directory / 'config.json')
        place = config.checkpoint.directory or directory / 'checkpoints'
    return Store(open_storage(place))


def _explain_empty(store: Store) -> MissingInputError:
    return MissingInputError(f'{store.storage.root} holds no checkpoints')


def _row(attempt: Attempt) -> list[str]:
    manifest = attempt.manifest
    mesh = ' '.join(f'{axis}={size}' for axis, size in manifest.get('mesh', {}).items() if size > 1)
    return [
        str(attempt.step),
        attempt.state,
        attempt.name,
        human_bytes(attempt.size, 1000, 3),
        _age(time.time() - attempt.modified) if attempt.modified else '',
        str(len(manifest['arrays'])) if 'arrays' in manifest else '',
        mesh or ('one device' if manifest else ''),
        str(manifest.get('processes', '')),
        str(manifest.get('extra', {}).get('phase', '')),
    ]


def _describe(lease: Record | None) -> str:
    if lease is None:
        return 'lease: not held'
    who = f'lease {lease.epoch}: {lease.holder or "unknown holder (its file cannot be read)"}'
    if lease.released:
        return f'{who}, released'
    return f'{who}, {"still held" if lease.is_held else "ended without releasing it"}'


def _is_whole(store: Store, commit: Commit) -> bool:
    import jax  # only here: the other commands start faster without it

    from jaxfm.checkpoint.verify import find_damages

    jax.config.update('jax_platforms', 'cpu')  # the run may be using the accelerator
    began = time.monotonic()
    found = find_damages(store, commit)
    if found and store.commits().get(commit.step) != commit:
        print(f'step {commit.step}: deleted by its run meanwhile', flush=True)
        return True
    state = 'damaged' if found else 'whole'
    print(f'step {commit.step}: {state} ({time.monotonic() - began:.1f} s)', flush=True)
    for damage in found:
        print(f'  {str(damage).partition(f"{store.storage.root}: ")[2]}', flush=True)
    return not found


@contextlib.contextmanager
def _alone(store: Store) -> Iterator[Lease]:
    """Context: holds the lease, as a starting run does, so that nobody else can write."""
    lease = Lease(store.storage, CheckpointConfig().lease_seconds)
    lease.acquire(store.epochs)
    is_empty = False
    try:
        yield lease
        is_empty = not store.commits()
    finally:
        lease.release(is_empty)


def _age(seconds: float) -> str:
    for unit, length in (('d', 86400), ('h', 3600), ('min', 60)):
        if seconds >= 2 * length:
            return f'{seconds / length:.0f} {unit}'
    return f'{max(seconds, 0):.0f} s'


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

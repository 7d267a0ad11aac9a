"""Lists, for people, everything in a checkpoint store: each attempt to save, and its outcome."""

import collections
import dataclasses
import json
from typing import Any

from jaxfm.checkpoint.store import Commit, Listing, Store, find_set_aside
from jaxfm.errors import DamagedError
from jaxfm.storage.lease import Record, read_lease

COMMITTED = 'committed'
FENCED_OFF = 'fenced off'  # committed by a writer that had been replaced: it does not count
DAMAGED = 'damaged'  # committed, but the commit or the manifest has changed since
TORN = 'torn'  # never committed
SET_ASIDE = 'set aside'  # was committed, and no longer counts: the run has gone back before it
UNFINISHED = 'unfinished'  # not committed, but its writer may still be working


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One attempt to save a step. manifest: {} if it is missing or unreadable."""

    step: int
    name: str
    state: str
    size: int  # bytes
    modified: float  # Unix time in seconds, by the storage's clock
    manifest: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Survey:
    """All attempts, ordered by step, and the lease (None if there is none)."""

    attempts: list[Attempt]
    lease: Record | None


def survey(store: Store) -> Survey:
    """Surveys a store. Reads only names, commits and manifests, never the arrays."""
    listing = store.storage.list()
    lease = read_lease(store.storage, listing)
    counted, written = store.commits(listing), store.all_commits(listing)
    unfinished = UNFINISHED if lease is not None and lease.is_held else TORN
    attempts, aside = [], find_set_aside(listing)
    for step, name in sorted(_names(listing, written)):
        commit = written.get(step)
        if f'{step}/{name}' in aside and (commit is None or commit.attempt != name):
            commit, state = Commit(step, name, -1, ''), SET_ASIDE
        elif commit is None or commit.attempt not in ('', name):
            commit, state = Commit(step, name, -1, ''), unfinished
        elif not commit.attempt:
            commit, state = Commit(step, name, -1, ''), DAMAGED
        else:
            state = COMMITTED if step in counted else FENCED_OFF
        manifest, is_whole = _manifest(store, commit)
        files = [listing[one] for one in listing if one.startswith(f'{commit.directory}/')]
        attempts.append(
            Attempt(
                step=step,
                name=name,
                state=state if is_whole or state != COMMITTED else DAMAGED,
                size=sum(file.size for file in files),
                modified=max((file.modified for file in files), default=0.0),
                manifest=manifest,
            )
        )
    return Survey(attempts, lease)


def _names(listing: Listing, written: dict[int, Commit]) -> set[tuple[int, str]]:
    """{(step, attempt)} of every attempt that is stored or that a commit refers to."""
    there = collections.defaultdict(set)
    for name in listing:
        parts = name.split('/')
        if len(parts) > 2 and parts[0].isdecimal():
            there[int(parts[0])].add(parts[1])
    for step, commit in written.items():
        if commit.attempt or not there[step]:
            there[step].add(commit.attempt)
    return {(step, name) for step, names in there.items() for name in names}


def _manifest(store: Store, commit: Commit) -> tuple[dict[str, Any], bool]:
    """(the manifest as far as it can be read, whether it is the one that was committed)."""
    try:
        return store.manifest(commit), True
    except DamagedError:
        pass
    try:
        manifest = json.loads(store.storage.read(f'{commit.directory}/manifest.json'))
    except (FileNotFoundError, ValueError):
        return {}, False
    return manifest if isinstance(manifest, dict) else {}, False

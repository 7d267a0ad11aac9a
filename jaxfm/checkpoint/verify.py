"""Checks that a committed step is what was saved: all of its files and all of its arrays.

A restore checks only what its run reads, and stops at the first error. This reads everything, chunk
by chunk on one device whatever mesh wrote it, and reports all damage.
"""

import collections
from typing import Any

import jax

from jaxfm.checkpoint import arrays
from jaxfm.checkpoint.fingerprint import fingerprint_of_part
from jaxfm.checkpoint.saver import explain
from jaxfm.checkpoint.store import Commit, Store
from jaxfm.errors import DamagedError, PermissionDeniedError, UnavailableError
from jaxfm.storage.arrays import ERRORS, kind_of

# Time-out for one chunk: longer than all retries of the requests it needs.
CHUNK_SECONDS = 300


def find_damages(store: Store, commit: Commit) -> list[DamagedError]:
    """An error for every part of a step that differs from what was saved; [] if none does.

    Raises:
      UnavailableError, PermissionDeniedError: the storage cannot be read.
      DataError: the step has another format.
    """
    try:
        manifest = store.manifest(commit)
    except DamagedError as error:  # without a manifest there is nothing to compare with
        return [error]
    store.check_version(commit.step, manifest['version'])
    files = [store.damaged_error(commit.step, what) for what in store.differences(commit, manifest)]
    return files + _check_arrays(store, commit, manifest)


def leaves_of(arrays: dict[str, dict]) -> dict[str, jax.ShapeDtypeStruct]:
    """{name: shape and dtype} of arrays as a manifest describes them."""
    return {
        name: jax.ShapeDtypeStruct(tuple(entry['shape']), jax.numpy.dtype(entry['dtype']))
        for name, entry in arrays.items()
    }


def explain_read(error: Exception, store: Store, step: int, what: str = 'it') -> Exception:
    """The error to raise when part of a step cannot be read: damaged, unreachable or forbidden.

    An error that TensorStore did not raise (a device out of memory, say) is returned unchanged.
    """
    if not isinstance(error, ERRORS):
        return error
    root, text, kind = store.storage.root, explain(error, store), kind_of(error)
    if kind is PermissionDeniedError:
        return kind(f'no permission to read checkpoint {step} in {root}: {text}')
    if kind is UnavailableError:
        return kind(f'checkpoint {step} in {root} cannot be reached: {text}')
    return store.damaged_error(step, f'{what} cannot be read: {text}')


def _check_arrays(store: Store, commit: Commit, manifest: dict[str, Any]) -> list[DamagedError]:
    leaves, damaged = leaves_of(manifest['arrays']), {}
    prints = collections.Counter()
    base = store.storage.kvstore(f'{commit.directory}/state')
    for name, start, chunk in arrays.read_chunks(base, leaves, CHUNK_SECONDS):
        if not isinstance(chunk, Exception):
            prints[name] += fingerprint_of_part(chunk, leaves[name].shape, start)
            continue
        damaged[name] = explain_read(chunk, store, commit.step, f'array {name}')
        if not isinstance(damaged[name], DamagedError):
            raise damaged[name]
    for name, entry in manifest['arrays'].items():
        if name not in damaged and prints[name] % 2**32 != entry['fingerprint']:
            damaged[name] = store.damaged_error(commit.step, f'array {name}')
    return list(damaged.values())

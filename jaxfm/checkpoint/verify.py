"""Whether a committed step is what was saved: every file of it and every array.

A restore compares what one run reads, and stops at the first thing that is wrong. Here everything
is read, chunk by chunk on one device whatever mesh wrote it, and all that is wrong is named.
"""

import collections
import re
from typing import Any

import jax

from jaxfm.checkpoint import arrays
from jaxfm.checkpoint.fingerprint import fingerprint_of_part
from jaxfm.checkpoint.saver import explain
from jaxfm.checkpoint.store import Commit, Store
from jaxfm.errors import DamagedError, PermissionDeniedError, UnavailableError

# How TensorStore says that a server, and not the data, is the matter. It notes the status of an
# answer, except where that means that an object or a part of it is not there.
_OUT_OF_REACH = re.compile(
    '^(UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|CANCELLED|RESOURCE_EXHAUSTED):'
    '|CURL error|http_response_code'
)
_FORBIDDEN = re.compile(
    '^(PERMISSION_DENIED|UNAUTHENTICATED):|ExpiredToken|InvalidToken|TokenRefreshRequired'
)
# Patience with one chunk: longer than all tries of the requests it needs.
CHUNK_SECONDS = 300


def find_damages(store: Store, commit: Commit) -> list[DamagedError]:
    """Everything of a step that is not as it was saved; [] when it is whole.

    Raises:
      UnavailableError, PermissionDeniedError: the storage does not let itself be read.
    """
    try:
        manifest = store.manifest(commit)
    except DamagedError as error:  # nothing else can be known
        return [error]
    files = [store.damaged_error(commit.step, what) for what in store.differences(commit, manifest)]
    return files + _check_arrays(store, commit, manifest)


def leaves_of(manifest: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """{name: shape and dtype} of the arrays of a step."""
    return {
        name: jax.ShapeDtypeStruct(tuple(entry['shape']), jax.numpy.dtype(entry['dtype']))
        for name, entry in manifest['arrays'].items()
    }


def explain_read(error: Exception, store: Store, step: int, what: str = 'it') -> Exception:
    """The error for what could not be read of a step: it is damaged, or only out of reach.

    What TensorStore did not raise, such as a device that is out of memory, stays what it is.
    """
    if not isinstance(error, TimeoutError | ValueError | LookupError | NotImplementedError):
        return error
    root, text = store.storage.root, explain(error, store)
    if _FORBIDDEN.search(str(error)):
        return PermissionDeniedError(f'checkpoint {step} in {root} may not be read: {text}')
    if isinstance(error, TimeoutError) or _OUT_OF_REACH.search(str(error)):
        return UnavailableError(f'checkpoint {step} in {root} cannot be reached: {text}')
    return store.damaged_error(step, f'{what} cannot be read: {text}')


def _check_arrays(store: Store, commit: Commit, manifest: dict[str, Any]) -> list[DamagedError]:
    leaves, damaged = leaves_of(manifest), {}
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

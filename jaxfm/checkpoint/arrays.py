"""Reads and writes sharded arrays with TensorStore: one zarr3 array per name, in an OCDBT database.

OCDBT packs small arrays into few files, writes its single manifest last, and reports a lost chunk
as an error, where plain zarr would read zeros. Each process writes the shards that it owns into its
own database; `merge` combines these into one database, which any mesh can read.
"""

import collections
import dataclasses
import itertools
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from jaxfm.storage.arrays import CONTEXT

# Target size of a chunk, the unit of reading: a restore on another mesh reads whole chunks.
CHUNK_BYTES = 32 << 20
_CRUMBS = 8  # how many times smaller than its target size a chunk may become
# Target size of a data file or object: well below what S3 accepts in one request.
FILE_BYTES = 256 << 20
# Read-ahead limit of a restore: bytes read but not yet on the devices.
BYTES_IN_FLIGHT = 2 << 30
# Read-ahead limit of `read_chunks`.
CHUNKS_IN_FLIGHT = 8
# How quickly a wait notices that its deadline was moved.
POLL_SECONDS = 0.2

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The shards of a global array that this process writes, in host memory.

    They stay as they are if the array is deleted or donated. From a GPU they are copied. On CPU
    they are views of the array's own memory, which XLA leaves alone while a view exists: a step to
    which the array is donated then works on a copy. (An array over a NumPy array's memory changes
    with that; no state of a run is one.)
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    pieces: list[tuple[Index, np.ndarray]]

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for _, piece in self.pieces)


@dataclasses.dataclass
class Deadline:
    """A time on the monotonic clock; waiting past it raises TimeoutError, in any thread."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> 'Deadline':
        return cls(time.monotonic() + seconds)

    @property
    def left(self) -> float:
        return max(self.at - time.monotonic(), 0.001)

    @property
    def passed(self) -> bool:
        return time.monotonic() > self.at

    def expire(self) -> None:
        """Ends all current waits, within POLL_SECONDS."""
        self.at = -math.inf

    def result(self, future) -> Any:
        """The result of a TensorStore future. Raises TimeoutError at the deadline."""
        while True:
            try:
                return future.result(timeout=min(self.left, POLL_SECONDS))
            except TimeoutError:
                if self.passed:
                    raise


def snapshots(arrays: dict[str, jax.Array], every_local: bool = False) -> dict[str, Snapshot]:
    """{name: the shards that this process writes}; the arrays may then be donated.

    every_local: every distinct shard that this process holds, even if another process holds the
    same one. For a tier where each process has its own directory.
    """
    chosen = {name: _shards(array, every_local) for name, array in arrays.items()}
    for shards in chosen.values():
        for shard in shards:
            shard.data.copy_to_host_async()
    return {name: _snapshot(arrays[name], shards) for name, shards in chosen.items()}


def _shards(array: jax.Array, every_local: bool) -> list:
    if not every_local:
        return [shard for shard in array.addressable_shards if shard.replica_id == 0]
    distinct = {_key(shard.index): shard for shard in array.addressable_shards}
    return list(distinct.values())


def _snapshot(array: jax.Array, shards: list) -> Snapshot:
    pieces = [(shard.index, np.asarray(shard.data)) for shard in shards]
    part = array.sharding.shard_shape(array.shape)
    chunk = _chunk(part, array.shape, array.dtype.itemsize)
    return Snapshot(array.shape, array.dtype, chunk, pieces)


def _chunk(part: tuple[int, ...], shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The chunk shape of an array whose shards have shape `part`; no chunk has two writers.

    A sharded axis is cut into equal chunks. If that would make them far too small (for example,
    when its size is prime), the next axis is cut instead. Along an axis that is not sharded, the
    last chunk may be smaller.
    """
    chunk = list(part)
    for axis, (size, whole) in enumerate(zip(part, shape)):
        pieces = math.ceil(math.prod(chunk) * itemsize / CHUNK_BYTES)
        if size > 1 and pieces > 1:
            least = min(pieces, size)
            even = next(n for n in range(least, size + 1) if size % n == 0)
            if size == whole:
                chunk[axis] = math.ceil(size / least)
            elif even <= _CRUMBS * least:
                chunk[axis] = size // even
    return tuple(chunk)


def write(base: dict, arrays: dict[str, Snapshot], deadline: Deadline) -> None:
    """Writes a new database at `base`; it is durable on return.

    Raises TensorStore's ValueError, or TimeoutError. After an error, what was written so far is not
    a readable database.
    """
    context = ts.Context(CONTEXT)
    transaction = ts.Transaction(atomic=True)
    stores = {
        name: ts.open(
            _spec(base, name),
            create=True,
            # The place is empty. But if the reply to the last write is lost, TensorStore repeats
            # everything, and its own first attempt must not make that fail.
            delete_existing=True,
            dtype=ts.dtype(part.dtype),
            shape=part.shape,
            chunk_layout=ts.ChunkLayout(write_chunk_shape=part.chunk, read_chunk_shape=part.chunk),
            context=context,
            transaction=transaction,
        )
        for name, part in arrays.items()
    }
    writes = []
    try:
        for name, part in arrays.items():
            store = deadline.result(stores[name])
            for index, piece in part.pieces:
                # The host copies never change, so TensorStore need not copy them again.
                writes.append(
                    store[index].write(piece, can_reference_source_data_indefinitely=True)
                )
        for one in writes:
            deadline.result(one)
        deadline.result(transaction.commit_async())
    except BaseException:
        transaction.abort()
        raise


def merge(base: dict, parts: Iterable[dict], deadline: Deadline) -> None:
    """Combines the processes' databases below `base` into one at `base`.

    The parts must stay: the new database refers to their data files.
    """
    context = ts.Context(CONTEXT)
    whole = deadline.result(ts.KvStore.open(_database(base), context=context))
    transaction = ts.Transaction(atomic=True)
    copies = []
    for part in parts:
        child = deadline.result(ts.KvStore.open(_database(part), context=context))
        copies.append(child.experimental_copy_range_to(whole.with_transaction(transaction)))
    for copy in copies:
        deadline.result(copy)
    deadline.result(transaction.commit_async())


def read(base: dict, wanted: dict[str, jax.ShapeDtypeStruct], deadline: Deadline) -> dict:
    """Reads {name: array} onto the shardings of `wanted`, whatever mesh wrote the arrays.

    Raises TensorStore's ValueError if data is missing, truncated or unreachable, and TimeoutError
    at the deadline.
    """
    context = ts.Context(CONTEXT)
    stores = {name: ts.open(_spec(base, name), open=True, context=context) for name in wanted}
    on_devices: dict[str, list] = {name: [] for name in wanted}
    for name, devices, piece in _pieces(stores, wanted, deadline):
        on_devices[name] += [jax.device_put(piece, device) for device in devices]
    return {
        name: jax.make_array_from_single_device_arrays(
            leaf.shape, leaf.sharding, on_devices[name], dtype=leaf.dtype
        )
        for name, leaf in wanted.items()
    }


def read_chunks(
    base: dict, wanted: dict[str, Any], seconds: float
) -> Iterator[tuple[str, tuple[int, ...], np.ndarray | Exception]]:
    """Yields (name, start index, chunk) for every chunk of every array, in order, with read-ahead.

    If a chunk cannot be read, the exception takes its place, because the others may be intact.

    wanted: {name: leaf with a shape and a dtype}. seconds: time-out for one chunk.
    """
    context = ts.Context(CONTEXT | {'cache_pool': {'total_bytes_limit': 0}})  # no chunk is reread
    stores = {name: ts.open(_spec(base, name), open=True, context=context) for name in wanted}
    waiting = collections.deque()
    for chunk in _chunks(stores, wanted, seconds):
        waiting.append(chunk)
        if len(waiting) > CHUNKS_IN_FLIGHT:
            yield _outcome(*waiting.popleft(), seconds)
    while waiting:
        yield _outcome(*waiting.popleft(), seconds)


def _chunks(stores, wanted, seconds: float) -> Iterator[tuple[str, tuple[int, ...], ts.Future]]:
    for name, leaf in wanted.items():
        try:
            store = _await_store(stores[name], name, leaf, Deadline.after(seconds))
        except Exception as error:
            promise, future = ts.Promise.new()
            promise.set_exception(error)
            yield name, (0,) * len(leaf.shape), future
            continue
        parts = store.chunk_layout.read_chunk.shape or ()
        steps = [range(0, size, part or 1) for size, part in zip(store.shape, parts)]
        for start in itertools.product(*steps):
            ends = [min(at + part, size) for at, part, size in zip(start, parts, store.shape)]
            yield name, start, store[tuple(map(slice, start, ends))].read(order='C')


def _outcome(name: str, start: tuple[int, ...], future, seconds: float) -> tuple:
    try:
        return name, start, Deadline.after(seconds).result(future)
    except Exception as error:
        return name, start, error


def _pieces(stores, wanted, deadline) -> Iterator[tuple[str, list, np.ndarray]]:
    """Yields (name, devices, the shard that they hold), reading ahead by BYTES_IN_FLIGHT."""
    waiting, nbytes = collections.deque(), 0
    for name, leaf in wanted.items():
        store = _await_store(stores[name], name, leaf, deadline)
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for index, devices in _holders(leaf):
            while waiting and nbytes + size > BYTES_IN_FLIGHT:
                nbytes -= waiting[0][-1]
                yield _await_piece(waiting.popleft(), deadline)
            waiting.append((name, devices, store[index].read(order='C'), size))
            nbytes += size
    while waiting:
        yield _await_piece(waiting.popleft(), deadline)


def _await_store(opening, name: str, leaf, deadline: Deadline):
    store = deadline.result(opening)
    if store.shape != leaf.shape or store.dtype.numpy_dtype != leaf.dtype:
        raise ValueError(f'array {name} is stored as {store.dtype.name} {list(store.shape)}')
    return store


def _await_piece(read: tuple, deadline: Deadline) -> tuple[str, list, np.ndarray]:
    name, devices, future, _ = read
    return name, devices, deadline.result(future)


def _holders(leaf: jax.ShapeDtypeStruct) -> list[tuple[Index, list]]:
    """[(index, devices)]: every distinct shard on devices of this process, and those devices."""
    holders: dict[tuple, tuple[Index, list]] = {}
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        holders.setdefault(_key(index), (index, []))[1].append(device)
    return list(holders.values())


def _key(index: Index) -> tuple:
    return tuple((one.start, one.stop) for one in index)


def _spec(base: dict, name: str) -> dict:
    return {
        'driver': 'zarr3',
        'kvstore': _database(base) | {'path': f'{name.replace("/", ".")}/'},  # as Orbax names it
        # Orbax expects every chunk, also one of zeros only.
        'store_data_equal_to_fill_value': True,
    }


def _database(base: dict) -> dict:
    return {
        'driver': 'ocdbt',
        'base': base,
        'target_data_file_size': FILE_BYTES,
        'cache_pool': 'cache_pool#index',  # the B-tree of chunks, cached apart from their data
    }

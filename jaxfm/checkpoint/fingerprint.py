"""A fingerprint of an array's contents that does not depend on how the array is sharded.

It is the sum, modulo 2^32, of a hash of each element's bits and its index in the global array. The
sum does not depend on order, so every mesh gives exactly the same number. It is computed on the
devices: from the live arrays at a save, and from the arrays just read at a restore, so it needs no
extra reads from storage.

At a fixed index the hash is a bijection of the bits. Changing one element therefore always changes
the sum; changing several goes unnoticed with probability 2^-32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfm.distributed import agree

# The 32-bit finalizer of MurmurHash3 (Appleby, 2011): its odd multipliers, and its shifts below.
# The golden ratio spreads the indices.
_SPREAD, _FIRST, _SECOND = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35
# XLA's CPU backend reduces one number at a time, but adds whole slices as vectors.
_SLICES = 8
_MANY, _FEW = 1 << 20, 1 << 12  # slice arrays larger than _MANY, until _FEW elements are left
_NO_MESH = jax.sharding.Mesh(np.empty((), object), ())  # for arrays on a single device


class Fingerprint:
    """A fingerprint that the devices are computing; creating one does not wait for them.

    No device communicates with another: each sums up its own shard, and the host adds the sums.
    The array may be donated at once.
    """

    def __init__(self, array: jax.Array):
        place = array.sharding
        # The caller's current mesh may be a different one.
        with jax.set_mesh(getattr(place, 'mesh', _NO_MESH)):
            self._sums = _sum_shards(array, getattr(place, 'spec', None))
        # Every shard is counted once, also if several devices hold it.
        self._counted = {s.device for s in array.addressable_shards if s.replica_id == 0}

    def part(self) -> int:
        """The contribution of this process's shards, modulo 2^32; waits for the devices."""
        shards = self._sums.addressable_shards
        return sum(int(s.data.item()) for s in shards if s.device in self._counted) % 2**32


def fingerprints(arrays: dict[str, jax.Array]) -> dict[str, int]:
    """{name: fingerprint} of global arrays of any dtype and sharding; all processes must call it.

    One array at a time: arrays of the same shape share a compiled program, while one program for
    all arrays would take seconds to compile.
    """
    with jax.transfer_guard('allow'):
        started = [Fingerprint(array) for array in arrays.values()]
        return dict(zip(arrays, add_up([one.part() for one in started])))


def add_up(parts: list[int], name: str = '', timeout_seconds: float = agree.NEVER) -> list[int]:
    """The fingerprints whose parts every process gives, on all processes.

    name and timeout_seconds are those of `agree.from_primary`.
    """
    return [total % 2**32 for total in agree.sums(parts, name, timeout_seconds)]


def fingerprint_of_part(part: np.ndarray, shape: tuple[int, ...], start: tuple[int, ...]) -> int:
    """The contribution of one part of an array to the array's fingerprint, modulo 2^32.

    shape: of the whole array. start: the index of the part's first element.
    """
    first = 0
    for size, begin in zip(shape, start):
        first = first * size + begin
    with jax.enable_x64(part.dtype.itemsize > 4):  # or JAX would cut 64-bit elements to 32 bits
        words = max(part.dtype.itemsize // 4, 1)
        return int(_fingerprint_of_part(part, shape, np.uint32(first * words % 2**32)))


@functools.partial(jax.jit, static_argnums=1)
def _fingerprint_of_part(part: jax.Array, shape: tuple[int, ...], first: jax.Array) -> jax.Array:
    return _sum(_hash(part, shape, {}, first))


@functools.partial(jax.jit, static_argnums=1)
def _sum_shards(array: jax.Array, spec: jax.P | None) -> jax.Array:
    """[devices] sums, each of the device's own shard and on that device.

    spec: how the array is sharded over the current mesh; None if it is on a single device.
    """
    if spec is None:
        return _sum(_hash(array, array.shape, {}))[None]
    # A dimension may be sharded over several mesh axes, and an array over none.
    axes = {
        dim: name if isinstance(name, tuple) else (name,)
        for dim, name in enumerate(spec)
        if name is not None
    }
    mesh = jax.sharding.get_abstract_mesh()

    @jax.shard_map(
        in_specs=spec,
        out_specs=jax.P(mesh.axis_names),
        mesh=mesh,
        check_vma=False,  # devices that hold the same shard give the same sum
    )
    def add_up_shard(part):
        return _sum(_hash(part, array.shape, axes))[None]

    return add_up_shard(array)


def _hash(part: jax.Array, shape: tuple[int, ...], axes: dict[int, tuple], first=0) -> jax.Array:
    """The uint32 hash of every element of a shard.

    shape: of the global array. axes: {dimension: mesh axes it is sharded over}. first: the index of
    the shard's first element, where `axes` does not give it.
    """
    words = _bits(part)
    index = jnp.asarray(first, jnp.uint32)
    stride = words.size // part.size if part.size else 1  # words per element
    if words.ndim > part.ndim:
        index = index + lax.broadcasted_iota(jnp.uint32, words.shape, part.ndim)
    for dim in reversed(range(part.ndim)):
        along = lax.broadcasted_iota(jnp.uint32, words.shape, dim)
        if dim in axes:
            along += lax.axis_index(axes[dim]).astype(jnp.uint32) * jnp.uint32(part.shape[dim])
        index = index + along * jnp.uint32(stride % 2**32)
        stride *= shape[dim]
    word = words + index * jnp.uint32(_SPREAD)
    word = (word ^ (word >> 16)) * jnp.uint32(_FIRST)
    word = (word ^ (word >> 13)) * jnp.uint32(_SECOND)
    return word ^ (word >> 16)


def _bits(array: jax.Array) -> jax.Array:
    """The bits as uint32; the words of wider elements lie along an additional last axis."""
    size = array.dtype.itemsize
    shape = array.shape + ((size // 4,) if size > 4 else ())
    if array.dtype == jnp.bool:
        array = array.astype(jnp.uint8)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag], axis=-1)
    word = {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32)
    words = lax.bitcast_convert_type(array, word)
    return words.astype(jnp.uint32).reshape(shape)


def _sum(words: jax.Array) -> jax.Array:
    is_sliced = False
    while words.size > (_FEW if is_sliced else _MANY):
        is_sliced = True
        dim = next((d for d, size in enumerate(words.shape) if size % _SLICES == 0), None)
        if dim is None:
            break
        size = words.shape[dim] // _SLICES
        words = sum(
            lax.slice_in_dim(words, first * size, (first + 1) * size, axis=dim)
            for first in range(_SLICES)
        )
        # Otherwise XLA may fuse this with the next round and write every element's hash to memory.
        words = lax.optimization_barrier(words)
    return jnp.sum(words, dtype=jnp.uint32)

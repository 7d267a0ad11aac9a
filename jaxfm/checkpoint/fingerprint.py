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

# The 32-bit finalizer of MurmurHash3 (Appleby, 2011): its odd multipliers, and its shifts below.
# The golden ratio spreads the indices.
_SPREAD, _FIRST, _SECOND = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35
# XLA's CPU backend reduces one number at a time, but adds whole slices as vectors.
_SLICES = 8
_MANY, _FEW = 1 << 20, 1 << 12  # slice arrays larger than _MANY, until _FEW elements are left
_NO_MESH = jax.sharding.Mesh(np.empty((), object), ())  # for arrays on a single device


def fingerprints(arrays: dict[str, jax.Array]) -> dict[str, int]:
    """{name: fingerprint} of global arrays of any dtype and sharding; all processes must call it.

    One array at a time: arrays of the same shape share a compiled program, while one program for
    all arrays would take seconds to compile.
    """
    with jax.transfer_guard('allow'):
        return {name: int(start_fingerprint(array)) for name, array in arrays.items()}


def start_fingerprint(array: jax.Array) -> jax.Array:
    """Starts computing a fingerprint, a uint32 on the devices; does not wait for it.

    Run one at a time: with several CPU devices, XLA aborts when many programs are in flight.
    """
    # The caller's current mesh may be a different one.
    with jax.set_mesh(getattr(array.sharding, 'mesh', _NO_MESH)):
        return _fingerprint(array)


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


@jax.jit
def _fingerprint(array: jax.Array) -> jax.Array:
    sharding = jax.typeof(array).sharding
    if sharding.mesh.empty:  # an array on a single device
        return _sum(_hash(array, array.shape, {}))
    # A dimension may be sharded over several mesh axes, and an array over none.
    axes = {
        dim: name if isinstance(name, tuple) else (name,)
        for dim, name in enumerate(sharding.spec)
        if name is not None
    }

    @jax.shard_map(in_specs=sharding.spec, out_specs=jax.P(), mesh=sharding.mesh)
    def add_up(part):
        total = _sum(_hash(part, array.shape, axes))
        return lax.psum(total, sum(axes.values(), ())) if axes else total

    return add_up(array)


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

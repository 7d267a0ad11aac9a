"""Many small arrays as one: each array that goes to the device or comes back has a cost of its own.

With one sequence and a tiny model, 17 arrays there and 7 back took longer than the decode step.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfm.sharding import place

Layout = tuple[tuple[str, int | None, str], ...]  # (name, numbers of a row or None, dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """Arrays of 32-bit numbers with a common first axis, side by side as [B, W] int32."""

    data: jax.Array | np.ndarray
    layout: Layout = dataclasses.field(metadata={'static': True})


def pack(arrays: dict) -> Packed:
    """Host arrays [B] or [B, N] of 4 bytes a number, in nested dicts -> one array."""
    flat = dict(_flatten(arrays))
    columns = [x.reshape(len(x), -1).view(np.int32) for x in flat.values()]
    layout = [(name, x.shape[1] if x.ndim > 1 else None, x.dtype.name) for name, x in flat.items()]
    return Packed(np.concatenate(columns, axis=1), tuple(layout))


def unpack(packed: Packed) -> dict:
    """The arrays, in nested dicts; within a program."""
    arrays, start = {}, 0
    for name, width, dtype in packed.layout:
        stop = start + (width or 1)
        columns = lax.bitcast_convert_type(packed.data[:, start:stop], jnp.dtype(dtype))
        *groups, last = name.split('/')
        group = functools.reduce(lambda group, key: group.setdefault(key, {}), groups, arrays)
        # An array of one element forgets its sharding when it is cut or squeezed (jax 0.11).
        group[last] = (
            place(columns[:, 0], 'batch') if width is None else place(columns, 'batch', None)
        )
        start = stop
    return arrays


def pack_columns(arrays) -> jax.Array:
    """Arrays [K, B] or [K, B, N] -> [K, B, W] int32; within a program."""
    columns = [x if x.ndim == 3 else x[..., None] for x in arrays]
    columns = [x.astype(jnp.int32) if x.dtype == jnp.bool_ else x for x in columns]
    return jnp.concatenate([lax.bitcast_convert_type(x, jnp.int32) for x in columns], axis=-1)


def unpack_columns(data: np.ndarray, like) -> list[np.ndarray]:
    """Reverts `pack_columns` on the host.

    Args:
      like: (numbers of a row or None, dtype) of each array.
    """
    arrays, start = [], 0
    for width, dtype in like:
        stop = start + (width or 1)
        columns = np.ascontiguousarray(data[..., start:stop])
        columns = columns.astype(bool) if dtype is bool else columns.view(dtype)
        arrays.append(columns[..., 0] if width is None else columns)
        start = stop
    return arrays


def _flatten(arrays: dict, prefix: str = ''):
    for name, value in arrays.items():
        if isinstance(value, dict):
            yield from _flatten(value, f'{prefix}{name}/')
        else:
            yield prefix + name, value

"""Embedding lookup: rows of a table by token id.

B batch, T position, V vocab, D embed.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxfm.sharding import activation, per_shard, place, split_axes


def look_up(table_VD, tokens_BT, dtype):
    """-> [B, T, D] in `dtype`.

    The table's gradient is summed in float32 on each device, because a bfloat16 sum of ones stops
    at 256, and in the table's dtype across devices.
    """
    # If no axis is gathered, the table's type still has the sharding of a stored weight.
    table_VD = place(table_VD, 'vocab', 'embed')
    return _look_up(table_VD, tokens_BT, jnp.dtype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _look_up(table_VD, tokens_BT, dtype):
    spec = activation('batch', 'position', 'embed')
    return table_VD.at[tokens_BT].get(out_sharding=spec).astype(dtype)


def _forward(table_VD, tokens_BT, dtype):
    # An array without elements carries the table's size and dtype to the backward pass.
    about = jnp.zeros((table_VD.shape[0], 0), table_VD.dtype)
    return _look_up(table_VD, tokens_BT, dtype), (tokens_BT, about)


def _backward(dtype, residuals, gradient_BTD):
    tokens_BT, about = residuals
    vocab, rows = split_axes('vocab'), split_axes('batch', 'position')

    # Written by hand: autodiff would sum over devices in float32, before the cast.
    def shard(tokens_BT, gradient_BTD):
        size = about.shape[0] // lax.axis_size(vocab) if vocab else about.shape[0]
        ids = tokens_BT - lax.axis_index(vocab) * size if vocab else tokens_BT
        ids = jnp.where(ids < 0, size, ids)  # another device's id: out of bounds, dropped
        sums_VD = jnp.zeros((size, gradient_BTD.shape[-1]), jnp.float32)
        sums_VD = sums_VD.at[ids].add(gradient_BTD.astype(jnp.float32), mode='drop')
        sums_VD = sums_VD.astype(about.dtype)
        return lax.psum(sums_VD, rows) if rows else sums_VD

    names = ('batch', 'position')
    table_gradient = per_shard(shard, (names, (*names, 'embed')), ('vocab', 'embed'))
    return table_gradient(tokens_BT, gradient_BTD), None


_look_up.defvjp(_forward, _backward)

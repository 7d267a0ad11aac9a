"""Sums over the segments of packed rows."""

import functools

import jax
import jax.numpy as jnp

from jaxfm.sharding import per_shard, split_axes

_ROWS = ('batch', 'position')


def segment_sums(values_BT, segment_ids_BT):
    """The sum over each position's segment of its row, [B, T]. Padding is a segment, too.

    Args:
      segment_ids_BT: at least 0, at most T.
    """
    segments = segment_ids_BT.shape[1] + 1  # those of the whole row, of which a device has a part

    def shard(values_BT, segment_ids_BT):
        sum_row = functools.partial(jax.ops.segment_sum, num_segments=segments)
        sums_BS = jax.vmap(sum_row)(values_BT, segment_ids_BT)
        if axes := split_axes('position'):
            sums_BS = jax.lax.psum(sums_BS, axes)
        return jnp.take_along_axis(sums_BS, segment_ids_BT, axis=1)

    return per_shard(shard, (_ROWS, _ROWS), _ROWS)(values_BT, segment_ids_BT)

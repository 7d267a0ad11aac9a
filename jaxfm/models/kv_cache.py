"""The contiguous key-value cache: slot s of a row holds the token at position s.

A layer only ever calls `update`, which stores new keys and returns the view that attention reads.
R repeats of a segment, B row, S slot, K kv heads, H head dim.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxfm.models import TransformerConfig
from jaxfm.ops.attention import KeyValues
from jaxfm.sharding import activation, per_shard, place


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer [B, S, K, H], or of a stack of layers [R, B, S, K, H]."""

    k: jax.Array
    v: jax.Array

    def update(self, k_BTKH, v_BTKH, positions_BT, segment_ids_BT):
        """Stores keys at their positions (padding is dropped) -> (cache, view of all slots).

        Slots that were never written, or belong to an earlier request, lie in the query's future
        and are masked by position alone.
        """
        slots = self.k.shape[1]
        at_BT = jnp.where(segment_ids_BT > 0, positions_BT, slots)  # beyond the end: dropped
        cache = LayerCache(_store(self.k, k_BTKH, at_BT), _store(self.v, v_BTKH, at_BT))
        slot_BS = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (self.k.shape[0], slots))
        return cache, KeyValues(cache.k, cache.v, slot_BS, jnp.ones_like(slot_BS))


def _store(cache_BSKH, new_BTKH, at_BT):
    store = jax.vmap(lambda row, new, at: row.at[at].set(new, mode='drop'))
    heads = ('batch', 'key_position', 'kv_heads', 'head_dim')
    store = per_shard(store, (heads, heads, ('batch', 'key_position')), heads)
    new_BTKH = place(new_BTKH.astype(cache_BSKH.dtype), *heads)
    return store(cache_BSKH, new_BTKH, place(at_BT, 'batch', 'key_position'))


def init_cache(config: TransformerConfig, rows: int, length: int, dtype) -> list[list[LayerCache]]:
    """Zero caches for `rows` sequences of up to `length` tokens, one stack a pattern position."""
    spec = activation('layers', 'batch', 'key_position', 'kv_heads', 'head_dim')

    def stack(block, repeats):
        shape = (repeats, rows, length, block.num_kv_heads, block.head_dim)
        return LayerCache(*(jnp.zeros(shape, dtype, out_sharding=spec) for _ in 'kv'))

    return [[stack(block, s.repeats) for block in s.pattern] for s in config.trunk]

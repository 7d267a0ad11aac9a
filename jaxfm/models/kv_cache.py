"""The contiguous key-value cache: slot s of a row holds the token at position s.

A layer only calls `update`, which stores new keys and values and returns what attention reads.
R repeats of a segment, B row, S slot, K kv heads, H head dim.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxfm.models import TransformerConfig
from jaxfm.ops.attention import KeyValues
from jaxfm.sharding import activation, per_shard, place


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of a stack of layers, [R, B, S, K, H]; updated in place."""

    k: jax.Array
    v: jax.Array

    def update(self, layer, k_BTKH, v_BTKH, positions_BT, segment_ids_BT):
        """Stores a layer's keys and values at their positions -> (cache, the layer's KeyValues).

        Padding is not stored. Slots never written, or left by an earlier request, lie in the
        query's future, so the causal mask hides them.
        """
        rows, slots = self.k.shape[1:3]
        at_BT = jnp.where(segment_ids_BT > 0, positions_BT, slots)  # out of bounds: dropped
        cache = LayerCache(
            _store(self.k, layer, k_BTKH, at_BT), _store(self.v, layer, v_BTKH, at_BT)
        )
        slot_BS = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (rows, slots))
        k_BSKH, v_BSKH = (lax.dynamic_index_in_dim(x, layer, 0, False) for x in (cache.k, cache.v))
        return cache, KeyValues(k_BSKH, v_BSKH, slot_BS, jnp.ones_like(slot_BS))


def _store(cache_RBSKH, layer, new_BTKH, at_BT):
    def store(cache, layer, new, at):
        row = jnp.arange(new.shape[0], dtype=jnp.int32)[:, None]
        return cache.at[layer, row, at].set(new, mode='drop')

    heads = ('batch', 'key_position', 'kv_heads', 'head_dim')
    stacked, at = ('layers', *heads), ('batch', 'key_position')
    new_BTKH = place(new_BTKH.astype(cache_RBSKH.dtype), *heads)
    store = per_shard(store, (stacked, (), heads, at), stacked)
    return store(cache_RBSKH, jnp.asarray(layer), new_BTKH, place(at_BT, *at))


def init_cache(config: TransformerConfig, rows: int, length: int, dtype) -> list[list[LayerCache]]:
    """Empty caches for `rows` sequences of up to `length` tokens.

    Indexed [segment][position in its pattern]; each entry stacks all repeats of that block.
    """
    spec = activation('layers', 'batch', 'key_position', 'kv_heads', 'head_dim')

    def stack(block, repeats):
        shape = (repeats, rows, length, block.num_kv_heads, block.head_dim)
        return LayerCache(*(jnp.zeros(shape, dtype, out_sharding=spec) for _ in 'kv'))

    return [[stack(block, s.repeats) for block in s.pattern] for s in config.trunk]

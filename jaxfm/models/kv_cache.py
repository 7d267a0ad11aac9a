"""The paged key-value cache: every layer has a pool of pages, and sequences hold lists of them.

The token at position p of row b is in slot p % L of page page_table[b, p // L]. Page 0 takes what
padding writes, so no sequence may hold it. On a mesh the pages are split like the batch: each shard
has a pool of its own, to which its rows' tables refer. R repeats of a segment, P pages, L tokens of
a page, B row, T position, M most pages of a row, K kv heads, H head dim.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxfm.models import TransformerConfig
from jaxfm.ops.paged_attention import POOL, TABLE, Pages
from jaxfm.sharding import activation, per_shard, place

_NEW = ('batch', 'key_position', 'kv_heads', 'head_dim')
_AT = ('batch', 'key_position')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of a stack of layers, [R, P, L, K, H]; updated in place."""

    k: jax.Array
    v: jax.Array
    page_table_BM: jax.Array | None = None  # int32, the same for all layers

    def update(self, layer, k_BTKH, v_BTKH, positions_BT, segment_ids_BT) -> 'LayerCache':
        """Stores a layer's keys and values of new tokens. Padding (segment 0) goes to page 0."""
        at = place(positions_BT, *_AT), place(segment_ids_BT > 0, *_AT)
        store = per_shard(_store, (POOL, (), _NEW, TABLE, _AT, _AT), POOL)

        def stored(pool, new):
            new = place(new.astype(pool.dtype), *_NEW)
            return store(pool, jnp.asarray(layer), new, self.page_table_BM, *at)

        return dataclasses.replace(self, k=stored(self.k, k_BTKH), v=stored(self.v, v_BTKH))

    def pages(self, layer) -> Pages:
        """What attention reads in one layer of the stack."""
        return Pages(self.k, self.v, layer, self.page_table_BM)


def _store(pool_RPLKH, layer, new_BTKH, page_table_BM, positions_BT, is_token_BT):
    size = pool_RPLKH.shape[2]
    page_BT = jnp.take_along_axis(page_table_BM, positions_BT // size, axis=1, mode='clip')
    page_BT, slot_BT = jnp.where(is_token_BT, page_BT, 0), positions_BT % size
    if page_BT.size == 1:
        # Instead of a single write into the pool, XLA copies the pool (jax 0.11, CPU).
        page_BT, slot_BT = (jnp.pad(x, ((0, 0), (0, 1))) for x in (page_BT, slot_BT))
        new_BTKH = jnp.pad(new_BTKH, ((0, 0), (0, 1), (0, 0), (0, 0)))
    return pool_RPLKH.at[layer, page_BT, slot_BT].set(new_BTKH, mode='promise_in_bounds')


def init_cache(
    config: TransformerConfig, num_pages: int, page_size: int, dtype
) -> list[list[LayerCache]]:
    """Empty pools of `num_pages` pages (over all shards) of `page_size` tokens.

    Indexed [segment][position in its pattern]; each entry stacks all repeats of that block.
    """
    spec = activation(*POOL)

    def stack(block, repeats):
        shape = (repeats, num_pages, page_size, block.num_kv_heads, block.head_dim)
        return LayerCache(*(jnp.zeros(shape, dtype, out_sharding=spec) for _ in 'kv'))

    return [[stack(block, s.repeats) for block in s.pattern] for s in config.trunk]


def with_table(cache: list[list[LayerCache]], page_table_BM) -> list[list[LayerCache]]:
    """The same pools with another page table; None between calls of the model."""
    return [
        [dataclasses.replace(layers, page_table_BM=page_table_BM) for layers in segment]
        for segment in cache
    ]


def copy_pages(cache: list[list[LayerCache]], source_BC, target_BC) -> list[list[LayerCache]]:
    """Copies whole pages in all layers; equal source and target, such as 0 and 0, do nothing.

    Args:
      source_BC, target_BC: page indices, split like the batch: each shard copies in its own pool.
    """

    def copy(pool_RPLKH, source_BC, target_BC):
        return pool_RPLKH.at[:, target_BC.ravel()].set(pool_RPLKH[:, source_BC.ravel()])

    copy = per_shard(copy, (POOL, ('batch', None), ('batch', None)), POOL)
    return jax.tree.map(lambda pool: copy(pool, source_BC, target_BC), cache)

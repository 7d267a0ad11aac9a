"""Attention of new tokens to the keys and values in pages: for decoding and for chunks of prompts.

Plain jax.numpy walks over blocks of keys with an online softmax (Milakov and Gimelshein, 2018), as
many as the longest row needs, so that long page tables cost nothing, and the scores of all keys are
never in memory. A block that a query does not see changes nothing, not even the last bit: a row
does not depend on the lengths of others.

B batch, T query position, N heads, K kv heads, G = N / K, H head dim, R layers, P pages, L tokens a
page, M most pages of a row, S keys of a block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxfm.ops.attention import MASKED
from jaxfm.ops.batch_invariant import KEYS, attend_in_tiles
from jaxfm.ops.choice import choose
from jaxfm.sharding import per_shard, place, split_axes
from pallas_kernels import decode_attention as kernels

# Keys of a block (2 CPU cores, 2026-11-30, 16 rows of 300 tokens, 30 layers, 3 heads of 64: 134 ms
# with 64 keys, 161 with 128, 285 with 256). More queries fill larger blocks.
_LEAST_KEYS, _MOST_KEYS = 64, 512

# Logical axes of a pool of pages and of the page table.
POOL = ('layers', 'batch', None, 'kv_heads', 'head_dim')
TABLE = ('batch', None)


class Pages(NamedTuple):
    """Keys and values in the pages of a stack of layers, and the pages of each row."""

    k_RPLKH: jax.Array
    v_RPLKH: jax.Array
    layer: jax.Array | int  # the one to read
    page_table_BM: jax.Array


def paged_attention(
    q_BTNH,
    pages: Pages,
    positions_BT,
    segment_ids_BT,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    implementation: str | None = None,
    batch_invariant: bool = False,
):
    """softmax(scale * q k' with soft-cap and mask) v -> [B, T, N, H] in q's dtype.

    Key j of a row is in slot j % L of page page_table[j // L]. A query sees the keys up to its own
    position; those must have been stored. Padding (segment 0) gets zeros. Scores and softmax are
    float32. Table entries that no query sees may be anything, and so may what lies in their pages.

    Args:
      window: a query sees keys at distance < window; 0 is no limit.
      softcap: scores become cap * tanh(scores / cap); 0 is off.
      implementation: of the op `decode_attention`, for one query per row. More of them are always
      computed by XLA.
      batch_invariant: gives the bits of `attention` with the same word, in training.

    Raises:
      ValueError: the named implementation cannot run this call.
    """
    is_decoding = q_BTNH.shape[1] == 1
    name = 'xla'
    if is_decoding and not batch_invariant:
        name = _decode_implementation(q_BTNH, pages, implementation)
    attend = _by_tiles if batch_invariant else _walk if name == 'xla' else _kernel
    attend = functools.partial(attend, scale=scale, window=window, softcap=softcap)
    if name == 'interpret':
        attend = functools.partial(attend, interpret=True)
    rows = ('batch', None if is_decoding else 'position')
    queries = (*rows, None if batch_invariant else 'heads', 'head_dim')
    names = queries, POOL, POOL, (), TABLE, rows, rows
    arrays = q_BTNH, *pages[:2], jnp.asarray(pages.layer), pages.page_table_BM
    arrays += positions_BT, segment_ids_BT
    placed = (place(x, *axes) if axes else x for x, axes in zip(arrays, names))
    return place(per_shard(attend, names, queries)(*placed), *rows, 'heads', 'head_dim')


def obstacles(**shape) -> dict[str, str]:
    """{implementation: why it cannot decode such arrays, and what to use instead}.

    shape: the arguments of the kernel's `obstacle`.
    """
    problem = kernels.obstacle(**shape)
    return {'mosaic': f"{problem}; use 'xla'"} if problem else {}


def _decode_implementation(q_BTNH, pages: Pages, implementation: str | None) -> str:
    unsupported = obstacles(
        num_heads=q_BTNH.shape[2],
        num_kv_heads=pages.k_RPLKH.shape[3],
        head_dim=q_BTNH.shape[3],
        page_size=pages.k_RPLKH.shape[2],
        dtypes=(q_BTNH.dtype, pages.k_RPLKH.dtype, pages.v_RPLKH.dtype),
    )
    return choose('decode_attention', implementation, unsupported)


def _one_pool(k_RPLKH, v_RPLKH, layer, page_table_BM):
    """Pages of all layers as one pool, without a copy -> k, v [R * P, L, K, H] and the table."""
    R, P, *page = k_RPLKH.shape
    table_BM = jnp.clip(page_table_BM, 0, P - 1) + layer * P
    return k_RPLKH.reshape(R * P, *page), v_RPLKH.reshape(R * P, *page), table_BM


def _by_tiles(q_BTNH, k, v, layer, page_table_BM, positions_BT, segment_ids_BT, **options):
    """The loops of training over the same blocks of keys, so that every bit is the same.

    All heads are computed on every device that has a row, as in training.
    """
    k_PLKH, v_PLKH, table_BM = _one_pool(k, v, layer, page_table_BM)
    L, M = k_PLKH.shape[1], table_BM.shape[1]
    last_B = jnp.max(jnp.where(segment_ids_BT > 0, positions_BT, -1), axis=1)
    split = split_axes('kv_heads')

    def read(row, first):
        index_C = first + jnp.arange(KEYS, dtype=jnp.int32)
        page_C = table_BM[row, jnp.minimum(index_C // L, M - 1)]
        at = page_C, index_C % L
        block = [x.at[at].get(mode='promise_in_bounds') for x in (k_PLKH, v_PLKH)]
        if split:
            block = [lax.all_gather(x_CKH, split, axis=1, tiled=True) for x_CKH in block]
        return *block, index_C, (index_C <= last_B[row]).astype(jnp.int32)

    starts_BT = jnp.zeros_like(positions_BT)
    return attend_in_tiles(q_BTNH, positions_BT, segment_ids_BT, starts_BT, read, **options)


def _kernel(q_BTNH, k, v, layer, page_table_BM, positions_BT, segment_ids_BT, **options):
    """Our kernel for one query per row."""
    lengths_B = jnp.where(segment_ids_BT > 0, positions_BT + 1, 0)[:, 0]
    pool = _one_pool(k, v, layer, page_table_BM)
    return kernels.forward(q_BTNH[:, 0], *pool, lengths_B, **options)[0][:, None]


def _walk(
    q_BTNH, k, v, layer, page_table_BM, positions_BT, segment_ids_BT, *, scale, window, softcap
):
    """Online softmax over blocks of keys, up to the last key that any query sees."""
    B, T, N, H = q_BTNH.shape
    k_PLKH, v_PLKH, table_BM = _one_pool(k, v, layer, page_table_BM)
    L, K = k_PLKH.shape[1:3]
    num_pages = max(1, min(max(T, _LEAST_KEYS), _MOST_KEYS) // L)  # of a block
    S, M = num_pages * L, table_BM.shape[1]
    table_BM = jnp.pad(table_BM, ((0, 0), (0, -M % num_pages)))  # whole blocks
    q_BTKGH = (q_BTNH * scale).reshape(B, T, K, N // K, H)
    is_query_BT = segment_ids_BT > 0
    last_BT = jnp.where(is_query_BT, positions_BT, -1)
    last_B = jnp.max(last_BT, axis=1)
    first = jnp.min(jnp.where(is_query_BT, positions_BT - window + 1, M * L)) if window else 0

    def block(pool_PLKH, index):
        table = lax.dynamic_slice(table_BM, (0, index * num_pages), (B, num_pages))
        return pool_PLKH.at[table].get(mode='promise_in_bounds').reshape(B, S, K, H)

    def add(index, sums):
        most, total, out = sums
        at_11S = index * S + jnp.arange(S, dtype=jnp.int32)[None, None]
        scores = jnp.einsum(
            'btkgh,bskh->bkgts', q_BTKGH, block(k_PLKH, index), preferred_element_type=jnp.float32
        )
        if softcap:
            scores = softcap * jnp.tanh(scores / softcap)
        sees_BTS = at_11S <= last_BT[:, :, None]
        if window:
            sees_BTS &= last_BT[:, :, None] - at_11S < window
        sees = sees_BTS[:, None, None]
        scores = jnp.where(sees, scores, MASKED)
        more = jnp.maximum(most, jnp.max(scores, axis=-1))
        weights = jnp.where(sees, jnp.exp(scores - more[..., None]), 0.0)
        # What no query of the row sees may be NaN, which a weight of zero does not remove.
        is_seen_BS = at_11S[0] <= last_B[:, None]
        v_BSKH = jnp.where(is_seen_BS[:, :, None, None], block(v_PLKH, index), 0)
        shrink = jnp.exp(most - more)
        values = jnp.einsum(
            'bkgts,bskh->bkgth',
            weights.astype(v_BSKH.dtype),
            v_BSKH,
            preferred_element_type=jnp.float32,
        )
        return more, total * shrink + jnp.sum(weights, -1), out * shrink[..., None] + values

    shape = (B, K, N // K, T)
    sums = jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros((*shape, H))
    begin, end = jnp.maximum(first, 0) // S, (jnp.max(last_B) + S) // S
    _, total, out = lax.fori_loop(begin, end, add, sums)
    out = out / jnp.where(total > 0, total, 1.0)[..., None]  # padding sees nothing: zeros
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q_BTNH.dtype)

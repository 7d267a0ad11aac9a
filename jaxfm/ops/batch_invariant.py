"""Results that do not depend on the batch: for each token the same bits, whatever it is with.

Two programs that compute the same sum differ in the last bits: XLA picks a matrix product by the
number of rows, contracts `x * y + z` to one instruction within a fusion but not across two, and
computes `exp` of the last few elements of an array by other means. Here every op of a model runs in
a loop whose body has fixed shapes, on a few rows or queries at a time. A train step, a prefill of
any chunk and a decode step then run the same machine code for a token.

Gradients are those of the ordinary ops, of which only the inputs are saved.

B batch, T query position, S key position, N heads, K kv heads, G = N / K, H head dim, M rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxfm.sharding import per_shard, place, replicate, spec_of

ROWS = 32  # rows of a tile
QUERIES = 16  # queries of a tile, all of one document
KEYS = 64  # keys of a block

_MASKED = -1e30  # below every score, but finite


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiated_as(op, forward, *arguments):
    """forward(*arguments), with the gradients of op(*arguments)."""
    return forward(*arguments)


def _save_inputs(op, forward, *arguments):
    return forward(*arguments), arguments


def _ordinary_gradients(op, forward, arguments, cotangents):
    return jax.vjp(op, *arguments)[1](cotangents)


_differentiated_as.defvjp(_save_inputs, _ordinary_gradients)


def by_rows(op, rows: tuple, shared: tuple = (), *, on_tile=None):
    """op(*rows, *shared), with results for a row that are independent of all other rows.

    Args:
      op: the ordinary op; row [b, t] of its results depends on row [b, t] of `rows` alone.
      rows: arrays [B, T, ...], split over the mesh like a batch or more.
      shared: arrays, or pytrees of them, that all rows use, such as weights.
      on_tile: computes `op` on one device, on rows [1, M, ...]; by default `op` itself.
    """

    def forward(*arguments):
        rows_, shared_ = arguments[: len(rows)], arguments[len(rows) :]
        usual = jax.eval_shape(op, *arguments)
        whole = [place(x, *_names(x)) for x in rows_] + [
            jax.tree.map(replicate, x) for x in shared_
        ]
        names = [_names(x) for x in rows_] + [()] * len(shared_)
        loop = functools.partial(_loop_over_tiles, on_tile or op, len(rows))
        several = isinstance(usual, (tuple, list))
        outs = [_names(x) for x in usual] if several else _names(usual)
        return _reshard_like(usual, per_shard(loop, names, outs)(*whole))

    return _differentiated_as(op, forward, *rows, *shared)


def _names(x) -> tuple:
    return ('batch', 'position', *(None,) * (x.ndim - 2))


def _reshard_like(usual, results):
    if jax.sharding.get_abstract_mesh().empty:
        return results
    return jax.tree.map(lambda like, x: jax.reshard(x, spec_of(like)), usual, results)


def _loop_over_tiles(on_tile, count: int, *arguments):
    rows, shared = arguments[:count], arguments[count:]
    B, T = rows[0].shape[:2]
    tiles = -(-B * T // ROWS)
    # Two tiles at least: XLA would take the body out of a loop over one, and fuse it with others.
    padded = max(tiles, 2) * ROWS
    flat = [_pad_first(x.reshape(B * T, *x.shape[2:]), padded) for x in rows]
    first = [x[None, :ROWS] for x in flat]
    results = jax.eval_shape(on_tile, *first, *shared)
    leaves, structure = jax.tree.flatten(results)

    def add_tile(index, outs):
        tile = [lax.dynamic_slice_in_dim(x, index * ROWS, ROWS)[None] for x in flat]
        values = lax.optimization_barrier(on_tile(*lax.optimization_barrier(tile), *shared))
        return [
            lax.dynamic_update_slice_in_dim(out, value[0], index * ROWS, 0)
            for out, value in zip(outs, jax.tree.leaves(values))
        ]

    outs = [jnp.zeros((padded, *x.shape[2:]), x.dtype) for x in leaves]
    outs = lax.fori_loop(0, lax.optimization_barrier(jnp.int32(tiles)), add_tile, outs)
    outs = [x[: B * T].reshape(B, T, *x.shape[1:]) for x in outs]
    return jax.tree.unflatten(structure, outs)


def _pad_first(x, size: int):
    """x with zeros appended to its first axis."""
    return jnp.pad(x, [(0, size - x.shape[0])] + [(0, 0)] * (x.ndim - 1))


def attention(op, q_BTNH, keys, positions_BT, segment_ids_BT, *, scale, window, softcap):
    """op(q, keys, positions, segment_ids), each query independent of all but its document."""
    heads = ('batch', 'position', None, None), ('batch', 'key_position', None, None)
    ids = ('batch', 'position'), ('batch', 'key_position')
    names = heads[0], heads[1], heads[1], ids[1], ids[1], ids[0], ids[0]

    def forward(q_BTNH, keys, positions_BT, segment_ids_BT):
        usual = jax.eval_shape(op, q_BTNH, keys, positions_BT, segment_ids_BT)
        arrays = q_BTNH, *keys, positions_BT, segment_ids_BT
        placed = (place(x, *axes) for x, axes in zip(arrays, names))
        options = dict(scale=scale, window=window, softcap=softcap)
        attend = per_shard(functools.partial(_attend, **options), names, names[0])
        return _reshard_like(usual, attend(*placed))

    return _differentiated_as(op, forward, q_BTNH, keys, positions_BT, segment_ids_BT)


def _attend(
    q_BTNH, k_BSKH, v_BSKH, kv_positions_BS, kv_segments_BS, positions_BT, segments_BT, **o
):
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    M = B * T
    starts_BT, is_ordered_BT = _find_starts(segments_BT, kv_positions_BS, kv_segments_BS)
    lengths_M = _tile_lengths(segments_BT)
    q_MKGH = _pad_first(q_BTNH.reshape(M, K, N // K, H), M + QUERIES)
    positions_M, segments_M = (
        _pad_first(x.reshape(M), M + QUERIES) for x in (positions_BT, segments_BT)
    )
    keys = [
        jnp.pad(x, [(0, 0), (0, KEYS)] + [(0, 0)] * (x.ndim - 2))
        for x in (k_BSKH, v_BSKH, kv_positions_BS, kv_segments_BS)
    ]
    starts_M = starts_BT.reshape(M)

    def more(carry):
        return carry[0] < M

    def add_tile(carry):
        index, out = carry
        tile = [
            lax.dynamic_slice_in_dim(x, index, QUERIES) for x in (q_MKGH, positions_M, segments_M)
        ]
        here = segments_M[index], starts_M[index], lengths_M[index]
        value = _attend_tile(tile, keys, index // T, *here, **o)
        out = lax.dynamic_update_slice_in_dim(out, value, index, 0)
        return index + lengths_M[index], out

    out = jnp.zeros_like(q_MKGH)
    _, out = lax.while_loop(more, add_tile, (jnp.int32(0), out))
    out_BTNH = out[:M].reshape(B, T, N, H)
    return jnp.where(is_ordered_BT[..., None, None], out_BTNH, jnp.nan)


def _find_starts(segments_BT, kv_positions_BS, kv_segments_BS):
    """Index among the keys of position 0 of each query's document; whether that is in order."""
    same = (segments_BT[:, :, None] == kv_segments_BS[:, None, :]) & (segments_BT > 0)[:, :, None]
    offsets_BS = jnp.arange(kv_positions_BS.shape[1], dtype=jnp.int32)[None] - kv_positions_BS
    largest = jnp.iinfo(jnp.int32).max
    low = jnp.min(jnp.where(same, offsets_BS[:, None, :], largest), axis=-1)
    high = jnp.max(jnp.where(same, offsets_BS[:, None, :], -1), axis=-1)
    return low, (segments_BT == 0) | ((low == high) & (low >= 0))


def _tile_lengths(segments_BT):
    """[B T], from each query: how many of the next QUERIES belong to its row and document."""
    B, T = segments_BT.shape
    changes = segments_BT[:, 1:] != segments_BT[:, :-1]
    ends_BT = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True)
    last_BT = jnp.where(ends_BT, jnp.arange(T, dtype=jnp.int32)[None], T)
    last_BT = lax.cummin(last_BT, axis=1, reverse=True)
    left = last_BT - jnp.arange(T, dtype=jnp.int32)[None] + 1
    # Padding is skipped all at once.
    return jnp.where(segments_BT > 0, jnp.minimum(left, QUERIES), left).reshape(B * T)


def _attend_tile(tile, keys, row, segment, start, length, *, scale, window, softcap):
    q_QKGH, positions_Q, _ = tile
    _, K, G, H = q_QKGH.shape
    is_mine_Q = jnp.arange(QUERIES) < length
    last = jnp.max(jnp.where(is_mine_Q, positions_Q, 0))
    first = jnp.min(jnp.where(is_mine_Q, positions_Q, last))
    begin = jnp.maximum(first - window + 1, 0) // KEYS if window else 0
    end = jnp.where(segment > 0, last // KEYS + 1, begin)
    q_KXH = jnp.moveaxis(q_QKGH, 0, 1).reshape(K, QUERIES * G, H) * scale
    q_KXH, positions_Q, is_mine_Q = lax.optimization_barrier((q_KXH, positions_Q, is_mine_Q))

    def add_block(index, sums):
        largest_KX, total_KX, out_KXH = sums
        at = start + index * KEYS
        k_SKH, v_SKH, kv_positions_S, kv_segments_S = lax.optimization_barrier(
            [
                lax.dynamic_slice(x, (row, at, *(0,) * (x.ndim - 2)), (1, KEYS, *x.shape[2:]))[0]
                for x in keys
            ]
        )
        scores = jnp.einsum('kxh,skh->kxs', q_KXH, k_SKH, preferred_element_type=jnp.float32)
        if softcap:
            scores = softcap * jnp.tanh(scores / softcap)
        is_document_S = kv_segments_S == segment
        see_QS = is_document_S[None] & (kv_positions_S[None] <= positions_Q[:, None])
        see_QS &= is_mine_Q[:, None]
        if window:
            see_QS &= positions_Q[:, None] - kv_positions_S[None] < window
        see = jnp.broadcast_to(see_QS[:, None], (QUERIES, G, KEYS)).reshape(1, QUERIES * G, KEYS)
        scores = jnp.where(see, scores, _MASKED)
        new_largest = jnp.maximum(largest_KX, jnp.max(scores, axis=-1))
        p_KXS = jnp.where(see, jnp.exp(scores - new_largest[..., None]), 0.0)
        shrink = jnp.exp(largest_KX - new_largest)
        v_SKH = jnp.where(is_document_S[:, None, None], v_SKH, 0)
        more = jnp.einsum(
            'kxs,skh->kxh', p_KXS.astype(v_SKH.dtype), v_SKH, preferred_element_type=jnp.float32
        )
        total = total_KX * shrink + jnp.sum(p_KXS, axis=-1)
        return new_largest, total, out_KXH * shrink[..., None] + more

    X = QUERIES * G
    zeros = jnp.full((K, X), _MASKED), jnp.zeros((K, X)), jnp.zeros((K, X, H))
    _, total_KX, out_KXH = lax.fori_loop(begin, end, add_block, zeros)
    out_KXH /= jnp.where(total_KX == 0, 1.0, total_KX)[..., None]
    out = jnp.moveaxis(out_KXH.reshape(K, QUERIES, G, H), 1, 0).astype(q_QKGH.dtype)
    return lax.optimization_barrier(out)

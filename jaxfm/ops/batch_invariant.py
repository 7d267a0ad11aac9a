"""Results that do not depend on the batch: a token has the same bits whatever is computed with it.

Two programs that compute the same sum usually differ in the last bits. XLA picks a matrix product
by its number of rows, contracts `x * y + z` to one instruction within a fusion but not across two,
and computes `exp` of the last elements of an array in another way. Here the ops of a model run in
loops whose bodies have fixed shapes: some rows, or the queries of one document and a block of keys.
A train step, a chunk of a prompt and a decode step then run the same machine code for a token.

Gradients are those of the ordinary ops, of which only the inputs are saved. Equality is tested on
CPU in float32.

B batch, T query position, S key position, N heads, K kv heads, G = N / K, H head dim. M counts
rows, [B, T] flattened; Q queries of a tile, X = G Q; C keys of a block.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxfm.sharding import per_shard, place, replicate
from pallas_kernels.attention.schedule import visible

# Larger tiles are faster in training; a decode step pays for the part that it does not fill. Of 32
# and 64 rows, 32 took 1.2 and 1.4 times the CPU time of the ordinary train and decode step at 512
# dimensions, 64 took 1.0 and 1.8 (2 cores, 2026-11-30).
ROWS = 32
QUERIES = 8
KEYS = 64

_MASKED = -1e30  # below every score, but finite


def by_rows(op, rows: tuple, shared: tuple = (), *, on_tile=None):
    """op(*rows, *shared), where the result for a row depends on no other row.

    Args:
      op: the ordinary op; its results are one array or a tuple of them, [B, T, ...] like `rows`.
      rows: arrays [B, T, ...].
      shared: arrays or pytrees that all rows use, such as weights.
      on_tile: computes the op for rows [1, M, ...] on one device; `op` itself by default.
    """
    loop = functools.partial(_loop_over_tiles, on_tile or op, len(rows))
    names = [*map(_row_names, rows), *((),) * len(shared)]
    return _differentiate_as(op, functools.partial(_on_shards, op, loop, names), *rows, *shared)


def by_documents(op, *arrays, **options):
    """op(q, k, v, kv positions, kv segments, positions, segments), each query by its document only.

    A document must be contiguous in the keys and in order, or its queries get NaN; packed rows and
    caches are so. Keys that a query does not see may hold anything, NaN included.

    Args:
      op: the ordinary attention; the arrays are those of `ops.attention.KeyValues` and its caller.
      options: scale, window and softcap.
    """
    rows, key_rows = ('batch', 'position'), ('batch', 'key_position')
    heads, key_heads = (*rows, None, None), (*key_rows, None, None)
    names = [heads, key_heads, key_heads, key_rows, key_rows, rows, rows]
    attend = functools.partial(_attend, **options)
    return _differentiate_as(op, functools.partial(_on_shards, op, attend, names), *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiate_as(op, forward, *arguments):
    """forward(*arguments), with the gradients of op(*arguments)."""
    return forward(*arguments)


def _save_inputs(op, forward, *arguments):
    return forward(*arguments), arguments


def _ordinary_gradients(op, forward, arguments, cotangents):
    return jax.vjp(op, *arguments)[1](cotangents)


_differentiate_as.defvjp(_save_inputs, _ordinary_gradients)


def _on_shards(op, forward, names, *arguments):
    """`forward` on each device's rows, with everything else whole; sharded like op's results."""
    placed = [
        place(x, *axes) if axes else jax.tree.map(replicate, x)
        for x, axes in zip(arguments, names, strict=True)
    ]
    usual = jax.eval_shape(op, *arguments)
    several = isinstance(usual, tuple)
    outs = [_row_names(x) for x in usual] if several else _row_names(usual)
    results = per_shard(forward, names, outs)(*placed)
    if jax.sharding.get_abstract_mesh().empty:
        return results
    return jax.tree.map(lambda x, like: jax.reshard(x, like.sharding.spec), results, usual)


def _row_names(x) -> tuple:
    """The logical axes of x [B, T, ...], with only its rows split."""
    return ('batch', 'position', *(None,) * (x.ndim - 2))


def _loop_over_tiles(on_tile, count: int, *arguments):
    """on_tile(*arguments), the first `count` of which are [B, T, ...], ROWS rows at a time."""
    rows, shared = arguments[:count], arguments[count:]
    B, T = rows[0].shape[:2]
    tiles = -(-B * T // ROWS)
    # XLA would take the body out of a loop over one tile, and fuse it with what is around it.
    size = max(tiles, 2) * ROWS
    rows = [_pad(x.reshape(B * T, *x.shape[2:]), size) for x in rows]

    def compute(index):
        tile = [lax.dynamic_slice_in_dim(x, index * ROWS, ROWS)[None] for x in rows]
        # The barriers keep the slices, whose arrays differ by program, out of the op's fusions.
        return lax.optimization_barrier(on_tile(*lax.optimization_barrier(tile), *shared))

    def add_tile(index, outs):
        return jax.tree.map(
            lambda out, x: lax.dynamic_update_slice_in_dim(out, x[0], index * ROWS, 0),
            outs,
            compute(index),
        )

    shapes = jax.eval_shape(compute, 0)
    outs = jax.tree.map(lambda x: jnp.zeros((size, *x.shape[2:]), x.dtype), shapes)
    # A number that XLA does not know, so that it keeps the loop.
    outs = lax.fori_loop(0, lax.optimization_barrier(jnp.int32(tiles)), add_tile, outs)
    return jax.tree.map(lambda x: x[: B * T].reshape(B, T, *x.shape[1:]), outs)


def _pad(x, size: int, axis: int = 0):
    """x with zeros appended along an axis, up to `size`."""
    return jnp.pad(x, [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)])


def _attend(
    q_BTNH, k_BSKH, v_BSKH, kv_positions_BS, kv_segments_BS, positions_BT, segments_BT, **o
):
    """Attention on one device to keys in rows."""
    starts_BT, in_order_BT = _find_starts(segments_BT, kv_positions_BS, kv_segments_BS)
    # The last block of a document may reach beyond the keys.
    keys = k_BSKH, v_BSKH, kv_positions_BS, kv_segments_BS
    keys = [_pad(x, x.shape[1] + KEYS, axis=1) for x in keys]

    def read(row, first):
        sizes = [(1, KEYS, *x.shape[2:]) for x in keys]
        starts = [(row, first, *(0,) * (x.ndim - 2)) for x in keys]
        return [lax.dynamic_slice(*each)[0] for each in zip(keys, starts, sizes)]

    out_BTNH = attend_in_tiles(q_BTNH, positions_BT, segments_BT, starts_BT, read, **o)
    return jnp.where(in_order_BT[..., None, None], out_BTNH, jnp.nan)


def attend_in_tiles(q_BTNH, positions_BT, segments_BT, starts_BT, read, **options):
    """Attention on one device, over tiles of up to QUERIES consecutive queries of one document.

    Args:
      starts_BT: where the keys of each query's document begin; in `read`'s numbers.
      read: (row, number of a key) -> k, v [C, K, H], positions and segments [C] of KEYS keys from
        that one on. Keys that a query does not see may hold anything, NaN included.
      options: scale, window and softcap.
    """
    B, T, N, H = q_BTNH.shape
    M, K = B * T, jax.eval_shape(read, 0, 0)[0].shape[1]
    starts_M, lengths_M = starts_BT.reshape(M), _tile_lengths(segments_BT)
    queries = q_BTNH.reshape(M, K, N // K, H), positions_BT.reshape(M), segments_BT.reshape(M)
    queries = [_pad(x, M + QUERIES) for x in queries]

    def add_tile(carry):
        at, out = carry
        q_QKGH, positions_Q, segments_Q = (
            lax.dynamic_slice_in_dim(x, at, QUERIES) for x in queries
        )
        # Queries beyond the tile see no key. A later tile overwrites their zeros.
        segments_Q = jnp.where(jnp.arange(QUERIES) < lengths_M[at], segments_Q, 0)
        tile = lax.optimization_barrier((q_QKGH, positions_Q, segments_Q))
        value = _attend_tile(*tile, functools.partial(read, at // T), starts_M[at], **options)
        out = lax.dynamic_update_slice_in_dim(out, lax.optimization_barrier(value), at, 0)
        return at + lengths_M[at], out

    start = jnp.int32(0), jnp.zeros_like(queries[0])
    _, out = lax.while_loop(lambda carry: carry[0] < M, add_tile, start)
    return out[:M].reshape(B, T, N, H)


def _find_starts(segments_BT, kv_positions_BS, kv_segments_BS):
    """The index of each query's position 0 among the keys, and whether its document is in order."""
    same_BTS = segments_BT[:, :, None] == kv_segments_BS[:, None, :]
    indices = jnp.arange(kv_positions_BS.shape[1], dtype=jnp.int32)[None]
    starts_B1S = (indices - kv_positions_BS)[:, None]
    # In order, all tokens of a document have the same start.
    lowest_BT = jnp.min(jnp.where(same_BTS, starts_B1S, jnp.iinfo(jnp.int32).max), axis=-1)
    highest_BT = jnp.max(jnp.where(same_BTS, starts_B1S, -1), axis=-1)
    return lowest_BT, (segments_BT == 0) | ((lowest_BT == highest_BT) & (lowest_BT >= 0))


def _tile_lengths(segments_BT):
    """[B T]: how many queries from each one on make a tile; padding is one tile of any length."""
    B, T = segments_BT.shape
    indices = jnp.arange(T, dtype=jnp.int32)[None]
    is_last_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (0, 1)))
    ends_BT = jnp.where(is_last_BT, indices + 1, T)
    left_BT = lax.cummin(ends_BT, axis=1, reverse=True) - indices
    return jnp.where(segments_BT > 0, jnp.minimum(left_BT, QUERIES), left_BT).reshape(B * T)


def _attend_tile(q_QKGH, positions_Q, segments_Q, read, start, *, scale, window, softcap):
    """Online softmax over the blocks that the tile's queries see -> [Q, K, G, H]."""
    Q, K, G, H = q_QKGH.shape
    latest = jnp.max(jnp.where(segments_Q > 0, positions_Q, -1))
    begin = jnp.maximum(positions_Q[0] - window + 1, 0) // KEYS if window else 0
    q_KXH = scale * jnp.transpose(q_QKGH, (1, 2, 0, 3)).reshape(K, G * Q, H)

    # A block of which a query sees no key changes none of its sums, not even in the last bit. So
    # it does not matter how many there are: other queries of the tile may need them.
    def add_block(index, sums):
        block = lax.optimization_barrier(read(start + index * KEYS))
        k_CKH, v_CKH, kv_positions_C, kv_segments_C = block
        v_CKH = jnp.where((kv_segments_C == segments_Q[0])[:, None, None], v_CKH, 0)
        see_QC = visible(
            *(positions_Q[:, None], segments_Q[:, None], kv_positions_C[None], kv_segments_C[None]),
            window,
        )
        see_1XC = jnp.broadcast_to(see_QC[None], (G, Q, KEYS)).reshape(1, G * Q, KEYS)
        scores_KXC = jnp.einsum('kxh,ckh->kxc', q_KXH, k_CKH, preferred_element_type=jnp.float32)
        if softcap:
            scores_KXC = softcap * jnp.tanh(scores_KXC / softcap)
        return _add_scores(jnp.where(see_1XC, scores_KXC, _MASKED), see_1XC, v_CKH, sums)

    X = G * Q
    nothing = jnp.full((K, X), _MASKED), jnp.zeros((K, X)), jnp.zeros((K, X, H))
    end = latest // KEYS + 1  # 0 for padding
    _, total_KX, out_KXH = lax.fori_loop(begin, end, add_block, nothing)
    out_KXH /= jnp.where(total_KX == 0, 1.0, total_KX)[..., None]
    return jnp.transpose(out_KXH.reshape(K, G, Q, H), (2, 0, 1, 3)).astype(q_QKGH.dtype)


def _add_scores(scores_KXC, see_1XC, v_CKH, sums):
    highest_KX, total_KX, out_KXH = sums
    new_KX = jnp.maximum(highest_KX, jnp.max(scores_KXC, axis=-1))
    p_KXC = jnp.where(see_1XC, jnp.exp(scores_KXC - new_KX[..., None]), 0.0)
    shrink_KX = jnp.exp(highest_KX - new_KX)
    total_KX = total_KX * shrink_KX + jnp.sum(p_KXC, axis=-1)
    more_KXH = jnp.einsum(
        'kxc,ckh->kxh', p_KXC.astype(v_CKH.dtype), v_CKH, preferred_element_type=jnp.float32
    )
    return new_KX, total_KX, out_KXH * shrink_KX[..., None] + more_KXH

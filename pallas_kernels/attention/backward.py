"""Gradients of flash attention: a kernel for dK and dV, and one for dQ.

Both recompute the probabilities from the log-sum-exp of the forward pass. A block of the first
kernel owns a tile of keys and visits the queries that see it, for all heads of the group. A block
of the second owns a tile of queries and visits the keys that they see. Every sum is therefore
computed in one place and in a fixed order: no atomics, and results are reproducible bit for bit.

One warpgroup copies the visited tiles into a ring in shared memory, the others compute. The scores
of the first kernel are transposed (one row per key), so that in both kernels the output of the
softmax enters the next matrix product directly from registers.

B batch, T query position, S key position, N heads, K kv heads, G = N / K, H head dim.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._compat import (
    add_product,
    launch,
    operand,
    overlap,
    pl,
    plgpu,
    read,
    tanh,
)
from pallas_kernels._padding import whole_tiles
from pallas_kernels.attention import schedule
from pallas_kernels.attention.tiles import BackwardTiles, choose_tiles

# Rows that a warpgroup owns: those of one tensor core instruction.
_ROWS = 64
_LOG2E = math.log2(math.e)


def backward(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    out_BTNH,
    lse_BNT,
    dout_BTNH,
    q_positions_BT,
    q_segment_ids_BT,
    kv_positions_BS,
    kv_segment_ids_BS,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    tiles: BackwardTiles | None = None,
    interpret: bool = False,
):
    """(dq, dk, dv), from the inputs and results of `forward` and the gradient dout_BTNH of `out`.

    Sums over a group are float32; the gradient of a query that sees no key is zero.
    """
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    S = k_BSKH.shape[1]
    tiles = tiles or choose_tiles('backward', head_dim=H, dtype=q_BTNH.dtype)
    dkv_kv = _ROWS if _one_output_each(H, softcap) else _ROWS * tiles.dkv_warpgroups
    dq_q = _ROWS * tiles.dq_warpgroups
    q_tile, kv_tile = math.lcm(tiles.dkv_q, dq_q), math.lcm(dkv_kv, tiles.dq_kv)

    delta_BTN = jnp.sum(dout_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32), axis=3)
    delta_BNT = jnp.swapaxes(delta_BTN, 1, 2)
    # The probabilities of a query that sees no key are exp2(score - inf) = 0.
    log2_BNT = jnp.where(jnp.isneginf(lse_BNT), jnp.inf, lse_BNT * _LOG2E)
    q, dout = (whole_tiles(x, q_tile, 1) for x in (q_BTNH, dout_BTNH.astype(q_BTNH.dtype)))
    k, v = (whole_tiles(x, kv_tile, 1) for x in (k_BSKH, v_BSKH))
    statistics = whole_tiles(jnp.stack([log2_BNT, -delta_BNT], axis=2), q_tile, 3)
    q_ids = schedule.token_ids(q_positions_BT, q_segment_ids_BT, q_tile)
    kv_ids = schedule.token_ids(kv_positions_BS, kv_segment_ids_BS, kv_tile)
    arrays = (q, dout, statistics, q_ids, k, v, kv_ids)
    tokens = (q_ids[:, 0], q_ids[:, 1], kv_ids[:, 0], kv_ids[:, 1])
    options = dict(scale=scale, window=window, softcap=softcap, tiles=tiles, interpret=interpret)

    visits = schedule.for_keys(*tokens, q_tile=tiles.dkv_q, kv_tile=dkv_kv, window=window)
    dk, dv = _dkv(*arrays, visits, **options)
    visits = schedule.for_queries(*tokens, q_tile=dq_q, kv_tile=tiles.dq_kv, window=window)
    dq = _dq(*arrays, visits, **options)
    return dq[:, :T], dk[:, :S], dv[:, :S]


def _one_output_each(head_dim: int, softcap: float) -> bool:
    """Whether dK and dV together do not fit into the registers of a warpgroup.

    If so, two warpgroups own the same keys, and the scores are computed twice.
    """
    return head_dim > (64 if softcap else 128)


def _dkv(
    q, dout, statistics, q_ids, k, v, kv_ids, visits, *, tiles, scale, window, softcap, interpret
):
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    G = N // K
    q_tile, stages = tiles.dkv_q, tiles.dkv_stages
    warpgroups = 2 if _one_output_each(H, softcap) else tiles.dkv_warpgroups
    parts = 1 if _one_output_each(H, softcap) else warpgroups
    shape = (_ROWS, q_tile)

    def kernel(
        q_ref,
        dout_ref,
        statistics_ref,
        q_ids_ref,
        k_ref,
        v_ref,
        kv_ids_ref,
        tiles_ref,
        num_full_ref,
        num_visited_ref,
        order_ref,
        dk_ref,
        dv_ref,
        *,
        k_smem,
        v_smem,
        kv_ids_smem,
        q_ring,
        dout_ring,
        statistics_ring,
        q_ids_ring,
        owned,
        filled,
        consumed,
        finished,
    ):
        batch, kv_head = lax.axis_index('batch'), lax.axis_index('head')
        warpgroup = lax.axis_index('warpgroup')

        def own_row():
            return order_ref[batch, lax.axis_index('row')]

        row = own_row()
        num_full, num_visited = num_full_ref[batch, row], num_visited_ref[batch, row]

        def keys_of(row, part):
            return pl.ds((row * parts + part) * _ROWS, _ROWS)

        def bring():
            _give_registers(warpgroups)
            for part in range(parts):
                keys = keys_of(row, part)
                _copy(k_ref.at[batch, keys, kv_head], k_smem.at[part], owned)
                _copy(v_ref.at[batch, keys, kv_head], v_smem.at[part], owned)
                _copy(kv_ids_ref.at[batch, :, keys], kv_ids_smem.at[part], owned)
            bring_all(0, num_full)
            bring_all(num_full, num_visited)
            _drain(consumed, stages, G * num_visited)

        def bring_all(first, last):
            @pl.loop(0, G)
            def of_head(group):
                @pl.loop(first, last)
                def of_tile(index):
                    step = G * first + group * (last - first) + index - first
                    bring_visited(step, kv_head * G + group, tiles_ref[batch, row, index])

        def bring_visited(step, head, tile):
            slot = lax.rem(step, stages)

            @pl.when(step >= stages)
            def wait():
                plgpu.barrier_wait(consumed.at[slot])

            queries = pl.ds(tile * q_tile, q_tile)
            _copy(q_ref.at[batch, queries, head], q_ring.at[slot], filled.at[slot])
            _copy(dout_ref.at[batch, queries, head], dout_ring.at[slot], filled.at[slot])
            _copy(
                statistics_ref.at[batch, head, :, queries],
                statistics_ring.at[slot],
                filled.at[slot],
            )
            _copy(q_ids_ref.at[batch, :, queries], q_ids_ring.at[slot], filled.at[slot])

        def compute(makes_dk: bool, makes_dv: bool):
            _take_registers(warpgroups)
            part = lax.rem(warpgroup, parts)
            plgpu.barrier_wait(owned)

            def visit(step, sums, is_partial: bool):
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(filled.at[slot])
                own = _opaque(part)
                k_tile, v_tile = k_smem.at[own], v_smem.at[own]
                q_tile_ref, dout_tile_ref = q_ring.at[slot], dout_ring.at[slot]

                def over_columns(ref, i):
                    vector = plgpu.load(ref.at[slot, i], layout=_of_column())
                    return lax.broadcast_in_dim(vector, shape, [1])

                def over_rows(i):
                    vector = plgpu.load(kv_ids_smem.at[own, i], layout=_of_row())
                    return lax.broadcast_in_dim(vector, shape, [0])

                def softmax(products):
                    seen = None
                    if is_partial:
                        seen = schedule.visible(
                            over_columns(q_ids_ring, 0),
                            over_columns(q_ids_ring, 1),
                            over_rows(0),
                            over_rows(1),
                            window,
                        )
                    log2 = over_columns(statistics_ring, 0)
                    weights, slopes = _softmax(products, log2, seen, scale, softcap)
                    # Rounded at once, because float32 would take too many registers.
                    return weights.astype(q.dtype), slopes.astype(q.dtype)

                # dweights - delta starts at -delta, which saves a vector of registers at the peak.
                started = (over_columns(statistics_ring, 1),) * makes_dk

                def body(sums, products):
                    (scores,) = products
                    add_product(scores, k_tile, q_tile_ref.transpose((1, 0)))
                    if makes_dk:
                        add_product(sums[-1], v_tile, dout_tile_ref.transpose((1, 0)))
                    weights, slopes = softmax(read(scores, in_flight=int(makes_dk)))
                    if makes_dv:
                        add_product(sums[makes_dk], weights, dout_tile_ref)
                    if makes_dk:
                        dweights = read(sums[-1], in_flight=int(makes_dv))
                        dscores = slopes.astype(jnp.float32) * dweights
                        add_product(sums[0], dscores.astype(q.dtype), q_tile_ref)

                sums = overlap(body, sums + started, (shape,), interpret=interpret)
                _release(consumed.at[slot])
                return sums[: makes_dk + makes_dv]

            sums = (_zeros((_ROWS, H)),) * (makes_dk + makes_dv)
            sums = _visit_all(visit, G * num_full, G * num_visited, sums)
            if _one_output_each(H, softcap):
                # The other warpgroup may still read what the output is about to overwrite.
                plgpu.barrier_arrive(finished)
                plgpu.barrier_wait(finished)
            k_tile, v_tile = k_smem.at[part], v_smem.at[part]
            if makes_dk:
                k_tile[...] = (sums[0] * scale).astype(k.dtype)
            if makes_dv:
                v_tile[...] = sums[makes_dk].astype(v.dtype)
            plgpu.commit_smem()
            # The row is read again, because the loop has no register to keep it in.
            keys = keys_of(own_row(), part)
            if makes_dk:
                plgpu.copy_smem_to_gmem(k_tile, dk_ref.at[batch, keys, kv_head])
            if makes_dv:
                plgpu.copy_smem_to_gmem(v_tile, dv_ref.at[batch, keys, kv_head])
            plgpu.wait_smem_to_gmem(0)

        if _one_output_each(H, softcap):
            pl.when(warpgroup == 0)(lambda: compute(makes_dk=True, makes_dv=False))
            pl.when(warpgroup == 1)(lambda: compute(makes_dk=False, makes_dv=True))
        else:
            pl.when(warpgroup < warpgroups)(lambda: compute(makes_dk=True, makes_dv=True))
        pl.when(warpgroup == warpgroups)(bring)

    rows = k.shape[1] // (parts * _ROWS)
    return launch(
        kernel,
        out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        scratch_types=dict(
            k_smem=_operand((parts, _ROWS, H), k.dtype, q_tile),
            v_smem=_operand((parts, _ROWS, H), v.dtype, q_tile),
            kv_ids_smem=plgpu.SMEM((parts, 2, _ROWS), jnp.int32),
            q_ring=_operand((stages, q_tile, H), q.dtype, q_tile),
            dout_ring=_operand((stages, q_tile, H), dout.dtype, q_tile),
            statistics_ring=plgpu.SMEM((stages, 2, q_tile), jnp.float32),
            q_ids_ring=plgpu.SMEM((stages, 2, q_tile), jnp.int32),
            owned=plgpu.Barrier(num_arrivals=3 * parts),
            filled=plgpu.Barrier(num_arrivals=4, num_barriers=stages),
            consumed=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
            finished=plgpu.Barrier(num_arrivals=warpgroups),
        ),
        grid=(K, rows, B),
        grid_names=('head', 'row', 'batch'),
        num_threads=warpgroups + 1,
        thread_name='warpgroup',
        approx_math=True,
        interpret=interpret,
    )(q, dout, statistics, q_ids, k, v, kv_ids, *visits)


def _dq(
    q, dout, statistics, q_ids, k, v, kv_ids, visits, *, tiles, scale, window, softcap, interpret
):
    B, T, N, H = q.shape
    G = N // k.shape[2]
    kv_tile, stages, warpgroups = tiles.dq_kv, tiles.dq_stages, tiles.dq_warpgroups
    shape = (_ROWS, kv_tile)

    def kernel(
        q_ref,
        dout_ref,
        statistics_ref,
        q_ids_ref,
        k_ref,
        v_ref,
        kv_ids_ref,
        tiles_ref,
        num_full_ref,
        num_visited_ref,
        order_ref,
        dq_ref,
        *,
        q_smem,
        dout_smem,
        statistics_smem,
        q_ids_smem,
        k_ring,
        v_ring,
        kv_ids_ring,
        owned,
        filled,
        consumed,
    ):
        batch, head = lax.axis_index('batch'), lax.axis_index('head')
        warpgroup = lax.axis_index('warpgroup')
        kv_head = lax.div(head, G)
        row = order_ref[batch, lax.axis_index('row')]
        num_full, num_visited = num_full_ref[batch, row], num_visited_ref[batch, row]

        def queries_of(part):
            return pl.ds((row * warpgroups + part) * _ROWS, _ROWS)

        def bring():
            _give_registers(warpgroups)
            for part in range(warpgroups):
                queries = queries_of(part)
                _copy(q_ref.at[batch, queries, head], q_smem.at[part], owned)
                _copy(dout_ref.at[batch, queries, head], dout_smem.at[part], owned)
                _copy(statistics_ref.at[batch, head, :, queries], statistics_smem.at[part], owned)
                _copy(q_ids_ref.at[batch, :, queries], q_ids_smem.at[part], owned)

            @pl.loop(0, num_visited)
            def of_tile(step):
                slot = lax.rem(step, stages)
                keys = pl.ds(tiles_ref[batch, row, step] * kv_tile, kv_tile)

                @pl.when(step >= stages)
                def wait():
                    plgpu.barrier_wait(consumed.at[slot])

                _copy(k_ref.at[batch, keys, kv_head], k_ring.at[slot], filled.at[slot])
                _copy(v_ref.at[batch, keys, kv_head], v_ring.at[slot], filled.at[slot])
                _copy(kv_ids_ref.at[batch, :, keys], kv_ids_ring.at[slot], filled.at[slot])

            _drain(consumed, stages, num_visited)

        def compute():
            _take_registers(warpgroups)
            plgpu.barrier_wait(owned)

            def over_rows(ref, i):
                vector = plgpu.load(ref.at[warpgroup, i], layout=_of_row())
                return lax.broadcast_in_dim(vector, shape, [0])

            def visit(step, sums, is_partial: bool):
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(filled.at[slot])
                own = _opaque(warpgroup)
                k_tile, v_tile = k_ring.at[slot], v_ring.at[slot]
                q_tile, dout_tile = q_smem.at[own], dout_smem.at[own]

                def over_columns(i):
                    vector = plgpu.load(kv_ids_ring.at[slot, i], layout=_of_column())
                    return lax.broadcast_in_dim(vector, shape, [1])

                def body(sums, products):
                    add_product(products[0], q_tile, k_tile.transpose((1, 0)))
                    add_product(products[1], dout_tile, v_tile.transpose((1, 0)))
                    seen = None
                    if is_partial:
                        seen = schedule.visible(
                            over_rows(q_ids_smem, 0),
                            over_rows(q_ids_smem, 1),
                            over_columns(0),
                            over_columns(1),
                            window,
                        )
                    log2 = over_rows(statistics_smem, 0)
                    _, slopes = _softmax(read(products[0], in_flight=1), log2, seen, scale, softcap)
                    dweights = read(products[1])
                    dscores = slopes * (dweights + over_rows(statistics_smem, 1))
                    add_product(sums[0], dscores.astype(q.dtype), k_tile)

                sums = overlap(body, sums, (shape, shape), interpret=interpret)
                _release(consumed.at[slot])
                return sums

            (dq,) = _visit_all(visit, num_full, num_visited, (_zeros((_ROWS, H)),))
            q_tile = q_smem.at[warpgroup]
            q_tile[...] = (dq * scale).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_tile, dq_ref.at[batch, queries_of(warpgroup), head])
            plgpu.wait_smem_to_gmem(0)

        pl.when(warpgroup < warpgroups)(compute)
        pl.when(warpgroup == warpgroups)(bring)

    return launch(
        kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=dict(
            q_smem=_operand((warpgroups, _ROWS, H), q.dtype, kv_tile),
            dout_smem=_operand((warpgroups, _ROWS, H), dout.dtype, kv_tile),
            statistics_smem=plgpu.SMEM((warpgroups, 2, _ROWS), jnp.float32),
            q_ids_smem=plgpu.SMEM((warpgroups, 2, _ROWS), jnp.int32),
            k_ring=_operand((stages, kv_tile, H), k.dtype, kv_tile),
            v_ring=_operand((stages, kv_tile, H), v.dtype, kv_tile),
            kv_ids_ring=plgpu.SMEM((stages, 2, kv_tile), jnp.int32),
            owned=plgpu.Barrier(num_arrivals=4 * warpgroups),
            filled=plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            consumed=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        ),
        grid=(N, T // (_ROWS * warpgroups), B),
        grid_names=('head', 'row', 'batch'),
        num_threads=warpgroups + 1,
        thread_name='warpgroup',
        approx_math=True,
        interpret=interpret,
    )(q, dout, statistics, q_ids, k, v, kv_ids, *visits)


def _of_row():
    """The layout of vectors with one value per row of a matrix."""
    return plgpu.Layout.WGMMA.reduce(1)


def _of_column():
    return plgpu.Layout.WGMMA.reduce(0)


def _copy(source, target, barrier) -> None:
    plgpu.copy_gmem_to_smem(source, target, barrier)


def _operand(shape, dtype, summed: int):
    """Shared memory for a kernel in which some product sums over `summed` rows.

    The tensor cores take as many rows at a time as a tile in shared memory has columns, and all
    operands use the same tiles.
    """
    return operand(shape, dtype, columns=min(summed, 64))


def _release(barrier):
    """Releases a slot of a ring, with a fence: the next copy must not overtake our loads."""
    plgpu.commit_smem()
    plgpu.barrier_arrive(barrier)


def _drain(consumed, stages: int, steps):
    """Waits until the last tiles are consumed: a block must see all arrivals at its barriers."""

    @pl.loop(lax.max(steps - stages, 0), steps)
    def wait(step):
        plgpu.barrier_wait(consumed.at[lax.rem(step, stages)])


def _opaque(index):
    """Hides from the compiler that the index is the same in all steps of a loop.

    Otherwise it would keep the addresses of all operands in registers, and spill.
    """
    return lax.optimization_barrier(index)


def _softmax(products, log2, seen, scale: float, softcap: float):
    """The weights for the products q k', and their derivative without the factor dweights - delta.

    seen: None if all keys are visible.
    """
    if softcap:
        capped = tanh(products, scale / softcap)
        weights = jnp.exp2(capped * (softcap * _LOG2E) - log2)
    else:
        weights = jnp.exp2(products * (scale * _LOG2E) - log2)
    if seen is not None:
        weights = jnp.where(seen, weights, 0.0)
    return weights, weights * (1.0 - capped * capped) if softcap else weights


def _zeros(shape):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def _visit_all(visit, num_full, num_visited, sums):
    """Visits full tiles, then partial ones, which need the mask; returns the sums."""
    for first, last, is_partial in ((0, num_full, False), (num_full, num_visited, True)):
        sums = lax.fori_loop(first, last, functools.partial(visit, is_partial=is_partial), sums)
    return sums


def _take_registers(warpgroups: int):
    """Called by computing warpgroups, to take the registers that the copying one gives away."""
    if warpgroups > 1:
        plgpu.set_max_registers({2: 240, 3: 160}[warpgroups], action='increase')


def _give_registers(warpgroups: int):
    """Called by the copying warpgroup. With larger totals, the kernel would deadlock.

    Three warpgroups share 504 registers (2 * 240 + 24), four share 512 (3 * 160 + 32).
    """
    plgpu.set_max_registers({1: 40, 2: 24, 3: 32}[warpgroups], action='decrease')

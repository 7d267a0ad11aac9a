"""Flash attention, forward: one pass over the keys with a running softmax, on Hopper.

A block computes `2 * rows` queries of one head. Two warpgroups compute, each one half of the
queries; a third only copies. It follows the block's row of the schedule (schedule.py) and copies K
and V of each tile into a ring of slots, from which both halves read.

A half starts the scores of a tile together with the output of the previous tile, whose weights are
ready. The halves take turns in starting, so that the tensor cores work for one half while the other
computes its softmax.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._compat import (
    accumulate,
    add_product,
    launch,
    matmul,
    operand,
    overlap,
    pl,
    plgpu,
    read,
    tanh,
)
from pallas_kernels._padding import whole_tiles
from pallas_kernels.attention import schedule
from pallas_kernels.attention.tiles import COMPUTE, ForwardTiles, choose_tiles, obstacle

_LOG2E = math.log2(math.e)
_COPY = COMPUTE  # index of the warpgroup that copies
# The start of a running maximum: finite, so that a row that sees no key gets no NaN.
_LOWEST = -1e30


def forward(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    q_positions_BT,
    q_segment_ids_BT,
    kv_positions_BS,
    kv_segment_ids_BS,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    tiles: ForwardTiles | None = None,
    interpret: bool = False,
):
    """softmax(scale * q k' with soft-cap and mask) v, and the log of each row's sum.

    Returns out [B, T, N, H] in q's dtype and lse [B, N, T] float32 (natural log). A query that
    sees no key gets zeros and -inf.

    Args:
      window: a query sees keys at distance < window; 0 is no limit.
      softcap: scores become cap * tanh(scores / cap); 0 is off.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    _check(q_BTNH, k_BSKH, v_BSKH, scale)
    tiles = tiles or choose_tiles('forward', head_dim=H, dtype=q_BTNH.dtype)
    rows, kv_tile, slots = tiles.rows, tiles.kv_tile, tiles.slots
    dtype = q_BTNH.dtype
    plan = schedule.for_queries(
        q_positions_BT,
        q_segment_ids_BT,
        kv_positions_BS,
        kv_segment_ids_BS,
        q_tile=tiles.q_tile,
        kv_tile=kv_tile,
        window=window,
    )
    q_ids_B2T = schedule.token_ids(q_positions_BT, q_segment_ids_BT, tiles.q_tile)
    kv_ids_B2S = schedule.token_ids(kv_positions_BS, kv_segment_ids_BS, kv_tile)
    q_BTNH = whole_tiles(q_BTNH, tiles.q_tile, 1)
    k_BSKH, v_BSKH = (whole_tiles(x, kv_tile, 1) for x in (k_BSKH, v_BSKH))
    padded_T = q_BTNH.shape[1]

    # Scores times this are exponents of 2.
    to_log2 = (softcap or scale) * _LOG2E

    def block(
        q_ref,
        k_ref,
        v_ref,
        q_ids_ref,
        kv_ids_ref,
        tiles_ref,
        num_full_ref,
        num_visited_ref,
        order_ref,
        out_ref,
        lse_ref,
        q_smem,
        k_smem,
        v_smem,
        q_ids_smem,
        kv_ids_smem,
        lse_smem,
        q_ready,
        k_ready,
        v_ready,
        k_free,
        v_free,
        turn,
    ):
        b, head = lax.axis_index('batch'), lax.axis_index('head')
        kv_head = lax.div(head, jnp.int32(N // K))
        thread = lax.axis_index('warpgroup')
        row = order_ref[b, lax.axis_index('row')]
        num_full, num_visited = num_full_ref[b, row], num_visited_ref[b, row]

        def queries_of(half):
            return pl.ds(row * tiles.q_tile + half * rows, rows)

        def slot_of(step):
            return lax.rem(step, jnp.int32(slots))

        def free(barrier, step):
            """Releases a slot that a later step refills; nobody waits for the last slots."""

            @pl.when(step + slots < num_visited)
            def _():
                plgpu.barrier_arrive(barrier.at[slot_of(step)])

        @pl.when(thread == _COPY)
        def _():
            plgpu.set_max_registers(40, action='decrease')
            for half in range(COMPUTE):
                own = queries_of(half)
                plgpu.copy_gmem_to_smem(q_ref.at[b, own, head], q_smem.at[half], q_ready.at[half])
                plgpu.copy_gmem_to_smem(
                    q_ids_ref.at[b, :, own], q_ids_smem.at[half], q_ready.at[half]
                )

            @pl.loop(0, num_visited)
            def _(step):
                slot = slot_of(step)
                tile = tiles_ref[b, row, step]
                keys = pl.ds(tile * kv_tile, kv_tile)

                def await_free(barrier):
                    @pl.when(step >= slots)
                    def _():
                        plgpu.barrier_wait(barrier.at[slot])

                await_free(k_free)
                plgpu.copy_gmem_to_smem(
                    k_ref.at[b, keys, kv_head], k_smem.at[slot], k_ready.at[slot]
                )
                plgpu.copy_gmem_to_smem(
                    kv_ids_ref.at[b, :, keys], kv_ids_smem.at[slot], k_ready.at[slot]
                )
                await_free(v_free)
                plgpu.copy_gmem_to_smem(
                    v_ref.at[b, keys, kv_head], v_smem.at[slot], v_ready.at[slot]
                )

        def compute():
            plgpu.set_max_registers(232, action='increase')

            def keys_of(step):
                slot = slot_of(step)
                plgpu.barrier_wait(k_ready.at[slot])
                return k_smem.at[slot].transpose((1, 0))

            def values_of(step):
                slot = slot_of(step)
                plgpu.barrier_wait(v_ready.at[slot])
                return v_smem.at[slot]

            def visible(slot):
                q_position, q_segment = (
                    lax.broadcast_in_dim(
                        plgpu.load(q_ids_smem.at[thread, i], layout=plgpu.Layout.WGMMA.reduce(1)),
                        (rows, kv_tile),
                        [0],
                    )
                    for i in range(2)
                )
                kv_position, kv_segment = (
                    lax.broadcast_in_dim(
                        plgpu.load(kv_ids_smem.at[slot, i], layout=plgpu.Layout.WGMMA.reduce(0)),
                        (rows, kv_tile),
                        [1],
                    )
                    for i in range(2)
                )
                return schedule.visible(q_position, q_segment, kv_position, kv_segment, window)

            def softmax(scores, step, row_max, row_sum, *, is_partial):
                """(weights, row_max, row_sum, factor for earlier sums)."""
                if softcap:
                    scores = tanh(scores, scale / softcap)
                if is_partial:
                    scores = jnp.where(visible(slot_of(step)), scores, -jnp.inf)
                    # A fence after reading the ids, whose slot the copy engine refills next.
                    plgpu.commit_smem()
                free(k_free, step)
                new_max = jnp.maximum(row_max, jnp.max(scores, axis=1) * to_log2)
                weights = jnp.exp2(
                    scores * to_log2 - lax.broadcast_in_dim(new_max, (rows, kv_tile), [0])
                )
                correction = jnp.exp2(row_max - new_max)
                row_sum = row_sum * correction + jnp.sum(weights, axis=1)
                results = (weights, new_max, row_sum, correction)
                # Makes XLA order the exponentials before the wait for the other product instead of
                # after it. The assembler may still reorder them.
                return results if is_partial else lax.optimization_barrier(results)

            def begin(_, carry):
                acc, row_max, row_sum, _ = carry
                scores = matmul(q_smem.at[thread], keys_of(0), interpret=interpret)
                # The mask is also correct for a full tile.
                weights, row_max, row_sum, _ = softmax(
                    scores, jnp.int32(0), row_max, row_sum, is_partial=True
                )
                return acc, row_max, row_sum, weights.astype(dtype)

            def visit(step, carry, *, is_partial):
                """The scores of a tile, and the output of the previous tile."""
                acc, row_max, row_sum, weights = carry
                keys, values = keys_of(step), values_of(step - 1)
                plgpu.barrier_wait(turn.at[thread])

                def products(sums, scores):
                    add_product(scores[0], q_smem.at[thread], keys)
                    add_product(sums[0], weights, values)
                    give_turn(step)
                    # With a mask, the previous tile's weights must leave the registers first.
                    return softmax(
                        read(scores[0], in_flight=int(not is_partial)),
                        step,
                        row_max,
                        row_sum,
                        is_partial=is_partial,
                    )

                unwritten = fill((rows, kv_tile), 0)
                acc, weights, new_max, new_sum, correction = overlap(
                    products,
                    (acc,),
                    ((rows, kv_tile),),
                    (unwritten, row_max, row_sum, row_sum),
                    interpret=interpret,
                )
                free(v_free, step - 1)
                acc *= lax.broadcast_in_dim(correction, (rows, H), [0])
                # Rounded only now: writing registers that a product reads forces a wait for all
                # products in flight.
                return acc, new_max, new_sum, weights.astype(dtype)

            def give_turn(step):
                """Gives the turn to the other half, unless that is the first and it has ended."""

                @pl.when((thread == 0) | (step + 1 < num_visited))
                def _():
                    plgpu.barrier_arrive(turn.at[1 - thread])

            def end(_, carry):
                acc, row_max, row_sum, weights = carry
                acc = accumulate(acc, weights, values_of(num_visited - 1), interpret=interpret)
                return acc, row_max, row_sum, weights

            def fill(shape, value, layout=plgpu.Layout.WGMMA, dtype=jnp.float32):
                return plgpu.layout_cast(jnp.full(shape, value, dtype), layout)

            carry = (
                fill((rows, H), 0),
                fill((rows,), _LOWEST, plgpu.Layout.WGMMA.reduce(1)),
                fill((rows,), 0, plgpu.Layout.WGMMA.reduce(1)),
                fill((rows, kv_tile), 0, dtype=dtype),
            )
            plgpu.barrier_wait(q_ready.at[thread])
            # The first half starts: the second one hands it the first turn.
            pl.when((thread == 1) & (num_visited > 1))(lambda: give_turn(jnp.int32(0)))
            at_most_once = jnp.minimum(num_visited, 1)
            carry = lax.fori_loop(0, at_most_once, begin, carry)
            carry = lax.fori_loop(1, num_full, lambda *x: visit(*x, is_partial=False), carry)
            carry = lax.fori_loop(
                jnp.maximum(num_full, 1), num_visited, lambda *x: visit(*x, is_partial=True), carry
            )
            acc, row_max, row_sum, _ = lax.fori_loop(0, at_most_once, end, carry)

            inverse = jnp.where(row_sum > 0, 1 / row_sum, 0.0)
            out = acc * lax.broadcast_in_dim(inverse, (rows, H), [0])
            # The queries are no longer needed: the result reuses their memory.
            q_smem[thread] = out.astype(dtype)
            lse_smem[thread] = jnp.where(
                row_sum > 0, row_max * (1 / _LOG2E) + jnp.log(row_sum), -jnp.inf
            )
            plgpu.commit_smem()
            own = queries_of(thread)
            plgpu.copy_smem_to_gmem(q_smem.at[thread], out_ref.at[b, own, head])
            plgpu.copy_smem_to_gmem(lse_smem.at[thread], lse_ref.at[b, head, own])
            plgpu.wait_smem_to_gmem(0)

        pl.when(thread < COMPUTE)(compute)

    out_BTNH, lse_BNT = launch(
        block,
        interpret=interpret,
        approx_math=True,
        out_type=(
            jax.ShapeDtypeStruct(q_BTNH.shape, dtype),
            jax.ShapeDtypeStruct((B, N, padded_T), jnp.float32),
        ),
        scratch_types=dict(
            q_smem=operand((COMPUTE, rows, H), dtype),
            k_smem=operand((slots, kv_tile, H), dtype),
            v_smem=operand((slots, kv_tile, H), dtype),
            q_ids_smem=plgpu.SMEM((COMPUTE, 2, rows), jnp.int32),
            kv_ids_smem=plgpu.SMEM((slots, 2, kv_tile), jnp.int32),
            lse_smem=plgpu.SMEM((COMPUTE, rows), jnp.float32),
            q_ready=plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE),
            k_ready=plgpu.Barrier(num_arrivals=2, num_barriers=slots),
            v_ready=plgpu.Barrier(num_barriers=slots),
            k_free=plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=slots),
            v_free=plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=slots),
            turn=plgpu.Barrier(num_barriers=COMPUTE),
        ),
        grid=(B, padded_T // tiles.q_tile, N),
        grid_names=('batch', 'row', 'head'),
        num_threads=COMPUTE + 1,
        thread_name='warpgroup',
    )(q_BTNH, k_BSKH, v_BSKH, q_ids_B2T, kv_ids_B2S, *plan)
    return out_BTNH[:, :T], lse_BNT[:, :, :T]


def _check(q_BTNH, k_BSKH, v_BSKH, scale: float) -> None:
    """Raises ValueError, in the caller's terms, unless the kernel supports the arguments."""
    dtypes = sorted({x.dtype.name for x in (q_BTNH, k_BSKH, v_BSKH)})
    if len(dtypes) > 1:
        raise ValueError(f'q, k and v must have one dtype, not {", ".join(dtypes)}')
    (N, H), K = q_BTNH.shape[2:], k_BSKH.shape[2]
    if problem := obstacle(head_dim=H, dtype=q_BTNH.dtype):
        raise ValueError(problem)
    if N % K:
        raise ValueError(f'num_heads ({N}) must be a multiple of num_kv_heads ({K})')
    if scale <= 0:
        raise ValueError(f'scale must be positive, not {scale}: it is applied after the maximum')

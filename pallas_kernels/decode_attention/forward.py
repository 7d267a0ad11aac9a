"""Attention of one query per sequence over paged keys and values, on Hopper.

Loading keys and values sets the minimum time; everything else must overlap with it.
- A block attends to a part (split) of one sequence for one kv head; the splits are then merged by
  their log-sum-exps. There are enough splits to keep every SM loading, even for a single long
  sequence.
- A block is one warpgroup. It starts copying a tile (TMA, page by page) as soon as it has finished
  the previous tile of the slot, and meanwhile reads the page ids of the tile after that. A separate
  warpgroup for copying would issue the same copies at the same time, but its registers would leave
  room for only one block per SM. With two blocks, one keeps loading while the other starts or ends.
- Pages without any visible key are not loaded. In the other pages, invisible values are zeroed,
  because they may be NaN, and zero times NaN is not zero.
- The G query heads of a kv head are rows of one WGMMA, padded to its 64. The padding is free: for a
  tile of 64 keys with H = 128, the two products take 256 cycles of the tensor cores and the softmax
  about 500 of the other units, while its 32 KB take about 1700 to arrive (4.3 TB/s over 132 SMs).
  Products on CUDA cores would have to move every tile through registers, convert it and reduce
  over lanes: about as much work for one head, and the same again for each further head.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._compat import accumulate, launch, matmul, operand, pl, plgpu
from pallas_kernels.decode_attention.tiles import ROWS, Tiles, choose_tiles, obstacle

LOG2_E = math.log2(math.e)
# Below every score, but finite, so that the difference of two is not NaN.
MASKED = -1e30


def forward(
    q_BNH,
    k_pages_PLKH,
    v_pages_PLKH,
    page_table_BM,
    lengths_B,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    tiles: Tiles | None = None,
    interpret: bool = False,
):
    """softmax(scale * q k' with soft-cap and mask) v -> (out [B, N, H] in q's dtype, lse [B, N]).

    Key j of a sequence is in page page_table[j // L], slot j % L; the query is at position
    length - 1. A sequence of length 0 gets out 0 and lse -inf. Beyond the length and before the
    window, anything is allowed: invalid table entries, and pages that contain NaN.

    Args:
      page_table_BM: int32; only the first cdiv(length, L) entries of each sequence are used.
      lengths_B: int32, tokens in the cache, including the query's; at most M L.
      window: a query sees keys at distance < window; 0 is no limit.
      softcap: scores become cap * tanh(scores / cap); 0 is off.
      tiles: by default those of `choose_tiles`.

    Returns:
      out, and lse in float32, the natural logarithm of the sum of exponentials of scores.

    Raises:
      ValueError: the kernel does not support the shapes, dtypes or tiles.
    """
    B, N, H = q_BNH.shape
    P, L, K, _ = k_pages_PLKH.shape
    M = page_table_BM.shape[1]
    problem = obstacle(
        num_heads=N,
        num_kv_heads=K,
        head_dim=H,
        page_size=L,
        dtypes=(q_BNH.dtype, k_pages_PLKH.dtype, v_pages_PLKH.dtype),
    )
    if problem:
        raise ValueError(f'decode_attention: {problem}')
    tiles = tiles or choose_tiles(
        'forward',
        batch=B,
        num_kv_heads=K,
        head_dim=H,
        page_size=L,
        max_length=min(M * L, window or M * L),
        dtype=q_BNH.dtype,
    )
    if problem := tiles.misfit(head_dim=H, page_size=L):
        raise ValueError(f'decode_attention: {problem}')
    G = N // K
    rows = -(-G // 8) * 8  # TMA and the SMEM layout need multiples of 8 rows
    q_BKGH = q_BNH.reshape(B, K, G, H)
    q_BKGH = jnp.pad(q_BKGH, ((0, 0), (0, 0), (0, rows - G), (0, 0)))
    out_CBKGH, lse_CBKG = _attend_to_splits(
        q_BKGH,
        k_pages_PLKH.reshape(P * L, K * H),
        v_pages_PLKH.reshape(P * L, K * H),
        page_table_BM,
        lengths_B,
        page_size=L,
        scale=scale,
        window=window,
        softcap=softcap,
        tiles=tiles,
        interpret=interpret,
    )
    out_BKGH, lse_BKG = merge(out_CBKGH[..., :G, :], lse_CBKG[..., :G])
    return out_BKGH.reshape(B, N, H).astype(q_BNH.dtype), lse_BKG.reshape(B, N)


def find_seen(length, *, window: int, piece: int):
    """(the first key that the query sees, its piece, the piece after the last key's).

    A piece is `piece` tokens of the sequence.
    """
    start = jnp.maximum(length - window, 0) if window else jnp.int32(0)
    return start, lax.div(start, jnp.int32(piece)), pl.cdiv(length, jnp.int32(piece))


def merge(out_CX, lse_C):
    """Merges attention to C disjoint sets of keys: out [C, ..., H] and lse [C, ...] -> out and lse.

    Each out is normalised by its own sum, whose logarithm is lse; an empty set has lse -inf.
    """
    top_1 = jnp.max(lse_C, axis=0, keepdims=True)
    weights_C = jnp.exp(lse_C - jnp.where(jnp.isfinite(top_1), top_1, 0))
    total_1 = jnp.sum(weights_C, axis=0, keepdims=True)
    weights_C = weights_C / jnp.where(total_1 > 0, total_1, 1)
    out_X = jnp.sum(weights_C[..., None] * out_CX, axis=0)
    return out_X, (top_1 + jnp.log(jnp.maximum(total_1, 1)))[0]


def _attend_to_splits(
    q_BKGH,
    k_pages_TX,
    v_pages_TX,
    page_table_BM,
    lengths_B,
    *,
    page_size: int,
    scale: float,
    window: int,
    softcap: float,
    tiles: Tiles,
    interpret: bool,
):
    """(out [splits, B, K, G, H], lse [splits, B, K, G]) in float32; pages are [P L, K H]."""
    B, K, G, H = q_BKGH.shape
    M = page_table_BM.shape[1]
    dtype = q_BKGH.dtype
    piece = min(page_size, tiles.tokens)  # tokens per copy: a page, or a part of a long one
    pieces_a_tile = tiles.tokens // piece
    pieces_a_page = page_size // piece

    def body(q_ref, k_ref, v_ref, table_ref, lengths_ref, out_ref, lse_ref, *scratch):
        q_smem, shared, q_loaded, loaded = scratch
        (k_smem, v_smem), (out_smem, lse_smem) = shared
        batch, kv_head = lax.axis_index('batch'), lax.axis_index('kv_head')
        split = lax.axis_index('split')

        length = lengths_ref[batch]
        start, first_piece, end_piece = find_seen(length, window=window, piece=piece)
        num_tiles = pl.cdiv(end_piece - first_piece, jnp.int32(pieces_a_tile))
        tiles_a_split = pl.cdiv(num_tiles, jnp.int32(tiles.splits))
        first_tile = jnp.minimum(split * tiles_a_split, num_tiles)
        end_tile = jnp.minimum(first_tile + tiles_a_split, num_tiles)

        def slot_of(tile):
            return lax.rem(tile - first_tile, jnp.int32(tiles.slots))

        def pages_of(tile):
            """Page ids, clamped: the last tile may have fewer, and `tile` may be past the last."""
            pieces = [first_piece + tile * pieces_a_tile + i for i in range(pieces_a_tile)]
            entries = [lax.div(x, jnp.int32(pieces_a_page)) for x in pieces]
            return tuple(table_ref[batch, jnp.minimum(x, M - 1)] for x in entries)

        def load(tile, pages):
            """Starts copying a tile into its slot; missing pieces only arrive at the barrier."""
            slot = slot_of(tile)
            for i, page in enumerate(pages):
                index = first_piece + tile * pieces_a_tile + i
                token = page * page_size + lax.rem(index, jnp.int32(pieces_a_page)) * piece

                @pl.when(index < end_piece)
                def _(i=i, token=token):
                    source = pl.ds(token, piece), pl.ds(kv_head * H, H)
                    target = slot, pl.ds(i * piece, piece)
                    plgpu.copy_gmem_to_smem(k_ref.at[source], k_smem.at[target], loaded.at[slot])
                    plgpu.copy_gmem_to_smem(v_ref.at[source], v_smem.at[target], loaded.at[slot])

                @pl.when(index >= end_piece)
                def _():
                    plgpu.barrier_arrive(loaded.at[slot])
                    plgpu.barrier_arrive(loaded.at[slot])

        def attend(tile, carry):
            out, top, total, next_pages = carry
            slot = slot_of(tile)
            plgpu.barrier_wait(loaded.at[slot])
            first_key = (first_piece + tile * pieces_a_tile) * piece

            def visible(shape, axis):
                iota = plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)
                key = first_key + iota
                return (key >= start) & (key < length)

            shape = (ROWS, tiles.tokens)
            scores = matmul(q_smem, k_smem.at[slot].transpose((1, 0)), interpret=interpret)
            if softcap:
                # tanh(x) = 1 - 2 / (1 + exp(2 x)): the hardware's tanh is too inaccurate.
                powers = jnp.exp2(scores * (2 * LOG2_E * scale / softcap))
                scores = softcap * LOG2_E - (2 * softcap * LOG2_E) / (1 + powers)
            else:
                scores = scores * (scale * LOG2_E)
            scores = jnp.where(visible(shape, 1), scores, MASKED)
            new_top = jnp.maximum(top, scores.max(axis=1))
            shrink = jnp.exp2(top - new_top)
            weights = jnp.exp2(scores - lax.broadcast_in_dim(new_top, shape, [0]))
            total = total * shrink + weights.sum(axis=1)
            out = out * lax.broadcast_in_dim(shrink, (ROWS, H), [0])

            @pl.when((first_key < start) | (first_key + tiles.tokens > length))
            def _():
                # Masked values may be NaN, which a weight of zero does not remove.
                for i in range(0, H, 64):  # by parts: registers are scarce
                    part = slot, slice(None), pl.ds(i, 64)
                    values = v_smem[part]
                    v_smem[part] = jnp.where(
                        visible(values.shape, 0), values, jnp.zeros_like(values)
                    )
                plgpu.commit_smem()

            out = accumulate(out, weights.astype(dtype), v_smem.at[slot], interpret=interpret)

            @pl.when(tile + tiles.slots < end_tile)
            def _():
                load(tile + tiles.slots, next_pages)

            return out, new_top, total, pages_of(tile + tiles.slots + 1)

        plgpu.copy_gmem_to_smem(q_ref.at[batch, kv_head], q_smem.at[pl.ds(0, G)], q_loaded)
        first_loads = jnp.minimum(first_tile + tiles.slots, end_tile)
        pl.loop(first_tile, first_loads)(lambda tile: load(tile, pages_of(tile)))
        plgpu.barrier_wait(q_loaded)
        row = plgpu.Layout.WGMMA.reduce(1)
        out = plgpu.layout_cast(jnp.zeros((ROWS, H), jnp.float32), plgpu.Layout.WGMMA)
        top = plgpu.layout_cast(jnp.full((ROWS,), MASKED, jnp.float32), row)
        total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), row)
        carry = out, top, total, pages_of(first_tile + tiles.slots)
        out, top, total, _ = lax.fori_loop(first_tile, end_tile, attend, carry)

        inverse = jnp.where(total > 0, 1 / total, 0)
        out_smem[...] = out * lax.broadcast_in_dim(inverse, (ROWS, H), [0])
        lse_smem[...] = jnp.where(total > 0, (top + jnp.log2(total)) * (1 / LOG2_E), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, G)], out_ref.at[split, batch, kv_head])
        plgpu.copy_smem_to_gmem(lse_smem.at[pl.ds(0, G)], lse_ref.at[split, batch, kv_head])
        plgpu.wait_smem_to_gmem(0)

    ring = operand((tiles.slots, tiles.tokens, H), dtype)
    return launch(
        body,
        interpret=interpret,
        approx_math=True,
        out_type=(
            jax.ShapeDtypeStruct((tiles.splits, B, K, G, H), jnp.float32),
            jax.ShapeDtypeStruct((tiles.splits, B, K, G), jnp.float32),
        ),
        # kv_head varies fastest, because the heads of a page are adjacent in memory.
        grid=(B, tiles.splits, K),
        grid_names=('batch', 'split', 'kv_head'),
        scratch_types=(
            operand((ROWS, H), dtype),
            # The result reuses the memory of tiles that are no longer needed.
            plgpu.RefUnion(
                (ring, ring),
                (plgpu.SMEM((ROWS, H), jnp.float32), plgpu.SMEM((ROWS,), jnp.float32)),
            ),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=2 * pieces_a_tile, num_barriers=tiles.slots),
        ),
    )(q_BKGH, k_pages_TX, v_pages_TX, page_table_BM, lengths_B)

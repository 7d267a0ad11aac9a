"""The forward kernel: every row is read once, straight into registers, and written once.

Threads share only the sums of a row, so there is no copy through SMEM to wait for; several blocks
per multiprocessor hide the latency of the loads.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._compat import launch, pl, plgpu, tiled_layout
from pallas_kernels._padding import whole_tiles
from pallas_kernels.rms_norm.tiles import Tiles, choose_tiles


def forward(
    x_MD,
    scale_D,
    residual_MD=None,
    *,
    epsilon: float,
    tiles: Tiles | None = None,
    interpret: bool = False,
):
    """x / rms(x) * scale; a residual is first added to x, and the sum rounded to x's dtype.

    Returns:
      normed [M, D] in x's dtype, x + residual (None without a residual), 1 / rms [M] float32.
    """
    M, D = x_MD.shape
    tiles = tiles or choose_tiles('forward', rows=M, width=D, dtype=x_MD.dtype)
    steps = -(-M // tiles.rows)
    blocks = min(steps, tiles.blocks)
    layout, has_residual = layout_of(tiles), residual_MD is not None
    chunks = [pl.ds(start, tiles.columns) for start in range(0, D, tiles.columns)]
    arrays = [x_MD, residual_MD] if has_residual else [x_MD]
    arrays = [whole_tiles(array, tiles.rows, 0) for array in arrays]

    def body(*refs):
        x_ref, *residual, scale_ref = refs[: len(arrays) + 1]
        y_ref, *total, inverse_ref = refs[len(arrays) + 1 :]
        block = lax.axis_index('block')

        def read(rows, columns):
            x = load(x_ref, layout, rows, columns)
            for residual_ref in residual:
                residue = load(residual_ref, layout, rows, columns)
                x = (x.astype(jnp.float32) + residue.astype(jnp.float32)).astype(x.dtype)
            return x

        def step(index, _):
            rows = pl.ds((block + index * blocks) * tiles.rows, tiles.rows)
            squares, kept = None, None
            for columns in chunks:
                kept = read(rows, columns)
                x = kept.astype(jnp.float32)
                squares = x * x if squares is None else squares + x * x
            inverse_R = lax.rsqrt(jnp.sum(squares, axis=1) / D + epsilon)
            for columns in chunks:
                x = kept if len(chunks) == 1 else read(rows, columns)
                scale_C = load(scale_ref, layout.reduce(0), columns)
                y = x.astype(jnp.float32) * lax.broadcast_in_dim(inverse_R, x.shape, (0,))
                y *= lax.broadcast_in_dim(scale_C, x.shape, (1,))
                y_ref.at[rows, columns][...] = y.astype(x.dtype)
                for total_ref in total:
                    total_ref.at[rows, columns][...] = x
            inverse_ref.at[rows][...] = inverse_R

        lax.fori_loop(0, (steps - block + blocks - 1) // blocks, step, None)

    like_x = jax.ShapeDtypeStruct(arrays[0].shape, x_MD.dtype)
    inverse = jax.ShapeDtypeStruct(like_x.shape[:1], jnp.float32)
    outputs = launch(
        body,
        interpret=interpret,
        out_type=[like_x, like_x, inverse] if has_residual else [like_x, inverse],
        grid=(blocks,),
        grid_names=('block',),
    )(*arrays, scale_D.astype(jnp.float32))
    y_MD, *total, inverse_M = (output[:M] for output in outputs)
    return y_MD, total[0] if has_residual else None, inverse_M


def layout_of(tiles: Tiles) -> 'plgpu.Layout':
    """The register layout of [rows, columns]."""
    lane_rows, width = 32 // tiles.lanes, tiles.lanes * tiles.vector
    return tiled_layout(
        ((tiles.row_tile, tiles.warps * width), (lane_rows, width), (1, tiles.vector)),
        warp_dims=(-6, -5),
        lane_dims=(-4, -3),
    )


def load(ref, layout, *index):
    """Loads from memory into registers."""
    return plgpu.load(ref.at[index], layout=layout, optimized=False)

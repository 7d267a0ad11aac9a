"""The backward kernel: rows as in the forward kernel; each block sums its own part of dscale.

XLA adds these partial sums, without atomics, so that results are reproducible bit for bit.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._compat import launch, pl, plgpu
from pallas_kernels._padding import whole_tiles
from pallas_kernels.rms_norm.forward import layout_of, load
from pallas_kernels.rms_norm.tiles import Tiles, choose_tiles


def backward(
    dy_MD,
    dsum_MD,
    x_MD,
    scale_D,
    inverse_rms_M,
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
):
    """-> dx [M, D] in x's dtype, also the residual's gradient; dscale [D] float32.

    Args:
      dsum_MD: gradient of the sum that `forward` returned; None without a residual.
      x_MD: the input of the norm, including the residual.
    """
    M, D = x_MD.shape
    tiles = tiles or choose_tiles('backward', rows=M, width=D, dtype=x_MD.dtype)
    steps = -(-M // tiles.rows)
    blocks = min(steps, tiles.blocks)
    layout, row_tile = layout_of(tiles), tiles.row_tile
    count = D // tiles.columns
    arrays = [dy_MD, x_MD, inverse_rms_M] + ([] if dsum_MD is None else [dsum_MD])
    arrays = [whole_tiles(array, tiles.rows, 0) for array in arrays]
    shape = (row_tile, tiles.columns)

    def body(scale_ref, dy_ref, x_ref, inverse_ref, *refs):
        *dsum, dx_ref, dscale_ref, sums_smem = refs
        block = lax.axis_index('block')

        def over_chunks(function, init):
            """A loop over chunks of columns; unrolled, it would keep too many addresses."""
            if count == 1:
                return function(pl.ds(0, D), init)
            each = lambda c, carry: function(pl.ds(c * tiles.columns, tiles.columns), carry)  # noqa: E731
            return lax.fori_loop(0, count, each, init)

        def over_columns(value_C):
            return lax.broadcast_in_dim(value_C, shape, (1,))

        def over_rows(value_R):
            return lax.broadcast_in_dim(value_R, shape, (0,))

        def zeros():
            return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)

        def read(ref, rows, columns):
            return load(ref, layout, rows, columns).astype(jnp.float32)

        def read_scale(columns):
            return over_columns(load(scale_ref, layout.reduce(0), columns))

        def group(first):
            """The rows of one group, which are adjacent."""
            rows = pl.ds(first, row_tile)
            kept = []  # the whole rows, if there is only one chunk

            def add_product(columns, dot):
                kept[:] = read(dy_ref, rows, columns), read(x_ref, rows, columns)
                return dot + kept[0] * kept[1] * read_scale(columns)

            mean_R = jnp.sum(over_chunks(add_product, zeros()), axis=1) / D
            inverse_R = load(inverse_ref, layout.reduce(1), rows)
            inverse = over_rows(inverse_R)
            correction = over_rows(inverse_R * inverse_R * inverse_R * mean_R)

            def write(columns, _):
                again = (read(ref, rows, columns) for ref in (dy_ref, x_ref))
                dy, x = kept if count == 1 else again
                sums = load(sums_smem, layout, slice(None), columns)
                sums_smem.at[:, columns][...] = sums + dy * x * inverse
                dx = inverse * dy * read_scale(columns) - x * correction
                for dsum_ref in dsum:
                    dx += read(dsum_ref, rows, columns)
                dx_ref.at[rows, columns][...] = dx.astype(x_MD.dtype)

            over_chunks(write, None)

        def clear(columns, _):
            sums_smem.at[:, columns][...] = zeros()

        def step(index, _):
            first = (block + index * blocks) * tiles.rows
            for g in range(tiles.groups):
                group(first + g * row_tile)

        def deliver(columns, _):
            sums = load(sums_smem, layout, slice(None), columns)
            dscale_ref.at[block, :, columns][...] = sums

        over_chunks(clear, None)
        lax.fori_loop(0, (steps - block + blocks - 1) // blocks, step, None)
        over_chunks(deliver, None)

    dx_MD, partial = launch(
        body,
        interpret=interpret,
        out_type=[
            jax.ShapeDtypeStruct(arrays[1].shape, x_MD.dtype),
            jax.ShapeDtypeStruct((blocks, row_tile, D), jnp.float32),
        ],
        # Each thread uses only its own elements, so no synchronisation is needed.
        scratch_types=[plgpu.SMEM((row_tile, D), jnp.float32)],
        grid=(blocks,),
        grid_names=('block',),
    )(scale_D.astype(jnp.float32), *arrays)
    return dx_MD[:M], jnp.sum(partial, axis=(0, 1))

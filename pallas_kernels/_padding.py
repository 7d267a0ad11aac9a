"""Arrays of any length for kernels that work on whole tiles."""

import jax.numpy as jnp


def whole_tiles(x, tile: int, axis: int):
    """x with zeros at the end of the axis up to whole tiles; x itself where it has them."""
    missing = -x.shape[axis] % tile
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])

"""Pads arrays of any length to the whole tiles that kernels work on."""

import jax.numpy as jnp


def whole_tiles(x, tile: int, axis: int):
    """Pads the axis with zeros to a multiple of `tile`; returns x itself if it is one already."""
    missing = -x.shape[axis] % tile
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])

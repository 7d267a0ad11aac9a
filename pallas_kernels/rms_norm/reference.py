"""RMS norm in plain jnp: what the kernels must match, and what runs where they cannot."""

import jax.numpy as jnp
from jax import lax


def forward(x, scale, residual=None, *, epsilon: float):
    """x / rms(x) * scale over the last axes of x, which are scale's; computed in float32.

    Args:
      residual: added to x, rounded to x's dtype, before the norm.

    Returns:
      normed x in its dtype, x + residual (None without a residual), 1 / rms in float32.
    """
    total = x if residual is None else x + residual
    total_32 = total.astype(jnp.float32)
    axes = tuple(range(x.ndim - scale.ndim, x.ndim))
    inverse = lax.rsqrt(jnp.mean(total_32 * total_32, axis=axes, keepdims=True) + epsilon)
    scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - scale.ndim) + scale.shape)
    normed = (total_32 * inverse * scale).astype(x.dtype)
    return normed, None if residual is None else total, jnp.squeeze(inverse, axes)


def backward(dy_MD, dsum_MD, x_MD, scale_D, inverse_rms_M):
    """-> dx [M, D] in x's dtype, also the residual's gradient; dscale [D] float32.

    Args:
      dsum_MD: gradient of the sum that `forward` returned; None without a residual.
      x_MD: the input of the norm, including the residual.
    """
    dy, x = dy_MD.astype(jnp.float32), x_MD.astype(jnp.float32)
    inverse = inverse_rms_M[:, None]
    dscale_D = jnp.sum(dy * x * inverse, axis=0)
    dnormed = dy * scale_D.astype(jnp.float32)[None]
    mean = jnp.mean(dnormed * x, axis=1, keepdims=True)
    dx = inverse * dnormed - x * (inverse**3 * mean)
    if dsum_MD is not None:
        dx += dsum_MD.astype(jnp.float32)
    return dx.astype(x_MD.dtype), dscale_D

"""Root mean square normalisation (Zhang and Sennrich, 2019)."""

import jax.numpy as jnp
from jax import lax


def rms_norm(x, scale, *, epsilon: float):
    """x / rms(x) * scale over the last axes of x, those of scale; float32 inside, x's dtype out."""
    x_32 = x.astype(jnp.float32)
    axes = tuple(range(x.ndim - scale.ndim, x.ndim))
    inverse = lax.rsqrt(jnp.mean(x_32 * x_32, axis=axes, keepdims=True) + epsilon)
    scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - scale.ndim) + scale.shape)
    return (x_32 * inverse * scale).astype(x.dtype)

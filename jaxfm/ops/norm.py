"""Root mean square normalisation (Zhang and Sennrich, 2019)."""

import jax.numpy as jnp
from jax import lax


def rms_norm(x, scale, *, epsilon: float):
    """x / rms(x) * scale over the last axis; computed in float32, returned in x's dtype."""
    x_32 = x.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.mean(x_32 * x_32, axis=-1, keepdims=True) + epsilon)
    scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + scale.shape)
    return (x_32 * inverse * scale).astype(x.dtype)

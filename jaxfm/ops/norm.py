"""Root mean square normalisation (Zhang and Sennrich, 2019)."""

import jax.numpy as jnp
from jax import lax

from jaxfm.ops.choice import choose


def rms_norm(x, scale, *, epsilon: float, implementation: str | None = None):
    """x / rms(x) * scale over the last axes of x, those of scale; float32 inside, x's dtype out.

    Args:
      implementation: None is the best known, a name of `ops.IMPLEMENTATIONS` that one.
    """
    choose('rms_norm', implementation)  # one only, so far
    x_32 = x.astype(jnp.float32)
    axes = tuple(range(x.ndim - scale.ndim, x.ndim))
    inverse = lax.rsqrt(jnp.mean(x_32 * x_32, axis=axes, keepdims=True) + epsilon)
    scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - scale.ndim) + scale.shape)
    return (x_32 * inverse * scale).astype(x.dtype)

"""Rotary position embedding (Su et al., 2021), in the half-split layout of GPT-NeoX and Llama."""

import jax.numpy as jnp
import numpy as np


def rope_frequencies(
    head_dim: int,
    *,
    theta: float,
    scaling: str = 'none',
    factor: float = 1.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_max_position: int = 8192,
) -> np.ndarray:
    """Radians per position of each pair of dimensions, [head_dim / 2] float64.

    `linear` divides every frequency by the factor (position interpolation); `llama3` divides only
    those whose wavelength exceeds the original context, with a ramp between (Llama 3.1).
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling == 'linear':
        return frequencies / factor
    if scaling == 'llama3':
        turns = original_max_position * frequencies / (2 * np.pi)  # over the original context
        ramp = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
        ramp = np.clip(ramp, 0, 1)
        return frequencies * (ramp + (1 - ramp) / factor)
    if scaling != 'none':
        raise ValueError(f"scaling is 'none', 'linear' or 'llama3', not {scaling!r}")
    return frequencies


def apply_rope(x_BTNH, positions_BT, frequencies):
    """Rotates pairs (i, i + H/2) of the last axis by position x frequency; float32 inside."""
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * jnp.asarray(
        frequencies, jnp.float32
    ).reshape(1, 1, 1, -1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)

"""Rotary position embedding (Su et al., 2021), in the half-split layout of GPT-NeoX and Llama."""

import functools

import jax.numpy as jnp
import numpy as np

from jaxfm.ops.batch_invariant import by_rows


def rope_frequencies(
    head_dim: int,
    *,
    theta: float,
    scaling: str = 'none',
    factor: float = 1.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    beta_slow: float = 1.0,
    beta_fast: float = 32.0,
    attention_factor: float = 0.0,
    original_max_position: int = 8192,
) -> tuple[np.ndarray, float]:
    """Radians per position of each pair of dimensions, [head_dim / 2] float64, and a magnitude.

    `linear` divides every frequency by the factor (position interpolation). `llama3` (Llama 3.1)
    divides frequencies that turn less than low_freq_factor times over the original context, keeps
    those above high_freq_factor and interpolates in between. `yarn` (Peng et al., 2023)
    interpolates by pair index and multiplies q and k by the magnitude, which is 1 otherwise.

    Raises:
      ValueError: an unknown scaling.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling == 'linear':
        return frequencies / factor, 1.0
    if scaling == 'llama3':
        turns = original_max_position * frequencies / (2 * np.pi)  # over the original context
        ramp = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
        ramp = np.clip(ramp, 0, 1)
        return frequencies * (ramp + (1 - ramp) / factor), 1.0
    if scaling == 'yarn':
        # The (fractional) index of the pair that makes `turns` turns over the original context.
        fast, slow = (
            head_dim * np.log(original_max_position / (2 * np.pi * turns)) / (2 * np.log(theta))
            for turns in (beta_fast, beta_slow)
        )
        first, last = max(np.floor(fast), 0), min(np.ceil(slow), head_dim - 1)
        keep = 1 - np.clip((np.arange(head_dim // 2) - first) / max(last - first, 1e-3), 0, 1)
        magnitude = attention_factor or 0.1 * np.log(factor) + 1
        return frequencies * (keep + (1 - keep) / factor), float(magnitude)
    if scaling != 'none':
        raise ValueError(f"scaling must be 'none', 'linear', 'llama3' or 'yarn', not {scaling!r}")
    return frequencies, 1.0


def apply_rope(
    x_BTNH, positions_BT, frequencies, magnitude: float = 1.0, *, batch_invariant: bool = False
):
    """Rotates pairs (i, i + H/2) of the last axis by position x frequency, computed in float32.

    Args:
      batch_invariant: results for a row do not depend on the others (`ops.batch_invariant`).
    """
    if batch_invariant:
        rotate = functools.partial(apply_rope, frequencies=frequencies, magnitude=magnitude)
        return by_rows(rotate, (x_BTNH, positions_BT))
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * jnp.asarray(
        frequencies, jnp.float32
    ).reshape(1, 1, 1, -1)
    cos, sin = magnitude * jnp.cos(angles), magnitude * jnp.sin(angles)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)

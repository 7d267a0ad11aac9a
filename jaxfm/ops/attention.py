"""Scaled dot-product attention; its mask comes from positions and segment ids, not array indices.

B batch, T query position, S key position, N heads, K kv heads, G = N / K, H head dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxfm.ops.choice import choose
from jaxfm.sharding import activation, place

# Below every score; finite, so that a row of nothing else has no NaN.
MASKED = -1e30


class KeyValues(NamedTuple):
    """Keys and values with what the mask needs to know of them: the view a cache gives."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array
    positions_BS: jax.Array
    segment_ids_BS: jax.Array  # 0 is padding: never attended to


def attention_mask(positions_BT, segment_ids_BT, keys: KeyValues, window: int = 0):
    """True where a query may see a key: same segment, not in its future, within the window."""
    q_position, kv_position = positions_BT[:, :, None], keys.positions_BS[:, None, :]
    q_segment, kv_segment = segment_ids_BT[:, :, None], keys.segment_ids_BS[:, None, :]
    mask_BTS = (q_segment == kv_segment) & (q_segment > 0) & (kv_position <= q_position)
    if window:
        mask_BTS &= q_position - kv_position < window
    return mask_BTS


def attention(
    q_BTNH,
    keys: KeyValues,
    positions_BT,
    segment_ids_BT,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    implementation: str | None = None,
):
    """softmax(scale * q k' with soft-cap and mask) v -> [B, T, N, H] in q's dtype.

    Scores and softmax are float32. A query that may see nothing (padding) gets zeros.

    Args:
      window: a query sees keys at distance < window; 0 is no limit.
      softcap: scores become cap * tanh(scores / cap); 0 is off (Gemma 2).
      implementation: None is the best known, a name of `ops.IMPLEMENTATIONS` that one.
    """
    choose('attention', implementation)  # one only, so far
    B, T, N, H = q_BTNH.shape
    K = keys.k_BSKH.shape[2]
    keys = _whole_keys(keys)
    heads = activation('batch', 'position', 'kv_heads', 'group', 'head_dim')
    q_BTKGH = jnp.reshape(q_BTNH * scale, (B, T, K, N // K, H), out_sharding=heads)
    scores_BKGTS = jnp.einsum(
        'btkgh,bskh->bkgts', q_BTKGH, keys.k_BSKH, preferred_element_type=jnp.float32
    )
    if softcap:
        scores_BKGTS = softcap * jnp.tanh(scores_BKGTS / softcap)
    mask_BTS = attention_mask(positions_BT, segment_ids_BT, keys, window)
    # Added, not selected: nothing is left to do for the mask in the backward pass.
    scores_BKGTS += jnp.where(mask_BTS, 0.0, MASKED)[:, None, None]
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(q_BTNH.dtype)
    out_BTKGH = jnp.einsum('bkgts,bskh->btkgh', weights_BKGTS, keys.v_BSKH)
    # A row that sees nothing has come out as a mean of all values.
    sees_BT = jnp.any(mask_BTS, axis=-1)
    out_BTKGH = jnp.where(sees_BT[:, :, None, None, None], out_BTKGH, 0)
    merged = activation('batch', 'position', 'heads', 'head_dim')
    return jnp.reshape(out_BTKGH, (B, T, N, H), out_sharding=merged)


def _whole_keys(keys: KeyValues) -> KeyValues:
    head_names = ('batch', 'key_position', 'kv_heads', 'head_dim')
    return KeyValues(
        place(keys.k_BSKH, *head_names),
        place(keys.v_BSKH, *head_names),
        place(keys.positions_BS, 'batch', 'key_position'),
        place(keys.segment_ids_BS, 'batch', 'key_position'),
    )

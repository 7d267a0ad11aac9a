"""Attention in plain jnp, with the kernel's signature; materialises all scores, [B, K, G, T, S].

B batch, T query position, S key position, N heads, K kv heads, G = N / K, H head dim.
"""

import jax.numpy as jnp

from pallas_kernels.attention import schedule


def forward(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    q_positions_BT,
    q_segment_ids_BT,
    kv_positions_BS,
    kv_segment_ids_BS,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
):
    """Like the kernel: out [B, T, N, H] in q's dtype and lse [B, N, T] float32.

    Scores and softmax are float32; weights are cast to q's dtype before they multiply the values.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = scale * jnp.einsum(
        'btkgh,bskh->bkgts', q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    if softcap:
        scores_BKGTS = softcap * jnp.tanh(scores_BKGTS / softcap)
    mask_BTS = schedule.visible(
        q_positions_BT[:, :, None],
        q_segment_ids_BT[:, :, None],
        kv_positions_BS[:, None, :],
        kv_segment_ids_BS[:, None, :],
        window,
    )
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, -jnp.inf)
    sees_BT1 = jnp.any(mask_BTS, axis=-1, keepdims=True)[:, None, None]
    # Intermediate values are finite even if a row sees no key, so that gradients have no NaN.
    highest = jnp.where(sees_BT1, jnp.max(scores_BKGTS, axis=-1, keepdims=True), 0.0)
    unnormalized = jnp.exp(scores_BKGTS - highest)
    total = jnp.where(sees_BT1, jnp.sum(unnormalized, axis=-1, keepdims=True), 1.0)
    weights_BKGTS = (unnormalized / total).astype(q_BTNH.dtype)
    out_BTKGH = jnp.einsum('bkgts,bskh->btkgh', weights_BKGTS, v_BSKH)
    lse_BKGT1 = jnp.where(sees_BT1, highest + jnp.log(total), -jnp.inf)
    return out_BTKGH.reshape(B, T, N, H), lse_BKGT1.reshape(B, N, T)

"""Decode attention over paged keys and values in plain jax.numpy: gathers the pages of each row."""

import jax.numpy as jnp


def forward(
    q_BNH,
    k_pages_PLKH,
    v_pages_PLKH,
    page_table_BM,
    lengths_B,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
):
    """Like the kernel; scores and softmax are float32."""
    B, N, H = q_BNH.shape
    P, L, K, _ = k_pages_PLKH.shape
    S = page_table_BM.shape[1] * L
    positions_1S, lengths_B1 = jnp.arange(S)[None], lengths_B[:, None]
    visible_BS = positions_1S < lengths_B1
    if window:
        visible_BS &= positions_1S >= lengths_B1 - window
    # Table entries beyond a row's length may be invalid.
    pages_BM = jnp.clip(page_table_BM, 0, P - 1)
    k_BSKH = k_pages_PLKH[pages_BM].reshape(B, S, K, H)
    v_BSKH = v_pages_PLKH[pages_BM].reshape(B, S, K, H)
    # Values beyond the length may be NaN, which a weight of zero does not remove.
    v_BSKH = jnp.where(visible_BS[:, :, None, None], v_BSKH, 0)
    q_BKGH = q_BNH.reshape(B, K, N // K, H)
    scores_BKGS = scale * jnp.einsum(
        'bkgh,bskh->bkgs', q_BKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    if softcap:
        scores_BKGS = softcap * jnp.tanh(scores_BKGS / softcap)
    scores_BKGS = jnp.where(visible_BS[:, None, None], scores_BKGS, -jnp.inf)
    max_BKG1 = jnp.max(scores_BKGS, axis=-1, keepdims=True)
    max_BKG1 = jnp.where(jnp.isfinite(max_BKG1), max_BKG1, 0)
    weights_BKGS = jnp.exp(scores_BKGS - max_BKG1)
    sum_BKG1 = jnp.sum(weights_BKGS, axis=-1, keepdims=True)
    weights_BKGS /= jnp.where(sum_BKG1 > 0, sum_BKG1, 1)
    out_BKGH = jnp.einsum(
        'bkgs,bskh->bkgh',
        weights_BKGS.astype(v_BSKH.dtype),
        v_BSKH,
        preferred_element_type=jnp.float32,
    )
    lse_BKG1 = max_BKG1 + jnp.log(sum_BKG1)
    return out_BKGH.reshape(B, N, H).astype(q_BNH.dtype), lse_BKG1.reshape(B, N)

"""Plain, dense versions of the ops for comparison with kernels; they compute in the inputs' dtype.

With bfloat16 they are XLA's path; with float32 copies at the highest precision, the reference. They
share no code with the `reference` modules of the kernels.

B batch, T queries, S keys, N heads, K kv heads, H head dim, M tokens, D embed, V vocab, P pages,
L tokens a page.
"""

import jax
import jax.numpy as jnp
from jax import lax

MASKED = -1e30


def exact(function, *arguments):
    """The function of float32 copies, without the devices' shortcuts for float32 products."""

    def widen(x):
        return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x

    with jax.default_matmul_precision('highest'):
        return jax.jit(function)(*jax.tree.map(widen, arguments))


def rms_norm(x_MD, scale_D, residual_MD=None, *, epsilon):
    """-> (y, x + residual or None)."""
    sum_MD = x_MD if residual_MD is None else x_MD + residual_MD
    wide_MD = sum_MD.astype(jnp.float32)
    inverse_M1 = lax.rsqrt(jnp.mean(wide_MD * wide_MD, axis=-1, keepdims=True) + epsilon)
    y_MD = (wide_MD * inverse_M1 * scale_D.astype(jnp.float32)[None]).astype(x_MD.dtype)
    return y_MD, None if residual_MD is None else sum_MD


def visible(q_positions_BT, q_segment_ids_BT, kv_positions_BS, kv_segment_ids_BS, window):
    """True where a query sees a key."""
    distance = q_positions_BT[:, :, None] - kv_positions_BS[:, None, :]
    same = q_segment_ids_BT[:, :, None] == kv_segment_ids_BS[:, None, :]
    mask_BTS = same & (q_segment_ids_BT[:, :, None] > 0) & (distance >= 0)
    return mask_BTS & (distance < window) if window else mask_BTS


def attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS, *, scale, softcap=0.0):
    """-> (out in q's dtype, log-sum-exp [B, N, T]); 0 and -inf for queries that see no key."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = (q_BTNH * jnp.asarray(scale, q_BTNH.dtype)).reshape(B, T, K, N // K, H)
    scores = jnp.einsum('btkgh,bskh->bkgts', q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask_BTS[:, None, None], scores, MASKED)
    sees_BT = jnp.any(mask_BTS, axis=-1)
    lse_BKGT = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - lse_BKGT[..., None]).astype(q_BTNH.dtype)
    out_BTKGH = jnp.einsum('bkgts,bskh->btkgh', weights, v_BSKH)
    out_BTKGH = jnp.where(sees_BT[:, :, None, None, None], out_BTKGH, 0)
    lse_BNT = jnp.where(sees_BT[:, None], lse_BKGT.reshape(B, N, T), -jnp.inf)
    return out_BTKGH.reshape(B, T, N, H), lse_BNT


def decode_attention(
    q_BNH, k_pages_PLKH, v_pages_PLKH, page_table_BM, lengths_B, *, scale, window=0, softcap=0.0
):
    """Gathers the pages of every sequence into a row, and attends with the query at its end."""
    B, M = page_table_BM.shape
    L = k_pages_PLKH.shape[1]
    k_BSKH, v_BSKH = (
        pages[page_table_BM].reshape(B, M * L, *pages.shape[2:])
        for pages in (k_pages_PLKH, v_pages_PLKH)
    )
    slots_BS = jnp.broadcast_to(jnp.arange(M * L, dtype=jnp.int32), (B, M * L))
    last_B1 = lengths_B[:, None] - 1
    ones = jnp.ones_like
    mask_B1S = visible(last_B1, ones(last_B1), slots_BS, ones(slots_BS), window)
    out_B1NH, lse_BN1 = attention(
        q_BNH[:, None], k_BSKH, v_BSKH, mask_B1S, scale=scale, softcap=softcap
    )
    return out_B1NH[:, 0], lse_BN1[..., 0]


def cross_entropy(
    hidden_MD, weight_VD, targets_M, offset_MV=None, *, vocab_size, first_id=0, softcap=0.0
):
    """-> (log-sum-exp, logit of the target or 0) over the ids from first_id on, float32.

    offset_MV is added to the products before the soft-cap: its gradient is that of the products.
    """
    logits_MV = jnp.einsum('md,vd->mv', hidden_MD, weight_VD, preferred_element_type=jnp.float32)
    if offset_MV is not None:
        logits_MV += offset_MV
    if softcap:
        logits_MV = softcap * jnp.tanh(logits_MV / softcap)
    ids_1V = first_id + lax.broadcasted_iota(jnp.int32, (1, weight_VD.shape[0]), 1)
    is_target_MV = (ids_1V == targets_M[:, None]) & (ids_1V < vocab_size)
    picked_M = jnp.sum(jnp.where(is_target_MV, logits_MV, 0.0), axis=-1)
    logits_MV = jnp.where(ids_1V < vocab_size, logits_MV, -jnp.inf)
    return jax.nn.logsumexp(logits_MV, axis=-1), picked_M

"""Decoding attention: one query per sequence, keys and values in pages.

B batch, N heads, K kv heads, H head dim, P pages, L tokens per page, M most pages of a sequence.
"""

import jax.numpy as jnp

from jaxfm.ops.paged_attention import Pages, paged_attention


def decode_attention(
    q_BNH,
    k_pages_PLKH,
    v_pages_PLKH,
    page_table_BM,
    lengths_B,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    implementation: str | None = None,
):
    """softmax(scale * q k' with soft-cap and mask) v -> [B, N, H] in q's dtype.

    `paged_attention` in one layer, with one query per sequence, at position length - 1. A sequence
    of length 0 gets zeros.

    On a mesh the pages are sharded like the batch: each device has a pool for its own sequences,
    and their page tables hold indices into that pool.

    Args:
      lengths_B: int32, tokens of each sequence, including the query's token.
      implementation: a name in `ops.IMPLEMENTATIONS`; None picks the best known.

    Raises:
      ValueError: the named implementation cannot run this call.
    """
    pages = Pages(k_pages_PLKH[None], v_pages_PLKH[None], 0, page_table_BM)
    is_query_B1 = (lengths_B[:, None] > 0).astype(jnp.int32)
    return paged_attention(
        q_BNH[:, None],
        pages,
        lengths_B[:, None] - 1,
        is_query_B1,
        scale=scale,
        window=window,
        softcap=softcap,
        implementation=implementation,
    )[:, 0]

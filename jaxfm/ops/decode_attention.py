"""Decoding attention: one query per sequence, keys and values in pages.

B batch, N heads, K kv heads, H head dim, P pages, L tokens per page, M most pages of a sequence.
"""

import functools

from jaxfm.ops.choice import choose
from jaxfm.sharding import per_shard, place
from pallas_kernels import decode_attention as kernels

_QUERIES = ('batch', 'heads', 'head_dim')
_PAGES = ('batch', None, 'kv_heads', 'head_dim')
_TABLE = ('batch', None)


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

    Key j of a sequence is in page page_table[j // L], slot j % L; its query is at position
    length - 1. Table entries and slots past the length are never used. A sequence of length 0 gets
    zeros. Scores and softmax are float32.

    On a mesh the pages are sharded like the batch: each device has a pool for its own sequences,
    and their page tables hold indices into that pool.

    Args:
      lengths_B: int32, tokens of each sequence, including the query's token.
      window: a query sees keys at distance < window; 0 is no limit.
      softcap: scores become cap * tanh(scores / cap); 0 is off.
      implementation: a name in `ops.IMPLEMENTATIONS`; None picks the best known.

    Raises:
      ValueError: the named implementation cannot run this call.
    """
    problem = kernels.obstacle(
        num_heads=q_BNH.shape[1],
        num_kv_heads=k_pages_PLKH.shape[2],
        head_dim=q_BNH.shape[2],
        page_size=k_pages_PLKH.shape[1],
        dtypes=(q_BNH.dtype, k_pages_PLKH.dtype, v_pages_PLKH.dtype),
    )
    unsupported = {'mosaic': f"{problem}; use 'xla'"} if problem else {}
    name = choose('decode_attention', implementation, unsupported)
    if name == 'xla':
        forward = kernels.reference.forward
    else:
        forward = functools.partial(kernels.forward, interpret=name == 'interpret')

    def attend(*arrays):
        return forward(*arrays, scale=scale, window=window, softcap=softcap)[0]

    names = _QUERIES, _PAGES, _PAGES, _TABLE, _TABLE[:1]
    arrays = q_BNH, k_pages_PLKH, v_pages_PLKH, page_table_BM, lengths_B
    placed = (place(x, *axes) for x, axes in zip(arrays, names))
    return per_shard(attend, names, _QUERIES)(*placed)

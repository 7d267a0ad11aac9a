"""Scaled dot-product attention, masked by positions and segment ids instead of array indices.

B batch, T query position, S key position, N heads, K kv heads, G = N / K, H head dim.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxfm.ops.batch_invariant import by_documents
from jaxfm.ops.choice import choose
from jaxfm.sharding import ACTIVATIONS, activation, axis_size, per_shard, place, split_axes
from pallas_kernels import attention as kernels
from pallas_kernels.attention import schedule

# Forward results that the kernel's backward pass needs; remat policies refer to these names.
SAVED_NAMES = ('attention_out', 'attention_lse')

# With fewer queries per row, as in decoding, most of each kernel tile would be wasted.
_LEAST_QUERIES = 64

# Below every score, but finite, so that a fully masked row gives no NaN.
MASKED = -1e30


class KeyValues(NamedTuple):
    """Keys and values, with the positions and segment ids that the mask needs."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array
    positions_BS: jax.Array
    segment_ids_BS: jax.Array  # 0 is padding, which is never attended to


def attention_mask(positions_BT, segment_ids_BT, keys: KeyValues, window: int = 0):
    """[B, T, S], True where a query sees a key: same segment, not in its future, in its window."""
    return schedule.visible(
        positions_BT[:, :, None],
        segment_ids_BT[:, :, None],
        keys.positions_BS[:, None, :],
        keys.segment_ids_BS[:, None, :],
        window,
    )


def obstacles(
    *, head_dim: int, dtype, softcap: float = 0.0, one_document: bool = False
) -> dict[str, str]:
    """{implementation: why it cannot run such a call, and what to use instead}."""
    dtype, found = jnp.dtype(dtype).name, {}
    if obstacle := kernels.obstacle(head_dim=head_dim, dtype=dtype):
        found['mosaic'] = f"{obstacle}; use 'xla'"
    if dtype not in ('bfloat16', 'float16'):
        found['cudnn'] = f'q, k and v must be bfloat16 or float16, not {dtype}'
    if head_dim % 8 or head_dim > 256:
        found['cudnn'] = f"head_dim must be a multiple of 8 up to 256, not {head_dim}; use 'xla'"
    if softcap:
        found['cudnn'] = f"it has no soft-cap ({softcap:g} here); use 'mosaic' or 'xla'"
    if not one_document:
        found['cudnn'] = (
            'it would attend across documents, because its public interface has no segment ids; it '
            'is correct only if every row is one document from position 0 with padding at the end. '
            "Promise that with one_document=True (data.packing='none'), which is not possible with "
            "a cache, as in sampling, or use 'mosaic' or 'xla'"
        )
    if axis_size(ACTIVATIONS, 'position') > 1:
        found['cudnn'] = "its mask is wrong for rows split over context; use 'mosaic' or 'xla'"
    found['fa3'] = (
        'the package flash-attn3-jax supports only head_dim 128 and needs a list of documents of '
        "fixed length, which a packed batch does not have; use 'mosaic' or 'xla'"
    )
    return found


def attention(
    q_BTNH,
    keys: KeyValues,
    positions_BT,
    segment_ids_BT,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    one_document: bool = False,
    implementation: str | None = None,
    batch_invariant: bool = False,
):
    """softmax(scale * q k' with soft-cap and mask) v -> [B, T, N, H] in q's dtype.

    Scores and softmax are float32. A query that sees no key (padding) gets zeros.

    Args:
      window: a query sees keys at distance < window; 0 is no limit.
      softcap: scores become cap * tanh(scores / cap); 0 is off (Gemma 2).
      one_document: promises that every row is one document at positions 0, 1, 2, ..., padded only
      at the end, with keys from the same tokens as the queries.
      implementation: a name in `ops.IMPLEMENTATIONS`; None picks the best known.
      batch_invariant: results for a query depend only on its document (`ops.batch_invariant`).

    Raises:
      ValueError: the named implementation cannot run this call.
    """
    if batch_invariant:
        options = dict(scale=scale, window=window, softcap=softcap)

        def op(q_BTNH, k, v, kv_positions, kv_segments, positions_BT, segment_ids_BT):
            keys = _whole_keys(KeyValues(k, v, kv_positions, kv_segments))
            return _xla(q_BTNH, keys, positions_BT, segment_ids_BT, **options)

        out_BTNH = by_documents(op, q_BTNH, *keys, positions_BT, segment_ids_BT, **options)
        return checkpoint_name(out_BTNH, SAVED_NAMES[0])
    unsupported = obstacles(
        head_dim=q_BTNH.shape[-1], dtype=q_BTNH.dtype, softcap=softcap, one_document=one_document
    )
    if implementation is None and q_BTNH.shape[1] < _LEAST_QUERIES:
        unsupported['mosaic'] = 'too few queries per row to fill a tile of the kernel'
    name = choose('attention', implementation, unsupported)
    keys = _whole_keys(keys)
    if name == 'xla':
        return _xla(q_BTNH, keys, positions_BT, segment_ids_BT, scale, window, softcap)
    q_BTNH = place(q_BTNH, *_QUERIES)
    if name == 'cudnn':
        return _cudnn(q_BTNH, keys, segment_ids_BT, scale, window)
    assert name in ('mosaic', 'interpret'), name
    options = (('scale', scale), ('window', window), ('softcap', softcap))
    options += (('interpret', name == 'interpret'),)
    ids = (place(positions_BT, *_ROWS), place(segment_ids_BT, *_ROWS), *keys[2:])
    return _flash(q_BTNH, *keys[:2], ids, options)


# Logical axes.
_QUERIES = ('batch', 'position', 'heads', 'head_dim')
_KEYS = ('batch', 'key_position', 'kv_heads', 'head_dim')
_ROWS, _KEY_ROWS = ('batch', 'position'), ('batch', 'key_position')
_IDS = (_ROWS, _ROWS, _KEY_ROWS, _KEY_ROWS)
_LSE = ('batch', 'heads', 'position')


def _xla(q_BTNH, keys: KeyValues, positions_BT, segment_ids_BT, scale, window, softcap):
    B, T, N, H = q_BTNH.shape
    K = keys.k_BSKH.shape[2]
    heads = activation('batch', 'position', 'kv_heads', 'group', 'head_dim')
    q_BTKGH = jnp.reshape(q_BTNH * scale, (B, T, K, N // K, H), out_sharding=heads)
    scores_BKGTS = jnp.einsum(
        'btkgh,bskh->bkgts', q_BTKGH, keys.k_BSKH, preferred_element_type=jnp.float32
    )
    if softcap:
        scores_BKGTS = softcap * jnp.tanh(scores_BKGTS / softcap)
    mask_BTS = attention_mask(positions_BT, segment_ids_BT, keys, window)
    # Adding the mask instead of selecting leaves no work for it in the backward pass.
    scores_BKGTS += jnp.where(mask_BTS, 0.0, MASKED)[:, None, None]
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(q_BTNH.dtype)
    out_BTKGH = jnp.einsum('bkgts,bskh->btkgh', weights_BKGTS, keys.v_BSKH)
    # A query that sees no key has averaged all values; it gets zeros.
    sees_BT = jnp.any(mask_BTS, axis=-1)
    out_BTKGH = jnp.where(sees_BT[:, :, None, None, None], out_BTKGH, 0)
    merged = activation('batch', 'position', 'heads', 'head_dim')
    return jnp.reshape(out_BTKGH, (B, T, N, H), out_sharding=merged)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q_BTNH, k_BSKH, v_BSKH, ids, options):
    """Our kernel: a device computes its shard of rows, heads and queries against all their keys."""
    return _flash_forward(q_BTNH, k_BSKH, v_BSKH, ids, options)[0]


def _flash_forward(q_BTNH, k_BSKH, v_BSKH, ids, options):
    forward = functools.partial(kernels.forward, **dict(options))
    in_names = (_QUERIES, _KEYS, _KEYS, *_IDS)
    out, lse = per_shard(forward, in_names, [_QUERIES, _LSE])(q_BTNH, k_BSKH, v_BSKH, *ids)
    out, lse = (checkpoint_name(x, name) for x, name in zip((out, lse), SAVED_NAMES))
    return out, (q_BTNH, k_BSKH, v_BSKH, out, lse, ids)


def _flash_backward(options, residuals, dout_BTNH):
    *arrays, ids = residuals

    def backward(*arrays):
        dq, dk, dv = kernels.backward(*arrays, **dict(options))
        # Each device has computed only the contribution of its own queries.
        if axis_size(ACTIVATIONS, 'position') > 1:
            dk, dv = lax.psum((dk, dv), split_axes('position'))
        return dq, dk, dv

    in_names = (_QUERIES, _KEYS, _KEYS, _QUERIES, _LSE, _QUERIES, *_IDS)
    backward = per_shard(backward, in_names, [_QUERIES, _KEYS, _KEYS])
    return *backward(*arrays, place(dout_BTNH, *_QUERIES), *ids), None


_flash.defvjp(_flash_forward, _flash_backward)


def _cudnn(q_BTNH, keys: KeyValues, segment_ids_BT, scale: float, window: int):
    """Causal attention by index, correct where each row is one document starting at position 0."""

    def attend(q, k, v):
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=scale,
            is_causal=True,
            local_window_size=(window - 1, 0) if window else None,
            implementation='cudnn',
        )

    attend = per_shard(attend, (_QUERIES, _KEYS, _KEYS), _QUERIES)
    out_BTNH = attend(q_BTNH, keys.k_BSKH, keys.v_BSKH)
    # Tokens do not see the padding after them, but padding sees tokens: zero it.
    return jnp.where(segment_ids_BT[:, :, None, None] > 0, out_BTNH, 0)


def _whole_keys(keys: KeyValues) -> KeyValues:
    names = (_KEYS, _KEYS, _KEY_ROWS, _KEY_ROWS)
    return KeyValues(*(place(x, *axes) for x, axes in zip(keys, names)))

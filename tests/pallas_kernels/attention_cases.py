"""Attention problems small enough for the interpreter, and their answers in float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """Tokens and heads of one problem."""

    num_queries: int = 200
    num_keys: int = 200
    num_heads: int = 2
    num_kv_heads: int = 1
    head_dim: int = 64
    dtype: str = 'bfloat16'
    lengths: tuple[int, ...] = ()  # of the documents in a row; the rest is padding
    window: int = 0
    softcap: float = 0.0
    magnitude: float = 1.0  # approximate, of the logits
    is_permuted: bool = False
    batch: int = 1

    @property
    def options(self) -> dict:
        return dict(scale=self.head_dim**-0.5, window=self.window, softcap=self.softcap)

    def arrays(self) -> tuple:
        """The kernel's inputs; queries are the last tokens of a row, as with a cache.

        In a batch, every other row has its documents in reverse order.
        """
        rng = np.random.default_rng(0)
        B, T, S, H = self.batch, self.num_queries, self.num_keys, self.head_dim

        def normal(*shape):
            return rng.standard_normal(shape)

        q = self.magnitude * normal(B, T, self.num_heads, H)
        k, v = normal(B, S, self.num_kv_heads, H), normal(B, S, self.num_kv_heads, H)
        lengths = self.lengths or (S,)
        ids = [_documents(lengths[:: 1 - 2 * (row % 2)], S) for row in range(B)]
        positions, segments = (np.stack(x) for x in zip(*ids, strict=True))
        queries, keys = np.arange(S - T, S), np.arange(S)
        if self.is_permuted:
            queries, keys = rng.permutation(queries), rng.permutation(keys)
        ids = (positions[:, queries], segments[:, queries], positions[:, keys], segments[:, keys])
        return (
            *(jnp.asarray(x, self.dtype) for x in (q, k, v)),
            *(jnp.asarray(x, jnp.int32) for x in ids),
        )


def exact(arrays, *, scale, window, softcap):
    """out and lse in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in arrays[:3])
    group = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    scores = scale * np.einsum('btnh,bsnh->bnts', q, k)
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    scores = np.where(_mask(arrays, window)[:, None], scores, -np.inf)
    highest = np.max(scores, axis=-1, keepdims=True)
    highest = np.where(np.isfinite(highest), highest, 0)
    weights = np.exp(scores - highest)
    total = np.sum(weights, axis=-1, keepdims=True)
    with np.errstate(divide='ignore'):
        lse = np.where(total > 0, highest + np.log(total), -np.inf)[..., 0]
    out = np.einsum('bnts,bsnh->btnh', weights / np.where(total > 0, total, 1), v)
    return out, lse


def _documents(lengths, size):
    positions = np.zeros(size, np.int32)
    segments = np.zeros(size, np.int32)
    start = 0
    for i, length in enumerate(lengths):
        positions[start : start + length] = np.arange(length)
        segments[start : start + length] = i + 1
        start += length
    return positions, segments


def exact_gradients(arrays, dout, out=None, *, scale, window, softcap):
    """dq, dk and dv in float64; with `out`, computed from that rounded output."""
    q, k, v, dout = (np.asarray(x, np.float64) for x in (*arrays[:3], dout))
    options = dict(scale=scale, window=window, softcap=softcap)
    exact_out, lse = exact(arrays, **options)
    out = exact_out if out is None else np.asarray(out, np.float64)
    K = k.shape[2]
    group = q.shape[2] // K
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    scores = scale * np.einsum('btnh,bsnh->bnts', q, k)
    slope = scale
    if softcap:
        tanh = np.tanh(scores / softcap)
        scores, slope = softcap * tanh, scale * (1 - tanh * tanh)
    seen = _mask(arrays, window)[:, None] & np.isfinite(lse)[..., None]
    weights = np.exp(np.where(seen, scores - np.where(seen, lse[..., None], 0), -np.inf))
    delta = np.einsum('btnh,btnh->bnt', dout, out)[..., None]
    dscores = slope * weights * (np.einsum('btnh,bsnh->bnts', dout, v) - delta)
    dq = np.einsum('bnts,bsnh->btnh', dscores, k)
    dk = np.einsum('bnts,btnh->bsnh', dscores, q)
    dv = np.einsum('bnts,btnh->bsnh', weights, dout)
    dk, dv = (x.reshape(*x.shape[:2], K, group, -1).sum(3) for x in (dk, dv))
    return dq, dk, dv


def _mask(arrays, window):
    q_position, q_segment, kv_position, kv_segment = (np.asarray(x) for x in arrays[3:])
    distance = q_position[:, :, None] - kv_position[:, None, :]
    mask = (q_segment[:, :, None] == kv_segment[:, None, :]) & (q_segment > 0)[:, :, None]
    return mask & (distance >= 0) & (distance < (window or np.inf))

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
    lengths: tuple[int, ...] = ()  # of the documents in a row; what is left over is padding
    window: int = 0
    softcap: float = 0.0
    magnitude: float = 1.0  # of the logits, about
    is_permuted: bool = False

    @property
    def options(self) -> dict:
        return dict(scale=self.head_dim**-0.5, window=self.window, softcap=self.softcap)

    def arrays(self) -> tuple:
        """Queries are the last tokens of the row, as with a cache; two rows, not alike."""
        rng = np.random.default_rng(0)
        T, S, H = self.num_queries, self.num_keys, self.head_dim

        def normal(*shape):
            return rng.standard_normal(shape)

        q = self.magnitude * normal(2, T, self.num_heads, H)
        k, v = normal(2, S, self.num_kv_heads, H), normal(2, S, self.num_kv_heads, H)
        ids = [_documents(self.lengths or (S,), S), _documents((S,), S)]
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
    q_position, q_segment, kv_position, kv_segment = (np.asarray(x) for x in arrays[3:])
    group = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    scores = scale * np.einsum('btnh,bsnh->bnts', q, k)
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    distance = q_position[:, :, None] - kv_position[:, None, :]
    mask = (q_segment[:, :, None] == kv_segment[:, None, :]) & (q_segment > 0)[:, :, None]
    mask &= (distance >= 0) & (distance < (window or np.inf))
    scores = np.where(mask[:, None], scores, -np.inf)
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

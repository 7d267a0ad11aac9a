"""From final hidden states to logits and log-probs: the one place that knows the vocabulary.

`token_logprobs` is what objectives call; it never holds the logits of more than a chunk of tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxfm.ops.choice import choose
from jaxfm.ops.linear import linear
from jaxfm.sharding import ACTIVATIONS, activation, axis_size

CHUNK_BYTES = 1 << 28  # float32 logits that a device may hold at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unembedding:
    """The output projection: weight [V padded, D] and what turns its products into logits."""

    weight_VD: jax.Array
    vocab_size: int = dataclasses.field(metadata={'static': True})  # ids from here on are padding
    softcap: float = dataclasses.field(default=0.0, metadata={'static': True})
    # What token_logprobs runs as; None is the best known.
    implementation: str | None = dataclasses.field(default=None, metadata={'static': True})


def logits(hidden_BTD, unembedding: Unembedding):
    """[B, T, V padded] float32 logits; padding ids get -inf."""
    vocab = activation('batch', 'position', 'vocab')
    logits_BTV = linear(
        hidden_BTD, unembedding.weight_VD.T, out_sharding=vocab, out_dtype=jnp.float32
    )
    if unembedding.softcap:
        logits_BTV = unembedding.softcap * jnp.tanh(logits_BTV / unembedding.softcap)
    if logits_BTV.shape[-1] > unembedding.vocab_size:
        ids = lax.broadcasted_iota(jnp.int32, (1, 1, logits_BTV.shape[-1]), 2)
        logits_BTV = jnp.where(ids < unembedding.vocab_size, logits_BTV, -jnp.inf)
    return logits_BTV


def token_logprobs(hidden_BTD, unembedding: Unembedding, targets_BT, chunk_size: int | None = None):
    """Log-probability of each target under the full softmax, and the log-partition for z-loss.

    Works on `chunk_size` positions at a time and recomputes their logits in the backward pass; the
    default keeps a chunk's float32 logits under CHUNK_BYTES a device. One chunk recomputes nothing.

    Returns:
      logprobs [B, T] and logsumexp [B, T], float32.
    """
    choose('token_logprobs', unembedding.implementation)  # one only, so far
    B, T, D = hidden_BTD.shape
    if chunk_size is None:
        chunk_size = _chunk_size(B, T, unembedding.weight_VD.shape[0])
    if chunk_size >= T:
        return _chunk_logprobs(hidden_BTD, unembedding, targets_BT)
    if T % chunk_size:
        raise ValueError(f'chunk_size {chunk_size} does not divide the {T} positions')
    count = T // chunk_size
    hidden = jnp.reshape(
        hidden_BTD,
        (B, count, chunk_size, D),
        out_sharding=activation('batch', 'chunk', 'position', 'embed'),
    )
    targets = jnp.reshape(
        targets_BT,
        (B, count, chunk_size),
        out_sharding=activation('batch', 'chunk', 'position'),
    )
    dtype = unembedding.weight_VD.dtype

    def body(hidden_BTD, unembedding, targets_BT):
        weight_VD = unembedding.weight_VD.astype(dtype)
        return _chunk_logprobs(
            hidden_BTD, dataclasses.replace(unembedding, weight_VD=weight_VD), targets_BT
        )

    body = jax.checkpoint(body, prevent_cse=False)
    # The scan sums the gradients of the chunks in the dtype of what it closes over: float32.
    unembedding = dataclasses.replace(
        unembedding, weight_VD=unembedding.weight_VD.astype(jnp.float32)
    )
    _, (logprobs, logsumexp) = lax.scan(
        lambda _, chunk: (None, body(chunk[0], unembedding, chunk[1])),
        None,
        (jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(targets, 1, 0)),
    )
    whole = activation('batch', 'position')
    return tuple(
        jnp.reshape(jnp.moveaxis(x, 0, 1), (B, T), out_sharding=whole)
        for x in (logprobs, logsumexp)
    )


def _chunk_size(B: int, T: int, V: int) -> int:
    """The largest divisor of T whose logits fit CHUNK_BYTES."""
    shards = axis_size(ACTIVATIONS, 'batch') * axis_size(ACTIVATIONS, 'vocab')
    largest = CHUNK_BYTES * shards // (4 * B * V)
    return max(size for size in range(1, T + 1) if T % size == 0 and size <= max(largest, 1))


def _chunk_logprobs(hidden_BTD, unembedding, targets_BT):
    logits_BTV = logits(hidden_BTD, unembedding)
    largest = lax.stop_gradient(jnp.max(logits_BTV, axis=-1, keepdims=True))
    logsumexp_BT = jnp.log(jnp.sum(jnp.exp(logits_BTV - largest), axis=-1)) + largest[..., 0]
    # A masked sum instead of take_along_axis: it stays local when the vocabulary is sharded.
    ids = lax.broadcasted_iota(jnp.int32, (1, 1, logits_BTV.shape[-1]), 2)
    is_target = ids == targets_BT[..., None]
    target_BT = jnp.sum(jnp.where(is_target, logits_BTV, 0.0), axis=-1)
    return target_BT - logsumexp_BT, logsumexp_BT

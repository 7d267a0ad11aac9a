"""Cross-entropy over a part of the vocabulary in plain jnp, from the products of an unembedding.

Products are [..., C] float32: the hidden states times rows of the weight, before the soft-cap. The
first one belongs to id `first_id`; ids from `vocab_size` on are padding.
"""

import jax.numpy as jnp
from jax import lax


def products(hidden, weight_CD):
    """hidden [..., D] times the rows of the weight -> [..., C] float32."""
    return lax.dot_general(
        hidden,
        weight_CD.astype(hidden.dtype),
        (((hidden.ndim - 1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def forward(hidden, weight_CD, targets, *, vocab_size: int, first_id=0, softcap: float = 0.0):
    """-> log-sum-exp over these ids, and the target's logit (0 if elsewhere, -inf if padding)."""
    return reduce(
        products(hidden, weight_CD),
        targets,
        vocab_size=vocab_size,
        first_id=first_id,
        softcap=softcap,
    )


def reduce(values, targets, *, vocab_size: int, first_id=0, softcap: float = 0.0):
    """`forward` from products."""
    ids = _ids(values, first_id)
    logits = jnp.where(ids < vocab_size, _cap(values, softcap), -jnp.inf)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    largest = jnp.where(largest == -jnp.inf, 0.0, largest)
    logsumexp = jnp.log(jnp.sum(jnp.exp(logits - largest), axis=-1)) + largest[..., 0]
    # A masked sum, because most targets are not among these ids.
    picked = jnp.sum(jnp.where(ids == targets[..., None], logits, 0.0), axis=-1)
    return logsumexp, picked


def backward(
    hidden,
    weight_CD,
    targets,
    logsumexp,
    dpicked,
    dlogsumexp,
    *,
    vocab_size: int,
    first_id=0,
    softcap: float = 0.0,
):
    """Gradient of the products, in the dtype of the hidden states; see `product_gradients`."""
    return product_gradients(
        products(hidden, weight_CD),
        targets,
        logsumexp,
        dpicked,
        dlogsumexp,
        vocab_size=vocab_size,
        first_id=first_id,
        softcap=softcap,
    ).astype(hidden.dtype)


def product_gradients(
    values,
    targets,
    logsumexp,
    dpicked,
    dlogsumexp,
    *,
    vocab_size: int,
    first_id=0,
    softcap: float = 0.0,
):
    """The gradient of the products, [..., C] float32, through the soft-cap; 0 for padding.

    Args:
      logsumexp: over the whole vocabulary.
      dpicked, dlogsumexp: gradients of the target's logit and of the log-sum-exp.
    """
    ids = _ids(values, first_id)
    logits = _cap(values, softcap)
    gradients = dlogsumexp[..., None] * jnp.exp(logits - logsumexp[..., None])
    gradients += jnp.where(ids == targets[..., None], dpicked[..., None], 0.0)
    if softcap:
        gradients *= 1.0 - jnp.square(logits / softcap)
    return jnp.where(ids < vocab_size, gradients, 0.0)


def _cap(values, softcap: float):
    return softcap * jnp.tanh(values / softcap) if softcap else values


def _ids(values, first_id):
    shape = (1,) * (values.ndim - 1) + values.shape[-1:]
    return first_id + lax.broadcasted_iota(jnp.int32, shape, values.ndim - 1)

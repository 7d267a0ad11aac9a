"""From final hidden states to logits and log-probs: the one place that knows the vocabulary.

`token_logprobs` is what objectives call; it never holds the logits of more than a chunk of ids.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxfm.ops.choice import choose
from jaxfm.ops.linear import linear
from jaxfm.sharding import ACTIVATIONS, activation, axis_size, per_shard, place, split_axes

CHUNK_BYTES = 1 << 28  # float32 logits that a device may hold at once
_ALIGNMENT = 128  # ids a chunk, for matrix units
_HIDDEN = ('batch', 'position', 'embed')
_WEIGHT = ('vocab', 'embed')
_ROWS = ('batch', 'position')
_PRODUCTS = ('batch', 'position', 'vocab')


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

    Works on `chunk_size` ids of the vocabulary at a time and makes their products again in the
    backward pass; the default keeps a chunk's float32 products under CHUNK_BYTES a device. A chunk
    that holds the whole vocabulary is kept instead.

    Returns:
      logprobs [B, T] and logsumexp [B, T], float32.
    """
    choose('token_logprobs', unembedding.implementation)  # one only, so far
    hidden_BTD = place(hidden_BTD, *_HIDDEN)
    weight_VD = place(unembedding.weight_VD, *_WEIGHT)
    targets_BT = place(jnp.asarray(targets_BT), *_ROWS)
    if chunk_size is None:
        B, T, _ = hidden_BTD.shape
        rows = -(-B * T // (axis_size(ACTIVATIONS, 'batch') * axis_size(ACTIVATIONS, 'position')))
        chunk_size = _chunk_size(rows, weight_VD.shape[0] // axis_size(ACTIVATIONS, 'vocab'))
    return _logprobs(
        hidden_BTD, dataclasses.replace(unembedding, weight_VD=weight_VD), targets_BT, chunk_size
    )


def _chunk_size(rows: int, vocab_size: int) -> int:
    """Ids a chunk: as few chunks as fit CHUNK_BYTES each, of about the same size."""
    largest = max(CHUNK_BYTES // (4 * rows) // _ALIGNMENT, 1) * _ALIGNMENT
    even = vocab_size / math.ceil(vocab_size / largest)
    return min(math.ceil(even / _ALIGNMENT) * _ALIGNMENT, vocab_size)


# The gradient is by hand for three reasons. Products are made again chunk by chunk, not kept. A
# chunk is a part of the vocabulary, so that the rows of the weight's gradient are each written
# once, from a sum in float32, and only the smaller gradient of the hidden states is added up. And
# what devices exchange is the size of the result: the products of a device stay there.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _logprobs(hidden_BTD, unembedding, targets_BT, chunk_size):
    logprobs, logsumexp, _ = _forward(hidden_BTD, unembedding, targets_BT, chunk_size)
    return logprobs, logsumexp


def _save(hidden_BTD, unembedding, targets_BT, chunk_size):
    logprobs, logsumexp, products = _forward(hidden_BTD, unembedding, targets_BT, chunk_size)
    residuals = hidden_BTD, unembedding, targets_BT, logsumexp, products
    return (logprobs, logsumexp), residuals


def _forward(hidden_BTD, unembedding, targets_BT, chunk_size):
    """-> logprobs, logsumexp, and the products [B, T, V] where they are one chunk."""
    is_whole = chunk_size >= unembedding.weight_VD.shape[0] // axis_size(ACTIVATIONS, 'vocab')

    def shard(hidden_BTD, weight_VD, targets_BT):
        local = dataclasses.replace(unembedding, weight_VD=weight_VD)
        if is_whole:
            products = _products(hidden_BTD, weight_VD)
            parts = _reduce(products, local, targets_BT, _first_id(local))
        else:
            products = None
            parts = _reduce_chunks(hidden_BTD, local, targets_BT, chunk_size)
        logsumexp, chosen = _merge_shards(*parts)
        return chosen - logsumexp, logsumexp, products

    return per_shard(
        shard,
        (_HIDDEN, _WEIGHT, _ROWS),
        [_ROWS, _ROWS, _PRODUCTS if is_whole else ()],
    )(hidden_BTD, unembedding.weight_VD, targets_BT)


def _backward(chunk_size, residuals, cotangents):
    hidden_BTD, unembedding, targets_BT, logsumexp_BT, products_BTV = residuals

    def shard(hidden_BTD, weight_VD, targets_BT, logsumexp_BT, products, dlogprobs, dlogsumexp):
        local = dataclasses.replace(unembedding, weight_VD=weight_VD)

        def gradients(products, weight_CD, first_id):
            """-> of the hidden states, in float32, and of the rows of the weight."""
            d_products = _product_gradients(
                products, local, targets_BT, first_id, logsumexp_BT, dlogprobs, dlogsumexp
            ).astype(hidden_BTD.dtype)
            dhidden = lax.dot_general(
                d_products,
                weight_CD.astype(d_products.dtype),
                (((2,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            return dhidden, _rows_gradient(hidden_BTD, d_products, weight_VD.dtype)

        def add_chunk(sums, chunk_CD, start):
            dhidden, dweight = sums
            products = _products(hidden_BTD, chunk_CD)
            more, rows = gradients(products, chunk_CD, _first_id(local) + start)
            return dhidden + more, lax.dynamic_update_slice(dweight, rows, (start, 0))

        if products is not None:
            dhidden, dweight = gradients(products, weight_VD, _first_id(local))
        else:
            zeros = jnp.zeros(hidden_BTD.shape, jnp.float32), jnp.zeros_like(weight_VD)
            dhidden, dweight = _over_chunks(add_chunk, zeros, weight_VD, chunk_size)
        dhidden = _sum_over(dhidden.astype(hidden_BTD.dtype), 'vocab')
        return dhidden, _sum_over(dweight, 'batch', 'position')

    dhidden, dweight = per_shard(
        shard,
        (_HIDDEN, _WEIGHT, _ROWS, _ROWS, () if products_BTV is None else _PRODUCTS, _ROWS, _ROWS),
        [_HIDDEN, _WEIGHT],
    )(hidden_BTD, unembedding.weight_VD, targets_BT, logsumexp_BT, products_BTV, *cotangents)
    return dhidden, dataclasses.replace(unembedding, weight_VD=dweight), None


_logprobs.defvjp(_save, _backward)


def _products(hidden_BTD, weight_CD):
    """[B, T, C] float32, from operands in the dtype of the hidden states."""
    return lax.dot_general(
        hidden_BTD,
        weight_CD.astype(hidden_BTD.dtype),
        (((2,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def _rows_gradient(hidden_BTD, d_products_BTC, dtype):
    """[C, D]. On CPU a product over rows transposes its first operand: the narrower goes there.

    Not where dtypes are mixed: XLA then folds the transpose into a product that it cannot run.
    """
    product = functools.partial(
        lax.dot_general,
        dimension_numbers=(((0, 1), (0, 1)), ((), ())),
        preferred_element_type=dtype,
    )
    if hidden_BTD.shape[-1] < d_products_BTC.shape[-1] and hidden_BTD.dtype == dtype:
        return product(hidden_BTD, d_products_BTC).T
    return product(d_products_BTC, hidden_BTD)


def _capped(products, softcap: float):
    return softcap * jnp.tanh(products / softcap) if softcap else products


def _ids(products_BTC, first_id):
    return first_id + lax.broadcasted_iota(jnp.int32, (1, 1, products_BTC.shape[-1]), 2)


def _reduce(products_BTC, unembedding, targets_BT, first_id):
    """-> over the ids from first_id on: log-sum-exp [B, T], and the target's logit, 0 elsewhere."""
    ids = _ids(products_BTC, first_id)
    logits_BTC = _capped(products_BTC, unembedding.softcap)
    logits_BTC = jnp.where(ids < unembedding.vocab_size, logits_BTC, -jnp.inf)
    largest = jnp.max(logits_BTC, axis=-1, keepdims=True)
    # There may be nothing but padding.
    largest = jnp.where(largest == -jnp.inf, 0.0, largest)
    logsumexp_BT = jnp.log(jnp.sum(jnp.exp(logits_BTC - largest), axis=-1)) + largest[..., 0]
    # A masked sum: the target is in one chunk of one device alone.
    chosen_BT = jnp.sum(jnp.where(ids == targets_BT[..., None], logits_BTC, 0.0), axis=-1)
    return logsumexp_BT, chosen_BT


def _product_gradients(
    products_BTC, unembedding, targets_BT, first_id, logsumexp_BT, dlogprobs_BT, dlogsumexp_BT
):
    """Of the products, float32: that of the logits, through the soft-cap, none for padding."""
    ids = _ids(products_BTC, first_id)
    logits_BTC = _capped(products_BTC, unembedding.softcap)
    probabilities = jnp.exp(logits_BTC - logsumexp_BT[..., None])
    is_target = ids == targets_BT[..., None]
    gradients = jnp.where(is_target, dlogprobs_BT[..., None], 0.0)
    gradients += (dlogsumexp_BT - dlogprobs_BT)[..., None] * probabilities
    if unembedding.softcap:
        gradients *= 1.0 - jnp.square(logits_BTC / unembedding.softcap)
    return jnp.where(ids < unembedding.vocab_size, gradients, 0.0)


def _reduce_chunks(hidden_BTD, unembedding, targets_BT, chunk_size):
    """`_reduce` over all ids of a device."""

    def add_chunk(sums, chunk_CD, start):
        logsumexp, chosen = sums
        products = _products(hidden_BTD, chunk_CD)
        more, found = _reduce(products, unembedding, targets_BT, _first_id(unembedding) + start)
        return jnp.logaddexp(logsumexp, more), chosen + found

    nothing = jnp.full(targets_BT.shape, -jnp.inf), jnp.zeros(targets_BT.shape)
    return _over_chunks(add_chunk, nothing, unembedding.weight_VD, chunk_size)


def _over_chunks(add_chunk, sums, weight_VD, chunk_size):
    """add_chunk(sums, rows of the weight, where they start) for all; the last may be fewer."""
    V, D = weight_VD.shape

    def add(index, sums):
        start = index * chunk_size
        return add_chunk(sums, lax.dynamic_slice(weight_VD, (start, 0), (chunk_size, D)), start)

    whole = V // chunk_size
    sums = lax.fori_loop(0, whole, add, sums)
    if V % chunk_size:
        start = whole * chunk_size
        sums = add_chunk(sums, weight_VD[start:], start)
    return sums


def _merge_shards(logsumexp_BT, chosen_BT):
    """Of a device's part of the vocabulary -> of all of it. Each row has a logit somewhere."""
    axes = split_axes('vocab')
    if not axes:
        return logsumexp_BT, chosen_BT
    largest = lax.pmax(logsumexp_BT, axes)
    total, chosen_BT = lax.psum((jnp.exp(logsumexp_BT - largest), chosen_BT), axes)
    return jnp.log(total) + largest, chosen_BT


def _first_id(unembedding):
    """The id of the first row that this device has."""
    axes = split_axes('vocab')
    return lax.axis_index(axes) * unembedding.weight_VD.shape[0] if axes else 0


def _sum_over(x, *names):
    axes = split_axes(*names)
    return lax.psum(x, axes) if axes else x

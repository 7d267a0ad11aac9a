"""Final hidden states to logits and log-probs: the only place that computes over the vocabulary.

Objectives call `token_logprobs`, which holds the logits of at most one chunk of the vocabulary.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxfm.ops.batch_invariant import by_rows
from jaxfm.ops.choice import choose
from jaxfm.ops.linear import linear
from jaxfm.sharding import ACTIVATIONS, activation, axis_size, per_shard, place, split_axes
from pallas_kernels import token_logprobs as kernels
from pallas_kernels.token_logprobs import reference

CHUNK_BYTES = 1 << 28  # most bytes of logits, or of their gradients, on a device at once
_ALIGNMENT = 256  # chunks have a multiple of this many ids: the kernel's widest tile
_HIDDEN = ('batch', 'position', 'embed')
_WEIGHT = ('vocab', 'embed')
_ROWS = ('batch', 'position')
_PRODUCTS = ('batch', 'position', 'vocab')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unembedding:
    """The output projection: weight [V padded, D], vocabulary size and soft-cap of the logits."""

    weight_VD: jax.Array
    vocab_size: int = dataclasses.field(metadata={'static': True})  # ids from here on are padding
    softcap: float = dataclasses.field(default=0.0, metadata={'static': True})
    # Of token_logprobs; None picks the best known.
    implementation: str | None = dataclasses.field(default=None, metadata={'static': True})
    # Results for a row do not depend on the other rows (`ops.batch_invariant`).
    batch_invariant: bool = dataclasses.field(default=False, metadata={'static': True})


def logits(hidden_BTD, unembedding: Unembedding):
    """[B, T, V padded] float32 logits; padding ids get -inf."""
    op = functools.partial(_logits, out_sharding=activation('batch', 'position', 'vocab'))
    if unembedding.batch_invariant:
        return by_rows(op, (hidden_BTD,), (unembedding,), on_tile=_logits)
    return op(hidden_BTD, unembedding)


def _logits(hidden_BTD, unembedding: Unembedding, out_sharding=None):
    logits_BTV = linear(
        hidden_BTD, unembedding.weight_VD.T, out_sharding=out_sharding, out_dtype=jnp.float32
    )
    if unembedding.softcap:
        logits_BTV = unembedding.softcap * jnp.tanh(logits_BTV / unembedding.softcap)
    if logits_BTV.shape[-1] > unembedding.vocab_size:
        ids = lax.broadcasted_iota(jnp.int32, (1, 1, logits_BTV.shape[-1]), 2)
        logits_BTV = jnp.where(ids < unembedding.vocab_size, logits_BTV, -jnp.inf)
    return logits_BTV


def log_softmax(logits_BTV, *, batch_invariant: bool = False):
    """Log-probs of all ids, [B, T, V]; padding ids have -inf.

    Args:
      batch_invariant: those of a batch-invariant `token_logprobs`, to the last bit.
    """
    if batch_invariant:
        return by_rows(jax.nn.log_softmax, (logits_BTV,), on_tile=_log_softmax_on_tile)
    return jax.nn.log_softmax(logits_BTV, axis=-1)


def _log_softmax_on_tile(logits_BTV):
    return logits_BTV - _logsumexp(logits_BTV)[..., None]


def _logsumexp(logits_BTV):
    highest_BT1 = jnp.max(logits_BTV, axis=-1, keepdims=True)
    return jnp.log(jnp.sum(jnp.exp(logits_BTV - highest_BT1), axis=-1)) + highest_BT1[..., 0]


def obstacles(dtype, dim: int) -> dict[str, str]:
    """{implementation: why it cannot take such hidden states, and what to use instead}."""
    reason = kernels.obstacle(dim=dim, dtype=dtype)
    return {'mosaic': f"{reason}; use 'xla'"} if reason else {}


def token_logprobs(hidden_BTD, unembedding: Unembedding, targets_BT, chunk_size: int | None = None):
    """Log-probability of each target under the full softmax, and the log-partition for z-loss.

    Processes `chunk_size` ids of the vocabulary at a time and recomputes their logits in the
    backward pass; the default chunk stays under CHUNK_BYTES per device. If one chunk holds the
    whole vocabulary, 'xla' saves its logits instead; the kernel's forward pass never writes logits.

    Returns:
      logprobs [B, T] and logsumexp [B, T], float32.

    Raises:
      ValueError: the implementation that the unembedding names cannot run here.
    """
    op = functools.partial(_token_logprobs, chunk_size=chunk_size)
    if unembedding.batch_invariant:
        rows = hidden_BTD, jnp.asarray(targets_BT)
        return by_rows(op, rows, (unembedding,), on_tile=_logprobs_on_tile)
    return op(hidden_BTD, targets_BT, unembedding)


def entropy(hidden_BTD, unembedding: Unembedding, chunk_size: int | None = None):
    """The entropy of each position's distribution, in nats, [B, T] float32.

    Processes `chunk_size` positions at a time, a divisor of T, and recomputes their logits in the
    backward pass; the default chunk stays under CHUNK_BYTES per device, if one position does.
    """
    hidden_BTD = place(hidden_BTD, *_HIDDEN)
    B, T, D = hidden_BTD.shape
    if chunk_size is None:
        ways = axis_size(ACTIVATIONS, 'position')  # each device has a part of every chunk
        ids = unembedding.weight_VD.shape[0] // axis_size(ACTIVATIONS, 'vocab')
        a_position = 4 * ids * -(-B // axis_size(ACTIVATIONS, 'batch'))
        most = max(CHUNK_BYTES // a_position, 1) * ways
        chunk_size = max(
            size for size in range(ways, T + 1, ways) if T % size == 0 and size <= most
        )

    @jax.checkpoint
    def of_chunk(hidden_BCD):
        logprobs_BCV = log_softmax(logits(hidden_BCD, unembedding))
        # Padding ids have the probability 0 and the log-prob -inf.
        is_id = logprobs_BCV > -jnp.inf
        plogp = jnp.exp(logprobs_BCV) * jnp.where(is_id, logprobs_BCV, 0.0)
        return -jnp.sum(plogp, axis=-1)

    spec = activation('batch', 'chunk', 'position', 'embed')
    chunks = jnp.reshape(hidden_BTD, (B, T // chunk_size, chunk_size, D), out_sharding=spec)
    entropies = lax.map(of_chunk, jnp.moveaxis(chunks, 1, 0))
    return jnp.reshape(jnp.moveaxis(entropies, 0, 1), (B, T), out_sharding=activation(*_ROWS))


def _logprobs_on_tile(hidden_BTD, targets_BT, unembedding: Unembedding):
    # The barrier keeps the sums as they are in `log_softmax`, which starts from logits.
    logits_BTV = lax.optimization_barrier(_logits(hidden_BTD, unembedding))
    logsumexp_BT = _logsumexp(logits_BTV)
    ids = lax.broadcasted_iota(jnp.int32, (1, 1, logits_BTV.shape[-1]), 2)
    picked_BT = jnp.sum(jnp.where(ids == targets_BT[..., None], logits_BTV, 0.0), axis=-1)
    return picked_BT - logsumexp_BT, logsumexp_BT


def _token_logprobs(hidden_BTD, targets_BT, unembedding: Unembedding, chunk_size: int | None):
    hidden_BTD = place(hidden_BTD, *_HIDDEN)
    weight_VD = place(unembedding.weight_VD, *_WEIGHT)
    targets_BT = place(jnp.asarray(targets_BT), *_ROWS)
    B, T, D = hidden_BTD.shape
    unsupported = obstacles(hidden_BTD.dtype, D)
    implementation = choose('token_logprobs', unembedding.implementation, unsupported)
    if chunk_size is None:
        rows = -(-B * T // (axis_size(ACTIVATIONS, 'batch') * axis_size(ACTIVATIONS, 'position')))
        bytes_each = 4 if implementation == 'xla' else hidden_BTD.dtype.itemsize
        chunk_size = chunk_size_for(bytes_each * rows, ids_a_device(weight_VD))
    unembedding = dataclasses.replace(
        unembedding, weight_VD=weight_VD, implementation=implementation
    )
    return _logprobs(hidden_BTD, unembedding, targets_BT, chunk_size)


def ids_a_device(weight_VD) -> int:
    """Rows of the weight that each device has."""
    return weight_VD.shape[0] // axis_size(ACTIVATIONS, 'vocab')


def chunk_size_for(bytes_an_id: int, vocab_size: int) -> int:
    """Ids per chunk: the fewest chunks of at most CHUNK_BYTES each, of about equal size."""
    largest = max(CHUNK_BYTES // bytes_an_id // _ALIGNMENT, 1) * _ALIGNMENT
    even = vocab_size / math.ceil(vocab_size / largest)
    return min(math.ceil(even / _ALIGNMENT) * _ALIGNMENT, vocab_size)


# The gradient is written by hand for three reasons. Products (x W', before the soft-cap) are
# recomputed chunk by chunk, not saved. A chunk is a range of the vocabulary, so each row of the
# weight's gradient is written once, from a float32 sum, and only the smaller gradient of the hidden
# states is accumulated. And devices exchange results, never products.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _logprobs(hidden_BTD, unembedding, targets_BT, chunk_size):
    logprobs, logsumexp, _ = _forward(hidden_BTD, unembedding, targets_BT, chunk_size)
    return logprobs, logsumexp


def _save(hidden_BTD, unembedding, targets_BT, chunk_size):
    logprobs, logsumexp, products = _forward(hidden_BTD, unembedding, targets_BT, chunk_size)
    residuals = hidden_BTD, unembedding, targets_BT, logsumexp, products
    return (logprobs, logsumexp), residuals


def _forward(hidden_BTD, unembedding, targets_BT, chunk_size):
    """-> logprobs, logsumexp, and the products [B, T, V] if XLA saves them, else None."""
    is_kept = chunk_size >= ids_a_device(unembedding.weight_VD)
    is_kept &= unembedding.implementation == 'xla'

    def shard(hidden_BTD, weight_VD, targets_BT):
        weight_VD = weight_VD.astype(hidden_BTD.dtype)
        local, products = _Shard.of(unembedding, weight_VD), None
        if is_kept:
            products = reference.products(hidden_BTD, weight_VD)
            parts = reference.reduce(products, targets_BT, **local.part())
        elif unembedding.implementation == 'xla':
            parts = local.reduce_chunks(hidden_BTD, targets_BT, chunk_size)
        else:
            parts = local.run_kernel(kernels.forward, hidden_BTD, weight_VD, targets_BT)
        logsumexp, picked = _merge_shards(*parts)
        return picked - logsumexp, logsumexp, products

    return per_shard(
        shard,
        (_HIDDEN, _WEIGHT, _ROWS),
        [_ROWS, _ROWS, _PRODUCTS if is_kept else ()],
    )(hidden_BTD, unembedding.weight_VD, targets_BT)


def _backward(chunk_size, residuals, cotangents):
    hidden_BTD, unembedding, targets_BT, logsumexp_BT, products_BTV = residuals
    dlogprobs_BT, dlogsumexp_BT = cotangents
    rows = targets_BT, logsumexp_BT, dlogprobs_BT, dlogsumexp_BT - dlogprobs_BT

    def shard(hidden_BTD, stored_VD, products, *rows):
        # Cast the whole weight, not its chunks: XLA then cancels this cast against `gather`'s.
        weight_VD = stored_VD.astype(hidden_BTD.dtype)
        local = _Shard.of(unembedding, weight_VD)

        def gradients(d_products, weight_CD):
            """-> gradients of the hidden states, in float32, and of these rows of the weight."""
            dhidden = lax.dot_general(
                d_products, weight_CD, (((2,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )
            return dhidden, rows_gradient(hidden_BTD, d_products, stored_VD.dtype)

        def add_chunk(sums, chunk_CD, start):
            dhidden, dweight = sums
            d_products = local.logit_gradients(hidden_BTD, chunk_CD, start, rows)
            more, dchunk = gradients(d_products, chunk_CD)
            return dhidden + more, lax.dynamic_update_slice(dweight, dchunk, (start, 0))

        if products is not None:
            d_products = reference.product_gradients(products, *rows, **local.part())
            dhidden, dweight = gradients(d_products.astype(hidden_BTD.dtype), weight_VD)
        else:
            zeros = jnp.zeros(hidden_BTD.shape, jnp.float32), jnp.zeros_like(stored_VD)
            dhidden, dweight = over_chunks(add_chunk, zeros, weight_VD, chunk_size)
        dhidden = sum_over(dhidden.astype(hidden_BTD.dtype), 'vocab')
        return dhidden, sum_over(dweight, 'batch', 'position')

    dhidden, dweight = per_shard(
        shard,
        (_HIDDEN, _WEIGHT, () if products_BTV is None else _PRODUCTS, _ROWS, _ROWS, _ROWS, _ROWS),
        [_HIDDEN, _WEIGHT],
    )(hidden_BTD, unembedding.weight_VD, products_BTV, *rows)
    return dhidden, dataclasses.replace(unembedding, weight_VD=dweight), None


_logprobs.defvjp(_save, _backward)


@dataclasses.dataclass(frozen=True)
class _Shard:
    """One device's shard of the unembedding."""

    unembedding: Unembedding
    first_id: jax.Array | int  # the id of its first row

    @classmethod
    def of(cls, unembedding: Unembedding, weight_VD) -> '_Shard':
        axes = split_axes('vocab')
        first_id = lax.axis_index(axes) * weight_VD.shape[0] if axes else 0
        return cls(dataclasses.replace(unembedding, weight_VD=weight_VD), first_id)

    def part(self, start=0) -> dict:
        """Keyword arguments of the reference and the kernel for the rows from `start` on."""
        return dict(
            vocab_size=self.unembedding.vocab_size,
            first_id=self.first_id + start,
            softcap=self.unembedding.softcap,
        )

    def reduce_chunks(self, hidden_BTD, targets_BT, chunk_size):
        """-> the shard's log-sum-exp and the target's logit (0 if not in it), by XLA."""

        def add_chunk(sums, chunk_CD, start):
            logsumexp, picked = sums
            more, found = reference.forward(hidden_BTD, chunk_CD, targets_BT, **self.part(start))
            return jnp.logaddexp(logsumexp, more), picked + found

        nothing = jnp.full(targets_BT.shape, -jnp.inf), jnp.zeros(targets_BT.shape)
        return over_chunks(add_chunk, nothing, self.unembedding.weight_VD, chunk_size)

    def logit_gradients(self, hidden_BTD, chunk_CD, start, rows):
        """The gradient of a chunk's products, [B, T, C] in the dtype of the hidden states."""
        if self.unembedding.implementation == 'xla':
            return reference.backward(hidden_BTD, chunk_CD, *rows, **self.part(start))
        return self.run_kernel(kernels.backward, hidden_BTD, chunk_CD, *rows, start=start)

    def run_kernel(self, kernel, hidden_BTD, weight_CD, *rows, start=0):
        """Runs the kernel, which has a single row dimension: [B, T, ...] becomes [M, ...]."""
        B, T, D = hidden_BTD.shape
        results = kernel(
            hidden_BTD.reshape(B * T, D),
            weight_CD,
            *(x.reshape(B * T) for x in rows),
            **self.part(start),
            interpret=self.unembedding.implementation == 'interpret',
        )
        return jax.tree.map(lambda x: x.reshape(B, T, *x.shape[1:]), results)


def rows_gradient(hidden_BTD, d_products_BTC, dtype):
    """The gradient [C, D] of a chunk's rows.

    On CPU a product over rows transposes its first operand, so the narrower one goes first. Not
    with mixed dtypes: XLA then folds the transpose into a product that it cannot run.
    """
    product = functools.partial(
        lax.dot_general,
        dimension_numbers=(((0, 1), (0, 1)), ((), ())),
        preferred_element_type=dtype,
    )
    if hidden_BTD.shape[-1] < d_products_BTC.shape[-1] and hidden_BTD.dtype == dtype:
        return product(hidden_BTD, d_products_BTC).T
    return product(d_products_BTC, hidden_BTD)


def over_chunks(add_chunk, sums, weights, chunk_size):
    """Folds add_chunk(sums, rows of the weights, index of the first) over all chunks.

    The last chunk may be smaller.

    weights: a weight [V, D], or a tuple of several with the same number of rows.
    """
    V = jax.tree.leaves(weights)[0].shape[0]

    def add(index, sums):
        start = index * chunk_size
        rows = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, chunk_size), weights)
        return add_chunk(sums, rows, start)

    whole = V // chunk_size
    sums = lax.fori_loop(0, whole, add, sums)
    if V % chunk_size:
        start = whole * chunk_size
        sums = add_chunk(sums, jax.tree.map(lambda x: x[start:], weights), start)
    return sums


def _merge_shards(logsumexp_BT, picked_BT):
    """Combines results over vocabulary shards; some shard has a finite logit for each row."""
    axes = split_axes('vocab')
    if not axes:
        return logsumexp_BT, picked_BT
    largest = lax.pmax(logsumexp_BT, axes)
    total, picked_BT = lax.psum((jnp.exp(logsumexp_BT - largest), picked_BT), axes)
    return jnp.log(total) + largest, picked_BT


def sum_over(x, *names):
    """Inside `per_shard`: the sum over the devices that split these logical axes."""
    axes = split_axes(*names)
    return lax.psum(x, axes) if axes else x

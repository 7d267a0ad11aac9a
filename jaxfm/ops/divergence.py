"""The divergence between the distributions of a teacher and a student, of every position.

With p of the teacher and q of the student, beta selects from a family (Agarwal et al. 2023, arXiv
2306.13649, equation 1):

    0               sum p log(p / q), the forward KL: q covers all that p does
    1               sum q log(q / p), the reverse KL: q keeps to what p does most
    between         beta KL(p || m) + (1 - beta) KL(q || m), with m = beta p + (1 - beta) q

Logits exist only for a chunk of the vocabulary at a time.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxfm.ops.logprobs import (
    Unembedding,
    chunk_size_for,
    ids_a_device,
    over_chunks,
    rows_gradient,
    sum_over,
)
from jaxfm.sharding import ACTIVATIONS, axis_size, per_shard, place, split_axes
from pallas_kernels.token_logprobs import reference

_HIDDEN = ('batch', 'position', 'embed')
_WEIGHT = ('vocab', 'embed')
_ROWS = ('batch', 'position')


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What is computed: static, and the same in both passes."""

    beta: float
    temperature: float
    top_k: int
    vocab_size: int  # ids from here on are padding of one of the two models
    softcaps: tuple[float, float]  # of the student, of the teacher


def divergence(
    hidden_BTD,
    unembedding: Unembedding,
    teacher_BTE,
    teacher: Unembedding,
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    top_k: int = 0,
    chunk_size: int | None = None,
):
    """The divergence of the student from the teacher, in nats, and the teacher's mass it compares.

    Both distributions are over the ids that both models have, and of logits / temperature. There is
    no gradient to the teacher. The student's logits of a chunk are recomputed in the backward pass;
    the default chunk keeps those of both models under CHUNK_BYTES on a device.

    Args:
      hidden_BTD, unembedding: of the student.
      teacher_BTE, teacher: those of the teacher, for the same tokens.
      beta: from 0 to 1, as above.
      top_k: compares only this many ids, those of the highest probability under the teacher, and
        all others as if they were a single id; 0 is all ids. Needs beta 0.
      chunk_size: ids of a chunk.

    Returns:
      the divergence [B, T], and the teacher's probability of the ids it compares singly [B, T], 1
      without `top_k`; float32.
    """
    if top_k and beta:
        raise ValueError(f'top_k needs beta 0, got {beta}')
    hidden_BTD, teacher_BTE = place(hidden_BTD, *_HIDDEN), place(teacher_BTE, *_HIDDEN)
    weight_VD = place(unembedding.weight_VD, *_WEIGHT)
    teacher_VE = _with_rows(teacher.weight_VD, weight_VD.shape[0])
    if chunk_size is None:
        B, T, _ = hidden_BTD.shape
        rows = -(-B * T // (axis_size(ACTIVATIONS, 'batch') * axis_size(ACTIVATIONS, 'position')))
        chunk_size = chunk_size_for(8 * rows, ids_a_device(weight_VD))
    kind = _Kind(
        beta=beta,
        temperature=temperature,
        top_k=top_k,
        vocab_size=min(unembedding.vocab_size, teacher.vocab_size),
        softcaps=(unembedding.softcap, teacher.softcap),
    )
    return _divergence(hidden_BTD, weight_VD, teacher_BTE, teacher_VE, kind, chunk_size)


def _with_rows(weight_VE, rows: int):
    """The weight with so many rows: the shards of both models must begin with the same ids."""
    size = weight_VE.shape[0]
    if size != rows:
        weight_VE = place(weight_VE, None, 'embed')[:rows]
        weight_VE = jnp.pad(weight_VE, ((0, max(rows - size, 0)), (0, 0)))
    return place(weight_VE, *_WEIGHT)


# The gradient is written by hand for the reasons that `ops.logprobs` gives: logits are recomputed
# chunk by chunk, a row of the weight's gradient is written once, and devices exchange no logits.


class _Totals(NamedTuple):
    """Sums over the whole vocabulary, each [B, T]: what a chunk needs to know of the others."""

    student: jax.Array  # log-sum-exp of the logits
    teacher: jax.Array
    threshold: jax.Array  # the teacher's logits from here on are compared singly
    student_rest: jax.Array  # log-probs of all other ids together; -inf without top_k
    teacher_rest: jax.Array
    slope: jax.Array  # the sum of `_slopes`


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _divergence(hidden_BTD, weight_VD, teacher_BTE, teacher_VE, kind, chunk_size):
    return _forward(hidden_BTD, weight_VD, teacher_BTE, teacher_VE, kind, chunk_size)[:2]


def _save(hidden_BTD, weight_VD, teacher_BTE, teacher_VE, kind, chunk_size):
    arrays = hidden_BTD, weight_VD, teacher_BTE, teacher_VE
    *results, totals = _forward(*arrays, kind, chunk_size)
    return tuple(results), (arrays, totals)


def _forward(hidden_BTD, weight_VD, teacher_BTE, teacher_VE, kind, chunk_size):
    """-> the divergence, the teacher's mass that is compared, and the totals."""

    def shard(hidden, weight, teacher_hidden, teacher_weight):
        both = _Both(kind, hidden, teacher_hidden, weight.astype(hidden.dtype), teacher_weight)
        return tuple(jax.tree.leaves(_compare(both, *_normalise(both, chunk_size), chunk_size)))

    names = [_ROWS] * (2 + len(_Totals._fields))
    value_BT, mass_BT, *totals = per_shard(shard, (_HIDDEN, _WEIGHT, _HIDDEN, _WEIGHT), names)(
        hidden_BTD, weight_VD, teacher_BTE, teacher_VE
    )
    return value_BT, mass_BT, _Totals(*totals)


def _backward(kind, chunk_size, residuals, cotangents):
    arrays, totals = residuals
    dvalue_BT, _ = cotangents  # the mass is the teacher's

    def shard(hidden, stored_VD, teacher_hidden, teacher_weight, dvalue_BT, *totals):
        weight_VD = stored_VD.astype(hidden.dtype)  # whole, as in `ops.logprobs`
        both = _Both(kind, hidden, teacher_hidden, weight_VD, teacher_weight)

        def add_chunk(sums, weights, start):
            dhidden, dweight = sums
            d_products = both.product_gradients(weights, start, _Totals(*totals), dvalue_BT)
            d_products = d_products.astype(hidden.dtype)
            more = lax.dot_general(
                d_products, weights[0], (((2,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )
            rows = rows_gradient(hidden, d_products, stored_VD.dtype)
            return dhidden + more, lax.dynamic_update_slice(dweight, rows, (start, 0))

        zeros = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros_like(stored_VD)
        dhidden, dweight = over_chunks(add_chunk, zeros, both.weights, chunk_size)
        dhidden = sum_over(dhidden.astype(hidden.dtype), 'vocab')
        return dhidden, sum_over(dweight, 'batch', 'position')

    names = _HIDDEN, _WEIGHT, _HIDDEN, _WEIGHT, *[_ROWS] * (1 + len(totals))
    gradients = per_shard(shard, names, [_HIDDEN, _WEIGHT])(*arrays, dvalue_BT, *totals)
    return *gradients, None, None


_divergence.defvjp(_save, _backward)


@dataclasses.dataclass(frozen=True)
class _Both:
    """One device's shards of the student and the teacher; a chunk is (their rows, the first)."""

    kind: _Kind
    hidden_BTD: jax.Array
    teacher_BTE: jax.Array
    weight_VD: jax.Array
    teacher_VE: jax.Array

    @property
    def weights(self) -> tuple:
        """Of the student, of the teacher."""
        return self.weight_VD, self.teacher_VE

    def logits(self, weights, start):
        """-> the two models' logits over the temperature [B, T, C], -inf for padding."""
        found = []
        hiddens = self.hidden_BTD, self.teacher_BTE
        for hidden, weight, softcap in zip(hiddens, weights, self.kind.softcaps):
            values = reference.products(hidden, weight)
            values = softcap * jnp.tanh(values / softcap) if softcap else values
            is_id = self._ids(values, start) < self.kind.vocab_size
            found.append(jnp.where(is_id, values / self.kind.temperature, -jnp.inf))
        return found

    def _ids(self, values, start):
        axes = split_axes('vocab')
        first = lax.axis_index(axes) * self.weight_VD.shape[0] if axes else 0
        return first + start + lax.broadcasted_iota(jnp.int32, (1, 1, values.shape[-1]), 2)

    def logprobs(self, weights, start, totals: _Totals):
        """-> log-probs of student and teacher, and which ids are compared singly, [B, T, C].

        Padding has the log-probs 0 and -inf, and is not compared.
        """
        student_BTC, teacher_BTC = self.logits(weights, start)
        is_id = self._ids(student_BTC, start) < self.kind.vocab_size
        is_single = is_id & (teacher_BTC >= totals.threshold[..., None])
        student_BTC -= totals.student[..., None]
        teacher_BTC -= totals.teacher[..., None]
        return student_BTC, teacher_BTC, is_single, is_id & ~is_single

    def product_gradients(self, weights, start, totals: _Totals, dvalue_BT):
        """The gradient of the student's products of a chunk, [B, T, C] float32."""
        student_BTC, teacher_BTC, is_single, is_rest = self.logprobs(weights, start, totals)
        slopes_BTC = _slopes(student_BTC, teacher_BTC, self.kind.beta)
        slopes_BTC = jnp.where(is_single, slopes_BTC, 0.0)
        if self.kind.top_k:  # all other ids share the slope of the one that stands for them
            rest_BT = totals.teacher_rest - totals.student_rest
            shared_BTC = -jnp.exp(student_BTC + rest_BT[..., None])
            slopes_BTC += jnp.where(is_rest, shared_BTC, 0.0)
        probs_BTC = jnp.exp(student_BTC)
        gradients_BTC = slopes_BTC - probs_BTC * totals.slope[..., None]
        gradients_BTC *= dvalue_BT[..., None] / self.kind.temperature
        if softcap := self.kind.softcaps[0]:
            logits_BTC = (student_BTC + totals.student[..., None]) * self.kind.temperature
            gradients_BTC *= 1.0 - jnp.square(logits_BTC / softcap)
        return jnp.where(is_single | is_rest, gradients_BTC, 0.0)


def _normalise(both: _Both, chunk_size: int):
    """-> log-sum-exp of the student's and the teacher's logits, and the threshold, all [B, T]."""
    B, T, _ = both.hidden_BTD.shape
    # The threshold is between two logits, so that how the last bit is rounded does not decide.
    count = both.kind.top_k + 1 if both.kind.top_k else 0

    def add_chunk(sums, weights, start):
        student, teacher, highest = sums
        student_BTC, teacher_BTC = both.logits(weights, start)
        if count:
            highest = lax.top_k(jnp.concatenate([highest, teacher_BTC], -1), count)[0]
        return (
            jnp.logaddexp(student, jax.nn.logsumexp(student_BTC, -1)),
            jnp.logaddexp(teacher, jax.nn.logsumexp(teacher_BTC, -1)),
            highest,
        )

    nothing = (*[jnp.full((B, T), -jnp.inf)] * 2, jnp.full((B, T, count), -jnp.inf))
    student, teacher, highest = over_chunks(add_chunk, nothing, both.weights, chunk_size)
    axes = split_axes('vocab')
    if axes and count:
        highest = lax.top_k(lax.all_gather(highest, axes, axis=2, tiled=True), count)[0]
    if count:
        threshold = (highest[..., -1] + highest[..., -2]) / 2
    else:
        threshold = jnp.full((B, T), -jnp.inf)
    return _add_logs(student), _add_logs(teacher), threshold


def _compare(both: _Both, student_BT, teacher_BT, threshold_BT, chunk_size: int):
    """-> the divergence, the teacher's mass that is compared singly, and the totals."""
    beta, nothing = both.kind.beta, jnp.zeros_like(student_BT)
    totals = _Totals(student_BT, teacher_BT, threshold_BT, nothing, nothing, nothing)

    def add_chunk(sums, weights, start):
        value, mass, slope, student_rest, teacher_rest = sums
        student_BTC, teacher_BTC, is_single, is_rest = both.logprobs(weights, start, totals)

        def over_single(values_BTC):
            return jnp.sum(jnp.where(is_single, values_BTC, 0.0), -1)

        def over_rest(values_BTC):
            return jax.nn.logsumexp(jnp.where(is_rest, values_BTC, -jnp.inf), -1)

        value += over_single(_terms(student_BTC, teacher_BTC, beta))
        mass += over_single(jnp.exp(teacher_BTC))
        slope += over_single(_slopes(student_BTC, teacher_BTC, beta))
        if both.kind.top_k:
            student_rest = jnp.logaddexp(student_rest, over_rest(student_BTC))
            teacher_rest = jnp.logaddexp(teacher_rest, over_rest(teacher_BTC))
        return value, mass, slope, student_rest, teacher_rest

    none = jnp.full_like(nothing, -jnp.inf)
    sums = nothing, nothing, nothing, none, none
    *sums, student_rest, teacher_rest = over_chunks(add_chunk, sums, both.weights, chunk_size)
    value, mass, slope = (sum_over(x, 'vocab') for x in sums)
    if both.kind.top_k:
        student_rest, teacher_rest = _add_logs(student_rest), _add_logs(teacher_rest)
        has_rest = (teacher_rest > -jnp.inf) & (student_rest > -jnp.inf)
        student_rest = jnp.where(has_rest, student_rest, 0.0)  # their difference is a number
        rest = jnp.exp(teacher_rest) * (teacher_rest - student_rest)
        value += jnp.where(has_rest, rest, 0.0)
    if beta == 0:
        slope = jnp.full_like(slope, -1.0)  # the teacher's probabilities, exactly
    return (
        value,
        mass,
        totals._replace(slope=slope, student_rest=student_rest, teacher_rest=teacher_rest),
    )


def _terms(student, teacher, beta: float):
    """What each id adds to the divergence, from the log-probs of both."""
    if beta == 0:
        return jnp.exp(teacher) * (teacher - student)
    if beta == 1:
        return jnp.exp(student) * (student - teacher)
    mixture = _mix(student, teacher, beta)
    of_teacher = beta * jnp.exp(teacher) * (teacher - mixture)
    return of_teacher + (1 - beta) * jnp.exp(student) * (student - mixture)


def _slopes(student, teacher, beta: float):
    """The student's probability times the derivative of `_terms` with respect to it.

    Up to a constant times the probability, which the softmax takes away.
    """
    if beta == 0:
        return -jnp.exp(teacher)
    if beta == 1:
        return jnp.exp(student) * (student - teacher)
    return (1 - beta) * jnp.exp(student) * (student - _mix(student, teacher, beta))


def _mix(student, teacher, beta: float):
    return jnp.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))


def _add_logs(values_BT):
    """Inside `per_shard`: the log of the sum of exponentials over the shards of the vocabulary."""
    axes = split_axes('vocab')
    if not axes:
        return values_BT
    largest = lax.pmax(values_BT, axes)
    finite = jnp.where(largest == -jnp.inf, 0.0, largest)
    return jnp.log(lax.psum(jnp.exp(values_BT - finite), axes)) + finite

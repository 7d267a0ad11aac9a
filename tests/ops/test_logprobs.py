"""Logits and token log-probs against float64; chunks and a sharded vocabulary change nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm.ops import logprobs as ops
from jaxfm.ops.logprobs import Unembedding, logits, token_logprobs
from jaxfm.sharding import MESH_AXES, make_mesh, place

B, T, D, V, PADDED = 2, 12, 16, 59, 64


def arrays(seed=0):
    random = np.random.default_rng(seed)
    hidden = jnp.asarray(random.normal(size=(B, T, D)), jnp.float32)
    weight = jnp.asarray(random.normal(size=(PADDED, D)), jnp.float32)
    return hidden, weight, random.integers(0, V, (B, T)).astype(np.int32)


def reference(hidden, weight, targets, softcap):
    """-> log-probs and log-partitions of the first V ids in float64."""
    products = np.asarray(hidden, np.float64) @ np.asarray(weight, np.float64)[:V].T
    if softcap:
        products = softcap * np.tanh(products / softcap)
    largest = products.max(-1, keepdims=True)
    logsumexp = np.log(np.exp(products - largest).sum(-1)) + largest[..., 0]
    chosen = np.take_along_axis(products, targets[..., None], axis=-1)[..., 0]
    return chosen - logsumexp, logsumexp


@functools.partial(jax.jit, static_argnames=('softcap', 'chunk_size'))
def value_and_gradients(hidden, weight, targets, softcap=0.0, chunk_size=None):
    """-> (logprobs, logsumexp), gradients of a sum that uses both."""

    def total(hidden, weight):
        values = token_logprobs(hidden, Unembedding(weight, V, softcap), targets, chunk_size)
        return jnp.sum(jnp.sin(values[0])) + jnp.sum(jnp.square(values[1])), values

    gradients, values = jax.grad(total, argnums=(0, 1), has_aux=True)(hidden, weight)
    return values, gradients


@pytest.mark.parametrize('softcap', [0.0, 4.0])
@pytest.mark.parametrize('chunk_size', [None, 4])
def test_equals_float64(softcap, chunk_size):
    hidden, weight, targets = arrays()
    values, _ = value_and_gradients(hidden, weight, targets, softcap, chunk_size)
    expected = reference(hidden, weight, targets, softcap)
    for result, right in zip(values, expected, strict=True):
        assert result.dtype == jnp.float32
        np.testing.assert_allclose(result, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('softcap', [0.0, 4.0])
def test_chunks_change_neither_values_nor_gradients(softcap):
    hidden, weight, targets = arrays(1)
    whole = value_and_gradients(hidden, weight, targets, softcap)
    chunked = value_and_gradients(hidden, weight, targets, softcap, 4)
    for a, b in zip(jax.tree.leaves(chunked), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_gradients_equal_finite_differences_in_float64():
    hidden, weight, targets = arrays(2)
    _, gradients = value_and_gradients(hidden, weight, targets, 4.0)
    for index, gradient in enumerate(gradients):
        step = np.random.default_rng(index).normal(size=gradient.shape) * 1e-5
        sides = []
        for sign in (1, -1):
            moved = [np.asarray(x, np.float64) for x in (hidden, weight)]
            moved[index] = moved[index] + sign * step
            chosen, partition = reference(*moved, targets, 4.0)
            sides.append(np.sum(np.sin(chosen)) + np.sum(partition**2))
        np.testing.assert_allclose(np.sum(gradient * step), (sides[0] - sides[1]) / 2, rtol=1e-3)


def test_padding_of_the_vocabulary_gets_no_probability_and_no_gradient():
    hidden, weight, targets = arrays()
    weight = weight.at[V:].mul(100.0)  # it would win everywhere
    values = np.asarray(logits(hidden, Unembedding(weight, V, 4.0)))
    assert (values[..., V:] == -np.inf).all()
    assert np.isfinite(values[..., :V]).all()
    probabilities = np.asarray(jax.nn.softmax(values))
    assert not probabilities[..., V:].any()
    _, gradients = value_and_gradients(hidden, weight, targets)
    assert all(np.isfinite(g).all() for g in gradients)
    assert not np.asarray(gradients[1][V:]).any()


def test_logits_of_bfloat16_are_float32():
    hidden, weight, _ = arrays()
    unembedding = Unembedding(weight.astype(jnp.bfloat16), V)
    result = logits(hidden.astype(jnp.bfloat16), unembedding)
    assert result.dtype == jnp.float32
    exact = (
        np.asarray(hidden.astype(jnp.bfloat16), np.float64)
        @ np.asarray(unembedding.weight_VD, np.float64)[:V].T
    )
    np.testing.assert_allclose(result[..., :V], exact, rtol=1e-5, atol=1e-5)


def test_large_logits_do_not_overflow():
    hidden, weight, targets = arrays()
    values, gradients = value_and_gradients(1e3 * hidden, weight, targets)
    assert all(np.isfinite(x).all() for x in (*values, *gradients))


@pytest.mark.parametrize('chunk_size', [1, 3])
def test_the_default_chunk_keeps_logits_under_the_limit(monkeypatch, chunk_size):
    monkeypatch.setattr(ops, 'CHUNK_BYTES', chunk_size * 4 * B * PADDED + 1)
    hidden, weight, targets = arrays()
    trace = jax.make_jaxpr(lambda h, w: token_logprobs(h, Unembedding(w, V), targets))
    jaxpr = str(trace(hidden, weight))
    assert f'f32[{B},{chunk_size},{PADDED}]' in jaxpr
    assert f'f32[{B},{T},{PADDED}]' not in jaxpr


def test_a_chunk_that_does_not_divide_is_an_error():
    hidden, weight, targets = arrays()
    with pytest.raises(ValueError, match='5 does not divide the 12'):
        token_logprobs(hidden, Unembedding(weight, V), targets, 5)


@pytest.mark.parametrize('chunk_size', [None, 4])
def test_a_vocabulary_over_eight_devices_changes_nothing(chunk_size):
    hidden, weight, targets = arrays(3)
    alone = value_and_gradients(hidden, weight, targets, 4.0, chunk_size)
    with jax.set_mesh(make_mesh({axis: 1 for axis in MESH_AXES} | {'tensor': 8})):
        spec = jax.P('tensor', None)
        split = jax.device_put(weight, jax.NamedSharding(jax.sharding.get_mesh(), spec))
        hidden = place(hidden, 'batch', 'position', 'embed')
        compiled = value_and_gradients.lower(hidden, split, targets, 4.0, chunk_size).compile()
        values, gradients = compiled(hidden, split, targets)
        assert gradients[1].sharding.spec[0] == 'tensor'
        # Each device has logits of its own ids only.
        assert f'f32[{B},{chunk_size or T},{PADDED // 8}]' in compiled.as_text()
    for a, b in zip(jax.tree.leaves((values, gradients)), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_the_gradient_of_bfloat16_weights_does_not_lose_by_chunks():
    B, T, D, V = 2, 64, 8, 16
    draw = np.random.default_rng(0)
    hidden = jnp.asarray(draw.normal(size=(B, T, D)), jnp.bfloat16)
    weight = jnp.asarray(draw.normal(size=(V, D)), jnp.bfloat16)
    targets = jnp.asarray(draw.integers(0, V, (B, T)), jnp.int32)

    def gradient(weight, hidden, chunk_size):
        loss = lambda w: token_logprobs(hidden, Unembedding(w, V), targets, chunk_size)[0].sum()  # noqa: E731
        return jax.grad(loss)(weight).astype(jnp.float32)

    exact = gradient(weight.astype(jnp.float32), hidden.astype(jnp.float32), T)
    error = jnp.linalg.norm(gradient(weight, hidden, 1) - exact) / jnp.linalg.norm(exact)
    assert error < 5e-3, error  # bfloat16 sums over 64 chunks are several times as wrong

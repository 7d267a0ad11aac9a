"""The entropy of every position's distribution against float64, in chunks and on devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm.ops import logprobs as ops
from jaxfm.ops.logprobs import Unembedding, entropy
from jaxfm.sharding import MESH_AXES, make_mesh, place

B, T, D, V, PADDED = 2, 12, 16, 59, 64

pytestmark = pytest.mark.usefixtures('quick_compilation')


def arrays():
    random = np.random.default_rng(0)
    hidden = np.float32(random.normal(size=(B, T, D)))
    weight = np.float32(random.normal(size=(PADDED, D)))
    weight[V:] *= 100  # padding would have the largest logit everywhere
    return hidden, weight


def reference(hidden, weight, softcap):
    products = hidden.astype(np.float64) @ weight[:V].astype(np.float64).T
    if softcap:
        products = softcap * np.tanh(products / softcap)
    logprobs = products - np.log(np.exp(products).sum(-1, keepdims=True))
    return -np.sum(np.exp(logprobs) * logprobs, -1)


@functools.partial(jax.jit, static_argnames=('softcap', 'chunk_size'))
def value_and_gradients(hidden, weight, softcap=0.0, chunk_size=None):
    """-> entropies, gradients of a sum that weights them differently."""

    def total(hidden, weight):
        values = entropy(hidden, Unembedding(weight, V, softcap), chunk_size)
        return jnp.sum(jnp.sin(values)), values

    gradients, values = jax.grad(total, argnums=(0, 1), has_aux=True)(hidden, weight)
    return values, gradients


@pytest.mark.parametrize('softcap', [0.0, 4.0])
@pytest.mark.parametrize('chunk_size', [None, 3])
def test_equals_float64(softcap, chunk_size):
    hidden, weight = arrays()
    values, gradients = value_and_gradients(hidden, weight, softcap, chunk_size)
    assert values.shape == (B, T) and values.dtype == jnp.float32
    np.testing.assert_allclose(values, reference(hidden, weight, softcap), rtol=1e-5)
    assert not np.asarray(gradients[1])[V:].any()
    for index, gradient in enumerate(gradients):
        step = np.random.default_rng(index).normal(size=gradient.shape) * 1e-6
        sides = []
        for sign in (1, -1):
            moved = [np.float64(x) for x in (hidden, weight)]
            moved[index] = moved[index] + sign * step
            sides.append(np.sin(reference(*moved, softcap)).sum())
        np.testing.assert_allclose(np.sum(gradient * step), (sides[0] - sides[1]) / 2, rtol=1e-4)


def test_extreme_distributions_have_no_entropy_or_all_of_it():
    hidden, weight = arrays()
    values, gradients = value_and_gradients(1e4 * hidden, weight)
    np.testing.assert_allclose(values, 0, atol=1e-6)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    values, gradients = value_and_gradients(0 * hidden, weight)
    np.testing.assert_allclose(values, np.log(V), rtol=1e-6)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize('chunk_size', [None, 4])
def test_splitting_over_eight_devices_changes_nothing(chunk_size):
    hidden, weight = arrays()
    alone = value_and_gradients(hidden, weight, 4.0, chunk_size)
    with jax.set_mesh(make_mesh(dict.fromkeys(MESH_AXES, 1) | dict(fsdp=2, context=2, tensor=2))):
        hidden, weight = (
            place(hidden, 'batch', 'position', 'embed'),
            place(weight, 'vocab', 'embed'),
        )
        together = value_and_gradients(hidden, weight, 4.0, chunk_size)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(('positions', 'chunk'), [(12, 12), (5, 4), (0.5, 1)])
def test_the_default_chunk_keeps_logits_under_the_limit(monkeypatch, positions, chunk):
    monkeypatch.setattr(ops, 'CHUNK_BYTES', int(positions * 4 * B * PADDED))

    def total(hidden, weight):
        return entropy(hidden, Unembedding(weight, V)).sum()

    jaxpr = str(jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(*arrays()))
    assert set(re.findall(rf'f32\[{B},(\d+),{PADDED}\]', jaxpr)) == {str(chunk)}


def test_the_default_chunk_of_split_rows_has_a_part_on_every_device(monkeypatch):
    hidden, weight = arrays()
    monkeypatch.setattr(ops, 'CHUNK_BYTES', 4 * B * PADDED)
    with jax.set_mesh(make_mesh(dict.fromkeys(MESH_AXES, 1) | dict(context=4, fsdp=2))):
        values = jax.jit(lambda *arrays: entropy(arrays[0], Unembedding(arrays[1], V)))(
            place(hidden, 'batch', 'position', 'embed'), place(weight, 'vocab', 'embed')
        )
    np.testing.assert_allclose(values, reference(hidden, weight, 0), rtol=1e-5)

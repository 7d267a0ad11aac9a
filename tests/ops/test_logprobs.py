"""Logits and token log-probs against float64; chunks and a sharded vocabulary change nothing."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxfm.ops import logprobs as ops
from jaxfm.ops.logprobs import Unembedding, logits, token_logprobs
from jaxfm.sharding import MESH_AXES, make_mesh, place
from tools import deviceless

B, T, D, V, PADDED = 2, 12, 16, 59, 64
CHUNK = 16


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
@pytest.mark.parametrize('chunk_size', [None, 16, 24])
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
    for chunk_size in (CHUNK, 60):  # the last chunk of 60 has only padding
        chunked = value_and_gradients(hidden, weight, targets, softcap, chunk_size)
        for a, b in zip(jax.tree.leaves(chunked), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_gradients_equal_finite_differences_in_float64():
    hidden, weight, targets = arrays(2)
    _, gradients = value_and_gradients(hidden, weight, targets, 4.0, CHUNK)
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
    weight = weight.at[V:].mul(100.0)  # it would have the largest logit everywhere
    values = np.asarray(logits(hidden, Unembedding(weight, V, 4.0)))
    assert (values[..., V:] == -np.inf).all()
    assert np.isfinite(values[..., :V]).all()
    probabilities = np.asarray(jax.nn.softmax(values))
    assert not probabilities[..., V:].any()
    for chunk_size in (None, CHUNK):
        _, gradients = value_and_gradients(hidden, weight, targets, 0.0, chunk_size)
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


def test_masked_positions_give_no_gradient():
    hidden, weight, targets = arrays()
    mask = jnp.asarray(np.arange(T) % 3 > 0, jnp.float32)[None]

    def total(hidden, weight, targets):
        logprobs, logsumexp = token_logprobs(hidden, Unembedding(weight, V), targets, CHUNK)
        return jnp.sum((logprobs + jnp.square(logsumexp)) * mask)

    gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
    dhidden, dweight = gradient(hidden, weight, targets)
    assert not np.asarray(dhidden)[:, ::3].any()
    other = np.where(mask > 0, targets, (targets + 1) % V)
    np.testing.assert_array_equal(gradient(hidden, weight, other)[1], dweight)


def test_the_default_limit_of_a_chunk_is_a_quarter_of_a_gibibyte():
    assert ops.chunk_size_for(bytes_an_id=4 * 4096, vocab_size=1 << 17) * 4 * 4096 == 1 << 28


@pytest.mark.parametrize('chunks', [1, 2, 5])
def test_the_default_chunk_keeps_logits_under_the_limit(monkeypatch, chunks):
    vocab = 5 * 256
    size = -(-5 // chunks) * 256
    monkeypatch.setattr(ops, 'CHUNK_BYTES', size * 4 * B * T)
    hidden, _, targets = arrays()
    shape = jax.ShapeDtypeStruct((vocab, D), jnp.float32)

    def total(hidden, weight):
        return token_logprobs(hidden, Unembedding(weight, vocab), targets)[0].sum()

    jaxpr = str(jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(hidden, shape))
    assert f'f32[{B},{T},{size}]' in jaxpr
    if chunks > 1:
        assert f'f32[{B},{T},{vocab}]' not in jaxpr
    # A single chunk is saved; several are recomputed in the backward pass.
    made = re.findall(rf'f32\[{B},{T},{size}\] = dot_general', jaxpr)
    assert len(made) == (1 if chunks == 1 else 2)


def step_of(function, vocab, tokens, dim):
    """-> a gradient step of a mean loss with z-loss, and its argument shapes."""

    def loss(hidden, weight, targets):
        logprobs, logsumexp = function(hidden, Unembedding(weight, vocab - 7, 30.0), targets)
        return -jnp.mean(logprobs) + 1e-4 * jnp.mean(jnp.square(logsumexp))

    shapes = (
        jax.ShapeDtypeStruct((4, tokens // 4, dim), jnp.bfloat16),
        jax.ShapeDtypeStruct((vocab, dim), jnp.bfloat16),
        jax.ShapeDtypeStruct((4, tokens // 4), jnp.int32),
    )
    return jax.value_and_grad(loss, argnums=(0, 1)), shapes


def naive_logprobs(hidden, unembedding, targets):
    """The straightforward version, which holds all logits in memory."""
    weight = unembedding.weight_VD
    values = jnp.einsum('btd,vd->btv', hidden, weight, preferred_element_type=jnp.float32)
    values = unembedding.softcap * jnp.tanh(values / unembedding.softcap)
    ids = lax.broadcasted_iota(jnp.int32, (1, 1, weight.shape[0]), 2)
    values = jnp.where(ids < unembedding.vocab_size, values, -jnp.inf)
    logsumexp = jax.nn.logsumexp(values, axis=-1)
    return jnp.take_along_axis(values, targets[..., None], -1)[..., 0] - logsumexp, logsumexp


def assert_tenth_of_the_memory(compile_step):
    needed = {}
    for function in (naive_logprobs, token_logprobs):
        step, shapes = step_of(function, vocab=131072, tokens=16384, dim=2048)
        needed[function] = compile_step(step, *shapes).memory_analysis().temp_size_in_bytes
    naive, ours = (needed[f] / 1e9 for f in (naive_logprobs, token_logprobs))
    print(f'temporary memory of a step, 131072 ids x 16384 tokens: {naive:.2f} -> {ours:.2f} GB')
    assert naive > 10 * ours


def test_a_large_vocabulary_needs_a_tenth_of_the_memory():
    assert_tenth_of_the_memory(lambda step, *shapes: jax.jit(step).lower(*shapes).compile())


def test_a_large_vocabulary_needs_a_tenth_of_the_memory_of_an_h200(gpu_compiler):
    assert_tenth_of_the_memory(deviceless.compile)


@pytest.mark.parametrize('chunk_size', [None, 3])
@pytest.mark.parametrize(
    'sizes',
    [dict(tensor=8), dict(replica=2, tensor=4), dict(fsdp=2, context=2, tensor=2)],
    ids=lambda sizes: ' x '.join(f'{axis} {size}' for axis, size in sizes.items()),
)
def test_splitting_over_eight_devices_changes_nothing(sizes, chunk_size):
    hidden, weight, targets = arrays(3)
    alone = value_and_gradients(hidden, weight, targets, 4.0, chunk_size)
    with jax.set_mesh(make_mesh(dict.fromkeys(MESH_AXES, 1) | sizes)):
        spec = jax.P('tensor', None)
        split = jax.device_put(weight, jax.NamedSharding(jax.sharding.get_mesh(), spec))
        hidden = place(hidden, 'batch', 'position', 'embed')
        compiled = value_and_gradients.lower(hidden, split, targets, 4.0, chunk_size).compile()
        values, gradients = compiled(hidden, split, targets)
        assert gradients[1].sharding.spec[0] == 'tensor'
        # Each device computes logits only of its own ids and rows.
        rows, positions = hidden.sharding.shard_shape(hidden.shape)[:2]
        ids = chunk_size or PADDED // sizes['tensor']
        assert f'f32[{rows},{positions},{ids}]' in compiled.as_text()
        assert_small_collectives(compiled.as_text(), PADDED // sizes['tensor'])
    for a, b in zip(jax.tree.leaves((values, gradients)), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def assert_small_collectives(hlo, vocab):
    """Devices exchange only [B, T], [B, T, D] and [V, D], never logits, and never in a loop."""
    found = re.findall(r'= (.*?) all-(?:reduce|gather)(?:-start)?\((.*)', hlo)
    assert found
    for result, rest in found:
        shapes = re.findall(r'\w+\[([\d,]*)\]', result)
        sizes = [math.prod(int(n) for n in shape.split(',') if n) for shape in shapes]
        assert max(sizes) <= max(B * T * D, vocab * D), result
        assert '/while/' not in rest, rest


@pytest.mark.parametrize('which', ['weight', 'hidden'])
def test_chunks_do_not_make_bfloat16_gradients_less_exact(which):
    B, T, D, V = 2, 64, 8, 64
    draw = np.random.default_rng(0)
    hidden = jnp.asarray(draw.normal(size=(B, T, D)), jnp.bfloat16)
    weight = jnp.asarray(draw.normal(size=(V, D)), jnp.bfloat16)
    targets = jnp.asarray(draw.integers(0, V, (B, T)), jnp.int32)

    @functools.partial(jax.jit, static_argnums=2)
    def gradient(weight, hidden, chunk_size):
        def total(arrays):
            unembedding = Unembedding(arrays['weight'], V)
            return token_logprobs(arrays['hidden'], unembedding, targets, chunk_size)[0].sum()

        return jax.grad(total)(dict(weight=weight, hidden=hidden))[which].astype(jnp.float32)

    exact = gradient(weight.astype(jnp.float32), hidden.astype(jnp.float32), V)
    error = jnp.linalg.norm(gradient(weight, hidden, 1) - exact) / jnp.linalg.norm(exact)
    assert error < 5e-3, error  # sums in bfloat16 would have several times the error


def test_a_weight_in_float32_under_products_in_bfloat16_keeps_its_gradient_in_float32():
    hidden, weight, targets = arrays()
    hidden, rounded = (x.astype(jnp.bfloat16) for x in (hidden, weight))
    values, gradients = value_and_gradients(hidden, rounded.astype(jnp.float32), targets)
    same, coarse = value_and_gradients(hidden, rounded, targets)
    jax.tree.map(np.testing.assert_array_equal, values, same)
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32]
    np.testing.assert_array_equal(gradients[0], coarse[0])
    coarse = coarse[1].astype(jnp.float32)
    assert jnp.linalg.norm(gradients[1] - coarse) < 1e-2 * jnp.linalg.norm(coarse)
    assert (gradients[1] != gradients[1].astype(jnp.bfloat16).astype(jnp.float32)).mean() > 0.9

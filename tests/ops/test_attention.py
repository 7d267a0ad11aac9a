"""Attention against loops in float64: masks, windows, soft-caps, grouped heads, segments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm.ops.attention import KeyValues, attention, attention_mask

B, T, H = 2, 12, 8
# Two documents and padding in the first row, one long document in the second.
POSITIONS = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 0], range(T)], np.int32)
SEGMENTS = np.array([[1] * 5 + [2] * 5 + [0] * 2, [1] * T], np.int32)


def reference(q, k, v, positions, segments, *, scale, window=0, softcap=0.0):
    """[B, T, N, H] float64, one query and one head at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = [
            s
            for s in range(k.shape[1])
            if segments[b, t] == segments[b, s] != 0
            and positions[b, s] <= positions[b, t]
            and (not window or positions[b, t] - positions[b, s] < window)
        ]
        if seen:
            scores = scale * k[b, seen, n // group] @ q[b, t, n]
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ v[b, seen, n // group] / weights.sum()
    return out


def inputs(num_heads, num_kv_heads, seed=0):
    random = np.random.default_rng(seed)
    shapes = [(B, T, num_heads, H)] + 2 * [(B, T, num_kv_heads, H)]
    return [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]


@functools.partial(jax.jit, static_argnames=('window', 'softcap', 'scale', 'implementation'))
def attend(q, k, v, positions, segments, **options):
    keys = KeyValues(k, v, positions, segments)
    return attention(q, keys, positions, segments, **options)


@pytest.mark.parametrize('softcap', [0.0, 2.0])
@pytest.mark.parametrize('window', [0, 3])
@pytest.mark.parametrize('heads', [(4, 4), (4, 2), (4, 1)])
def test_equals_float64(heads, window, softcap):
    options = dict(scale=0.5, window=window, softcap=softcap)
    arrays = inputs(*heads)
    result = attend(*arrays, POSITIONS, SEGMENTS, **options)
    expected = reference(*arrays, POSITIONS, SEGMENTS, **options)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_the_order_of_a_row_means_nothing():
    q, k, v = inputs(4, 2)
    order = np.random.default_rng(1).permutation(T)
    rows = [x[:, order] for x in (q, k, v, POSITIONS, SEGMENTS)]
    straight = attend(q, k, v, POSITIONS, SEGMENTS, scale=0.3, window=3)
    permuted = attend(*rows, scale=0.3, window=3)
    np.testing.assert_allclose(permuted, straight[:, order], rtol=1e-5, atol=1e-6)


def test_padding_gets_zeros_and_finite_gradients_and_is_never_read():
    q, k, v = inputs(4, 2)
    keys_of_padding = [x.at[0, 10:].set(1e9) for x in (k, v)]

    def total(*arrays):
        return jnp.sum(jnp.sin(attend(*arrays, POSITIONS, SEGMENTS, scale=0.3)))

    result = attend(q, *keys_of_padding, POSITIONS, SEGMENTS, scale=0.3)
    assert not np.asarray(result[0, 10:]).any()
    np.testing.assert_array_equal(result, attend(q, k, v, POSITIONS, SEGMENTS, scale=0.3))
    gradients = jax.grad(total, argnums=(0, 1, 2))(q, k, v)
    assert all(np.isfinite(g).all() for g in gradients)
    assert all(not np.asarray(g[0, 10:]).any() for g in gradients)


def test_a_batch_of_padding_alone_is_finite_and_zero():
    nothing = np.zeros((B, T), np.int32)

    def total(*arrays):
        return jnp.sum(attend(*arrays, nothing, nothing, scale=0.3, softcap=5.0))

    value, gradients = jax.value_and_grad(total, argnums=(0, 1, 2))(*inputs(4, 2))
    assert value == 0
    assert all(not np.asarray(g).any() for g in gradients)


def test_gradients_equal_finite_differences_in_float64():
    arrays = inputs(2, 1, seed=3)
    weights = np.random.default_rng(4).normal(size=(B, T, 2, H))
    options = dict(scale=0.5, window=4, softcap=3.0)

    def total(*arrays):
        return jnp.sum(attend(*arrays, POSITIONS, SEGMENTS, **options) * weights)

    gradients = jax.grad(total, argnums=(0, 1, 2))(*arrays)
    for index, gradient in enumerate(gradients):
        step = np.random.default_rng(index).normal(size=gradient.shape) * 1e-5
        sides = []
        for sign in (1, -1):
            moved = [np.asarray(x, np.float64) for x in arrays]
            moved[index] = moved[index] + sign * step
            sides.append(np.sum(reference(*moved, POSITIONS, SEGMENTS, **options) * weights))
        np.testing.assert_allclose(np.sum(gradient * step), (sides[0] - sides[1]) / 2, rtol=1e-4)


def test_large_scores_do_not_overflow():
    q, k, v = inputs(2, 2)
    result = attend(1e4 * q, 1e4 * k, v, POSITIONS, SEGMENTS, scale=1.0)
    assert np.isfinite(result).all()


def test_bfloat16_scores_are_float32_inside():
    arrays = [x.astype(jnp.bfloat16) for x in inputs(4, 2)]
    result = attend(*arrays, POSITIONS, SEGMENTS, scale=0.5)
    assert result.dtype == jnp.bfloat16
    expected = reference(*arrays, POSITIONS, SEGMENTS, scale=0.5)
    np.testing.assert_allclose(np.asarray(result, np.float64), expected, rtol=0.02, atol=0.02)


def test_a_window_of_one_sees_only_itself():
    keys = KeyValues(None, None, POSITIONS, SEGMENTS)
    mask = attention_mask(POSITIONS, SEGMENTS, keys, window=1)
    np.testing.assert_array_equal(mask[1], np.eye(T, dtype=bool))


def test_a_window_beyond_the_row_is_no_window():
    q, k, v = inputs(4, 2)
    unlimited = attend(q, k, v, POSITIONS, SEGMENTS, scale=0.5)
    windowed = attend(q, k, v, POSITIONS, SEGMENTS, scale=0.5, window=T)
    np.testing.assert_array_equal(windowed, unlimited)


def test_an_unknown_implementation_is_an_error():
    with pytest.raises(ValueError, match="'cudnn'"):
        attend(*inputs(2, 2), POSITIONS, SEGMENTS, scale=1.0, implementation='cudnn')


def test_naming_the_implementation_changes_nothing():
    arrays = inputs(2, 2)
    named = attend(*arrays, POSITIONS, SEGMENTS, scale=1.0, implementation='xla')
    np.testing.assert_array_equal(named, attend(*arrays, POSITIONS, SEGMENTS, scale=1.0))

"""RMS norm against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm.ops.norm import rms_norm


def reference(x, scale, epsilon):
    x, scale = np.asarray(x, np.float64), np.asarray(scale, np.float64)
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale


@pytest.mark.parametrize('shape', [(16,), (3, 16), (2, 3, 4, 16)])
def test_equals_float64(shape):
    random = np.random.default_rng(0)
    x, scale = random.normal(size=shape), random.normal(size=16)
    result = rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(scale, jnp.float32), epsilon=1e-2)
    np.testing.assert_allclose(result, reference(x, scale, 1e-2), rtol=1e-5, atol=1e-6)


def test_bfloat16_is_rounded_once_at_the_end():
    random = np.random.default_rng(1)
    x = jnp.asarray(random.normal(size=(4, 256)), jnp.bfloat16)
    scale = jnp.asarray(random.normal(size=256), jnp.float32)
    result = rms_norm(x, scale, epsilon=1e-6)
    assert result.dtype == jnp.bfloat16
    # Half a unit in the last of 8 bits.
    np.testing.assert_allclose(
        np.asarray(result, np.float64), reference(x, scale, 1e-6), rtol=2**-8, atol=0
    )


def test_a_row_of_zeros_and_its_gradient_are_finite():
    x, scale = jnp.zeros((2, 8)), jnp.ones(8)
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(rms_norm(x, scale, epsilon=1e-6)))(x)
    assert value == 0
    assert np.isfinite(gradient).all()


def test_large_bfloat16_values_do_not_overflow():
    x = jnp.full((1, 4), 3e18, jnp.bfloat16)
    np.testing.assert_allclose(np.asarray(rms_norm(x, jnp.ones(4), epsilon=1e-6), float), 1.0)

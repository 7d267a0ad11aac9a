"""RMS norm against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxfm.ops.norm import obstacles, rms_norm
from jaxfm.sharding import MESH_AXES, make_mesh
from tools import deviceless


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
    # Half an ulp of bfloat16's 8 bits.
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


def value_and_gradients(shape, scale_shape, implementation, dtype=jnp.bfloat16):
    random = np.random.default_rng(2)
    x, dy = (jnp.asarray(random.normal(size=shape), dtype) for _ in range(2))
    scale = jnp.asarray(random.normal(size=scale_shape), jnp.float32)

    def norm(x, scale):
        return rms_norm(x, scale, epsilon=1e-5, implementation=implementation)

    y, pull = jax.vjp(norm, x, scale)
    return y, *pull(dy)


@pytest.mark.parametrize(
    'shape, scale_shape', [((3, 2, 128), (128,)), ((2, 2, 3, 64), (64,)), ((2, 3, 2, 64), (2, 64))]
)
def test_the_kernel_equals_xla(interpreter, shape, scale_shape):
    """Norms over a row, over each head and over all heads together."""
    kernel = value_and_gradients(shape, scale_shape, 'interpret')
    for ours, xla in zip(kernel, value_and_gradients(shape, scale_shape, 'xla')):
        assert (ours.dtype, ours.shape) == (xla.dtype, xla.shape)
        # XLA rounds the gradient of x more than once.
        ours, xla = (np.asarray(value, np.float64) for value in (ours, xla))
        np.testing.assert_allclose(ours, xla, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize(
    'width, dtype, words',
    [(100, 'bfloat16', 'multiple of 32, not 100'), (128, 'int8', 'not int8')],
)
def test_a_call_that_the_kernel_does_not_support_is_refused(width, dtype, words):
    x = jnp.zeros((2, width), dtype)
    with deviceless.target(), pytest.raises(ValueError, match=words):
        rms_norm(x, jnp.ones(width), epsilon=1e-5, implementation='mosaic')
    assert rms_norm(x, jnp.ones(width), epsilon=1e-5).shape == x.shape


def test_a_norm_over_heads_that_are_split_over_devices_is_refused():
    with jax.set_mesh(make_mesh(dict.fromkeys(MESH_AXES, 1) | {'tensor': 8})):
        x = jnp.ones((2, 3, 8, 64), jnp.bfloat16, out_sharding=P(None, None, 'tensor', None))
        with pytest.raises(ValueError, match='sharded over tensor'):
            rms_norm(x, jnp.ones((8, 64)), epsilon=1e-5, implementation='interpret')
        rms_norm(x, jnp.ones((8, 64)), epsilon=1e-5)
    assert not obstacles(512, jnp.bfloat16)

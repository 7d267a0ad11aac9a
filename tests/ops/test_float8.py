"""Float8 products: their error, on one device and on meshes, and which matmuls a GPU runs.

The root mean square relative error of rounding to e4m3 is 2.6 %, to e5m2 5.2 %. The error of a
product of two rounded random arrays is the root of the sum of their squared errors.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxfm import sharding
from jaxfm.ops.linear import E4M3, E5M2, linear, quantize
from tools import deviceless, hlo

B, T, D, N, H = 4, 32, 64, 4, 16


def arrays(seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (B, T, D), dtype)
    weight = jax.random.normal(keys[1], (D, N, H), dtype) * 0.05
    return x, weight, jax.random.normal(keys[2], (B, T, N, H), dtype) * 1e-4


def gradients(x, weight, cotangent, **options):
    out, backward = jax.vjp(lambda x, w: linear(x, w, **options), x, weight)
    return out, *backward(cotangent)


def error(value, exact) -> float:
    """The root mean square of the difference, relative to that of the exact result."""
    value, exact = np.asarray(value, np.float64), np.asarray(exact, np.float64)
    return float(np.sqrt(np.mean((value - exact) ** 2) / np.mean(exact**2)))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16], ids=['float32', 'bfloat16'])
def test_products_and_gradients_have_only_the_error_of_rounding_to_8_bits(dtype):
    operands = arrays(dtype=dtype)
    exact = gradients(*(x.astype(jnp.float32) for x in operands))
    values = gradients(*operands, float8=True)
    assert [value.dtype for value in values] == [dtype] * 3
    out, dx, dweight = map(error, values, exact)
    # The lower bounds prove that the product was computed in float8.
    assert 0.03 < out < 0.042  # e4m3 by e4m3
    assert 0.045 < dx < 0.065 and 0.045 < dweight < 0.065  # e5m2 by e4m3


def test_products_over_two_dimensions_and_in_a_wider_gradient():
    x, _, cotangent = arrays(dtype=jnp.bfloat16)
    weight = jax.random.normal(jax.random.key(9), (N, H, D))  # float32 is the dtype of its gradient
    exact = gradients(cotangent.astype(jnp.float32), weight, x.astype(jnp.float32), contracted=2)
    values = gradients(cotangent, weight, x, contracted=2, float8=True)
    assert [value.dtype for value in values] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    assert max(map(error, values, exact)) < 0.065


@pytest.mark.parametrize('dtype', [E4M3, E5M2], ids=['e4m3', 'e5m2'])
@pytest.mark.parametrize('size', [1e-30, 1e-3, 7.3, 3e30])
def test_the_largest_element_stays_in_range_whatever_its_size(dtype, size):
    x = jnp.linspace(-size, size, 257, dtype=jnp.float32)
    values, scale = quantize(x, dtype)
    assert values.dtype == dtype
    back = np.asarray(values, np.float32) * float(scale)
    np.testing.assert_allclose(back, np.asarray(x), rtol=0.13, atol=size * 1e-4)
    assert abs(back).max() == pytest.approx(size, rel=1e-5)


def test_zeros_give_zeros_and_nonfinite_values_stay_nonfinite():
    x, weight, cotangent = arrays()
    for each in gradients(jnp.zeros_like(x), weight, jnp.zeros_like(cotangent), float8=True):
        np.testing.assert_array_equal(each, 0.0)
    assert not np.isfinite(linear(x.at[0, 0, 0].set(jnp.inf), weight, float8=True)).all()
    assert not np.isfinite(linear(x.at[0, 0, 0].set(jnp.nan), weight, float8=True)).all()


@pytest.mark.parametrize(
    'sizes', [{}, dict(replica=4), dict(fsdp=4), dict(fsdp=2, tensor=2), dict(replica=2, fsdp=2)]
)
def test_every_mesh_gives_the_result_of_one_device(sizes):
    x, weight, cotangent = arrays()
    # Rows of very different magnitudes: one scale per device would give other results.
    x *= 10.0 ** jnp.arange(B)[:, None, None]
    alone = jax.jit(lambda *a: gradients(*a, float8=True))(x, weight, cotangent)
    axes = {axis: 1 for axis in sharding.MESH_AXES}
    mesh = sharding.make_mesh(axes | sizes, jax.devices()[: math.prod(sizes.values())])
    with jax.set_mesh(mesh):
        rows = sharding.activation('batch', 'position', 'embed')
        heads = sharding.activation('batch', 'position', 'heads', 'head_dim')
        # If no axis is gathered, a weight's type keeps the sharding of a stored weight.
        spec_of = sharding.used_spec if sharding.is_gathered() else sharding.stored_spec
        specs = rows, spec_of(('embed', 'heads', 'head_dim')), heads
        placed = [
            jax.device_put(a, NamedSharding(mesh, spec or P()))
            for a, spec in zip((x, weight, cotangent), specs, strict=True)
        ]
        spread = jax.jit(lambda *a: gradients(*a, float8=True))(*placed)
    for one, many in zip(alone, spread, strict=True):
        np.testing.assert_allclose(many, one, rtol=2e-5, atol=2e-6 * float(jnp.max(jnp.abs(one))))


@pytest.mark.usefixtures('gpu_compiler')
def test_a_gpu_multiplies_in_8_bits_forward_and_for_both_gradients():
    mesh = sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1), deviceless.devices())
    shapes = (2, 512, 256), (256, 8, 64), (2, 512, 8, 64)
    with jax.set_mesh(mesh):
        operands = [
            jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P()))
            for shape in shapes
        ]
        lowered = jax.jit(lambda *a: gradients(*a, float8=True)).lower(*operands)
    # Without autotuning XLA would use its own matmuls everywhere; these are cuBLAS's.
    compiled = deviceless.compile_lowered(lowered, xla_gpu_enable_triton_gemm=False)
    calls = hlo.custom_calls(compiled.as_text())
    assert calls['__cublas$lt$matmul$f8'] == 3
    assert not [target for target in calls if 'gemm' in target]

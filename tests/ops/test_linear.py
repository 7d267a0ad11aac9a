"""Products with weights and their hand-written gradients, against autodiff of an einsum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm.ops.linear import linear
from jaxfm.sharding import MESH_AXES, make_mesh, place, used_spec

B, T = 4, 3
# Input and output dimensions, and how many of x's are contracted: narrower, wider, split, merged.
SHAPES = {
    'narrow': ((8,), (2,)),
    'wide': ((4,), (2, 6)),
    'split': ((8,), (4, 2)),
    'merge': ((4, 2), (8,)),
    'merge narrow': ((4, 6), (8,)),
}


def case(name, dtype=jnp.float32):
    inputs, outputs = SHAPES[name]
    random = np.random.default_rng(0)
    shapes = ((B, T, *inputs), (*inputs, *outputs), (B, T, *outputs))
    x, weight, factor = (jnp.asarray(random.normal(size=s), dtype) for s in shapes)
    letters = 'ijkl'[: len(inputs) + len(outputs)]
    i, o = letters[: len(inputs)], letters[len(inputs) :]
    return x, weight, factor, f'bt{i},{i}{o}->bt{o}', len(inputs)


def values(product, x, weight, factor):
    """-> the product, and the gradients of a sum over it."""

    def total(x, weight):
        out = product(x, weight)
        return jnp.sum(jnp.sin(out.astype(jnp.float32)) * factor), out

    gradients, out = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(x, weight)
    return out, *gradients


@pytest.mark.parametrize('name', SHAPES)
def test_values_and_gradients_equal_an_einsum(name):
    x, weight, factor, letters, contracted = case(name)
    ours = values(lambda x, w: linear(x, w, contracted=contracted), x, weight, factor)
    theirs = values(lambda x, w: jnp.einsum(letters, x, w), x, weight, factor)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_bfloat16_operands_may_give_a_float32_result():
    x, weight, factor, letters, _ = case('wide', jnp.bfloat16)
    out, dx, dw = values(lambda x, w: linear(x, w, out_dtype='float32'), x, weight, factor)
    assert (out.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    exact = np.einsum(letters, *(np.asarray(a, np.float64) for a in (x, weight)))
    np.testing.assert_allclose(out, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    'name, axes',
    [
        ('split', ('embed', 'heads', 'head_dim')),
        ('merge', ('heads', 'head_dim', 'embed')),
    ],
)
def test_a_mesh_changes_nothing_and_gradients_are_sharded_like_their_arrays(name, axes):
    x, weight, factor, _, contracted = case(name)
    alone = values(lambda x, w: linear(x, w, contracted=contracted), x, weight, factor)
    with jax.set_mesh(make_mesh({a: 1 for a in MESH_AXES} | {'fsdp': 2, 'tensor': 4})):
        weight = jax.device_put(weight, used_spec(axes))
        x = place(x, 'batch', 'position', *axes[:contracted])
        factor = place(factor, 'batch', 'position', *axes[contracted:])
        spec = jax.typeof(factor).sharding.spec
        spread = values(
            lambda x, w: linear(x, w, contracted=contracted, out_sharding=spec), x, weight, factor
        )
        for gradient, array in zip(spread[1:], (x, weight), strict=True):
            assert gradient.sharding.is_equivalent_to(array.sharding, array.ndim)
    for a, b in zip(spread, alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

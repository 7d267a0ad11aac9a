"""Sums over segments, on one device and where a segment lies on two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm.ops.segments import segment_sums
from jaxfm.sharding import MESH_AXES, make_mesh, place

VALUES = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
WEIGHTS = np.random.default_rng(1).normal(size=(2, 8)).astype(np.float32)
# A segment across the middle, one for each position, and padding.
IDS = np.int32([[1, 1, 2, 2, 2, 2, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8]])


def reference(values):
    """Row by row, position by position."""
    is_same = IDS[:, :, None] == IDS[:, None, :]
    return np.sum(is_same * values[:, None, :], axis=-1)


@jax.jit
def sums_and_gradient(values, ids):
    def total(values):
        sums = segment_sums(values, ids)
        return jnp.sum(sums * place(WEIGHTS, 'batch', 'position')), sums

    gradient, sums = jax.grad(total, has_aux=True)(values)
    return sums, gradient


@pytest.mark.parametrize('sizes', [{}, dict(context=2), dict(fsdp=2, context=2, tensor=2)])
def test_equals_a_sum_over_the_same_ids(sizes):
    shape = dict.fromkeys(MESH_AXES, 1) | sizes
    count = int(np.prod(list(shape.values())))
    with jax.set_mesh(make_mesh(shape, jax.devices()[:count])):
        split = [place(x, 'batch', 'position') for x in (VALUES, IDS)]
        sums, gradient = sums_and_gradient(*split)
    np.testing.assert_allclose(sums, reference(VALUES), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradient, reference(WEIGHTS), rtol=1e-6, atol=1e-6)


def test_needs_no_mesh():
    sums, _ = sums_and_gradient(VALUES, IDS)
    np.testing.assert_allclose(sums, reference(VALUES), rtol=1e-6, atol=1e-6)

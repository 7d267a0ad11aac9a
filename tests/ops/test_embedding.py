"""Embedding lookups are equal on every mesh, whether the table is sharded or gathered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxfm import sharding
from jaxfm.ops.embedding import look_up

B, T, V, D = 8, 4, 16, 8
MESHES = [{}, {'fsdp': 8}, {'fsdp': 2, 'tensor': 2, 'context': 2}]


def a_mesh(sizes):
    full = dict.fromkeys(sharding.MESH_AXES, 1) | sizes
    return sharding.make_mesh(full, jax.devices()[: int(np.prod(list(full.values())))])


@pytest.mark.parametrize('sizes', MESHES, ids=str)
def test_rows_and_their_gradient_equal_numpy(sizes):
    random = np.random.default_rng(0)
    table = random.standard_normal((V, D)).astype(np.float32)
    tokens = random.integers(0, V, (B, T)).astype(np.int32)
    weights = random.standard_normal((B, T, D)).astype(np.float32)
    mesh = a_mesh(sizes)
    axes = ('vocab', 'embed')
    # As a model passes it: sharded if nothing is gathered, else whole along embed.
    spec = sharding.used_spec(axes) if sizes else sharding.stored_spec(axes)
    with jax.set_mesh(mesh):
        placed = jax.device_put(table, NamedSharding(mesh, spec))
        ids = jax.device_put(tokens, sharding.batch_sharding(mesh))

        def total(table, ids):
            rows = look_up(table, ids, jnp.float32)
            return jnp.sum(rows * sharding.place(weights, 'batch', 'position', 'embed')), rows

        gradient, rows = jax.jit(jax.grad(total, has_aux=True))(placed, ids)
    np.testing.assert_array_equal(rows, table[tokens])
    expected = np.zeros((V, D))
    np.add.at(expected, tokens, weights)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)
    assert gradient.sharding.spec == placed.sharding.spec


def test_a_frequent_token_gets_its_whole_gradient():
    """A sum of ones in bfloat16 stops at 256."""
    table, tokens = jnp.zeros((2, 8), jnp.bfloat16), jnp.zeros((1, 1000), jnp.int32)
    gradient = jax.grad(lambda t: jnp.sum(look_up(t, tokens, jnp.bfloat16)).astype(jnp.float32))
    np.testing.assert_allclose(gradient(table)[0].astype(jnp.float32), 1000, rtol=4e-3)

"""Bytes per device and in total."""

import jax
import jax.numpy as jnp

from jaxfm import sharding
from jaxfm.plan.memory import bytes_per_device, bytes_total


def test_bytes_are_counted_per_device_and_in_total():
    with jax.set_mesh(sharding.make_mesh({a: 1 for a in sharding.MESH_AXES} | {'fsdp': 8})):
        mesh = jax.sharding.get_mesh()
        split = jax.NamedSharding(mesh, sharding.stored_spec(('embed', 'norm')))
        whole = jax.NamedSharding(mesh, sharding.stored_spec(('norm',)))
        tree = {
            'matrix': jax.ShapeDtypeStruct((16, 3), jnp.bfloat16, sharding=split),
            'vector': jnp.zeros(5, jnp.float32, device=whole),
        }
    assert bytes_per_device(tree) == 2 * 3 * 2 + 5 * 4
    assert bytes_total(tree) == 16 * 3 * 2 + 5 * 4

"""A fingerprint is the sum of what its parts add, on any mesh and in any pieces."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxfm.checkpoint import fingerprint
from jaxfm.checkpoint.fingerprint import fingerprint_of_part, fingerprints


def of_parts(array, sizes):
    steps = [range(0, size, part) for size, part in zip(array.shape, sizes)]
    total = 0
    for start in itertools.product(*steps):
        where = tuple(slice(at, at + part) for at, part in zip(start, sizes))
        total += fingerprint_of_part(np.ascontiguousarray(array[where]), array.shape, start)
    return total % 2**32


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8', 'bool', 'complex64', 'uint32'])
def test_parts_add_up_to_the_fingerprint_of_the_whole(dtype):
    values = np.random.default_rng(0).standard_normal((6, 10, 8)) * 100
    values = np.asarray(values.astype(jnp.dtype(dtype)))
    whole = fingerprints({'x': jnp.asarray(values)})['x']
    mesh = jax.make_mesh((2,), ('fsdp',))
    split = jax.device_put(values, NamedSharding(mesh, jax.P(None, 'fsdp')))
    assert fingerprints({'x': split})['x'] == whole
    for sizes in ((6, 10, 8), (1, 10, 8), (4, 3, 5)):
        assert of_parts(values, sizes) == whole


def test_elements_of_eight_bytes_keep_all_their_bits():
    values = np.random.default_rng(0).integers(0, 2**63, (6, 4))
    with jax.enable_x64(True):
        whole = fingerprints({'x': jnp.asarray(values)})['x']
    assert of_parts(values, (2, 4)) == whole
    values[3, 3] ^= 1 << 62
    assert of_parts(values, (2, 4)) != whole


@pytest.mark.parametrize('shape', [(12, 768, 1536), (6, 768, 3072), (32768, 768), (12, 768, 768)])
def test_the_hashes_of_an_array_are_never_in_memory(shape):
    leaf = jax.ShapeDtypeStruct(shape, np.float32)
    memory = fingerprint.start_fingerprint.lower(leaf).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 4 * np.prod(shape) // 7

"""Arrays packed into one come back as they were, split as a batch also when there is one row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm import sharding
from jaxfm.sampling.packed import pack, pack_columns, unpack, unpack_columns


def arrays(rows: int) -> dict:
    random = np.random.default_rng(0)
    return {
        'ids': random.integers(-5, 5, (rows, 3), np.int32),
        'one': random.integers(0, 5, (rows, 1), np.int32),
        'options': {
            'bias': random.normal(size=(rows, 2)).astype(np.float32) * [1, -np.inf],
            'seeds': random.integers(0, 2**32, rows, np.uint32),
        },
    }


def as_float32(tree):
    return jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, tree)


@pytest.mark.parametrize('rows', [1, 4])
def test_packed_rows_come_back_and_are_split_as_a_batch(rows, one_device):
    given = as_float32(arrays(rows))
    with jax.set_mesh(one_device):
        packed = sharding.distribute(pack(given), one_device)
        specs = []

        def run(packed):
            found = unpack(packed)
            specs.extend(sharding.spec_of(x)[0] for x in jax.tree.leaves(found))
            return found

        found = jax.jit(run)(packed)
    jax.tree.map(np.testing.assert_array_equal, found, given)
    assert set(specs) == {sharding.ACTIVATIONS['batch']}


def test_packed_columns_come_back():
    random = np.random.default_rng(1)
    given = [
        random.integers(0, 9, (3, 2), np.int32),
        random.normal(size=(3, 2, 4)).astype(np.float32),
        random.random((3, 2)) < 0.5,
    ]
    like = [(None, np.int32), (4, np.float32), (None, bool)]
    data = np.asarray(jax.jit(pack_columns)([jnp.asarray(x) for x in given]))
    for found, expected in zip(unpack_columns(data, like), given, strict=True):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == expected.dtype

"""Meshes and their arithmetic, the lint of weights, batches on the devices."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxfm import sharding
from jaxfm.errors import ConfigError

ONE = dict.fromkeys(sharding.MESH_AXES, 1)


def make_mesh(**sizes):
    shape = ONE | sizes
    return sharding.make_mesh(shape, jax.devices()[: int(np.prod(list(shape.values())))])


# Meshes


def test_the_free_axis_takes_the_devices_that_are_left():
    assert sharding.mesh_shape(ONE | dict(fsdp=-1, tensor=2), 8) == ONE | dict(fsdp=4, tensor=2)
    assert sharding.mesh_shape(ONE | dict(fsdp=-1, tensor=8), 8) == ONE | dict(tensor=8)
    assert sharding.mesh_shape(ONE, 1) == ONE


@pytest.mark.parametrize(
    ('sizes', 'message'),
    [
        (dict(fsdp=2, tensor=2), 'fsdp 2 x tensor 2 = 4, which must equal'),
        (dict(replica=2, fsdp=8), 'replica 2 x fsdp 8 = 16, which must equal'),
        (dict(), '1 = 1, which must equal'),
        (dict(fsdp=-1, tensor=3), 'tensor 3 = 3, which must divide'),
        (dict(fsdp=-1, tensor=16), 'tensor 16 = 16, which must divide'),
    ],
)
def test_an_impossible_mesh_is_refused_with_the_arithmetic(sizes, message):
    with pytest.raises(ConfigError, match=f'{message} the number of devices, 8$'):
        sharding.mesh_shape(ONE | sizes, 8)


def test_a_mesh_has_all_axes_and_they_are_explicit():
    mesh = make_mesh(fsdp=2, tensor=4)
    assert mesh.axis_names == sharding.MESH_AXES
    assert dict(mesh.shape) == ONE | dict(fsdp=2, tensor=4)
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}


# Weights


def check(shape, axes, **sizes):
    sharding.check_weights({'trunk/w': shape}, {'trunk/w': axes}, make_mesh(**sizes))


def test_weights_that_divide_pass():
    check((4, 8, 16), ('layers', 'embed', 'mlp'), fsdp=2, tensor=4)


def test_a_weight_that_does_not_divide_is_refused_with_the_arithmetic():
    with pytest.raises(ConfigError, match=r'trunk/w: mlp 6 / tensor 4 = 1\.5'):
        check((8, 6), ('embed', 'mlp'), fsdp=2, tensor=4)


def test_every_weight_that_does_not_fit_is_named():
    shapes = {'a': (7,), 'b': (8, 5), 'fits': (8,)}
    axes = {'a': ('embed',), 'b': ('embed', 'kv_heads'), 'fits': ('embed',)}
    with pytest.raises(ConfigError) as caught:
        sharding.check_weights(shapes, axes, make_mesh(fsdp=2, tensor=2))
    assert 'a: embed 7 / fsdp 2' in str(caught.value)
    assert 'b: kv_heads 5 / tensor 2' in str(caught.value)
    assert 'fits' not in str(caught.value)


LARGE = (sharding.LARGE_PARAMETER // 4, 4)


def check_replication(shape, axes, **sizes):
    mesh = make_mesh(**sizes)
    place = NamedSharding(mesh, sharding.stored_spec(axes))
    moment = jax.ShapeDtypeStruct(shape, np.float32, sharding=place)
    sharding.check_replication({'opt_state/mu/trunk/w': moment}, mesh)


def test_a_large_array_of_the_state_that_stays_whole_by_accident_is_refused():
    with pytest.raises(ConfigError, match='mu/trunk/w: 1,048,576 elements would be replicated'):
        check_replication(LARGE, ('norm', 'head_dim'), fsdp=2, tensor=4)
    with pytest.raises(ConfigError, match='would be replicated'):
        check_replication(LARGE, ('heads', 'head_dim'), fsdp=8)


def test_an_array_may_stay_whole_where_it_is_small_split_or_nothing_could_split_it():
    check_replication((LARGE[0] - 1, 4), ('norm', 'head_dim'), fsdp=8)
    check_replication(LARGE, ('embed', 'head_dim'), fsdp=8)
    check_replication(LARGE, ('norm', 'head_dim'), replica=8)
    check_replication(LARGE, ('norm', 'head_dim'))


def test_weights_move_between_stored_and_used_places():
    with jax.set_mesh(make_mesh(fsdp=2, tensor=2)):
        weight = jax.jit(lambda x: sharding.place_stored(x, ('embed', 'mlp')))(np.ones((4, 6)))
        assert weight.sharding.spec == jax.P('fsdp', 'tensor')
        assert weight.addressable_shards[0].data.shape == (2, 3)
    assert sharding.used_spec(('embed', 'mlp')) == jax.P(None, 'tensor')


def test_without_a_mesh_nothing_is_placed():
    assert sharding.activation('batch', 'embed') is None
    x = np.ones((2, 2))
    assert sharding.place(x, 'batch', 'embed') is x
    assert sharding.place_stored(x, ('embed', 'mlp')) is x


# Batches

MESHES = [dict(fsdp=8), dict(fsdp=2, tensor=4), dict(replica=2, fsdp=2, tensor=2), dict(tensor=8)]


def make_batch(rows=16, first=0):
    tokens = np.arange(first, first + rows * 4, dtype=np.int32).reshape(rows, 4)
    return {'tokens': tokens, 'loss_mask': (tokens % 3 > 0).astype(np.float32)}


@pytest.mark.parametrize('sizes', MESHES, ids=str)
def test_put_and_distribute_give_the_batch_split_by_rows(sizes):
    mesh, batch = make_mesh(**sizes), make_batch()
    rows = 16 // sharding.batch_shards(mesh)
    for arrays in (sharding.put(batch, mesh, 16), sharding.distribute(batch, mesh)):
        for name, array in batch.items():
            np.testing.assert_array_equal(arrays[name], array)
            assert arrays[name].dtype == array.dtype
            assert arrays[name].addressable_shards[0].data.shape == (rows, 4)
    with jax.set_mesh(mesh):
        spec = sharding.activation('batch', 'position')
        assert sharding.put(batch, mesh, 16)['tokens'].sharding == NamedSharding(mesh, spec)


def rows_of(mesh, owned, monkeypatch):
    """`local_rows` of a process that has these devices of the mesh."""

    def indices(place, shape):
        everywhere = place.devices_indices_map(shape)
        return {device: rows for device, rows in everywhere.items() if device.id in owned}

    with monkeypatch.context() as patched:
        patched.setattr(NamedSharding, 'addressable_devices_indices_map', indices)
        return sharding.local_rows(mesh, 16).tolist()


@pytest.mark.parametrize('sizes', MESHES, ids=str)
def test_one_process_makes_all_rows(sizes):
    assert sharding.local_rows(make_mesh(**sizes), 16).tolist() == list(range(16))


def test_a_process_makes_the_rows_of_its_devices_once(monkeypatch):
    first, second = range(4), range(4, 8)
    low, high = list(range(8)), list(range(8, 16))
    for sizes in (dict(fsdp=8), dict(fsdp=2, tensor=4), dict(replica=2, fsdp=2, tensor=2)):
        mesh = make_mesh(**sizes)
        # Devices that share their rows (tensor) do not make them twice.
        assert rows_of(mesh, first, monkeypatch) == low
        assert rows_of(mesh, second, monkeypatch) == high
    # A tensor group over two processes: both make all rows.
    mesh = make_mesh(tensor=8)
    assert rows_of(mesh, first, monkeypatch) == rows_of(mesh, second, monkeypatch) == low + high

"""Checkpoints of adapters: without the frozen weights, which must come back as they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxfm.checkpoint import CheckpointConfig
from jaxfm.checkpoint.base import Base
from jaxfm.checkpoint.checkpointer import Checkpointer
from jaxfm.checkpoint.reader import Reader
from jaxfm.checkpoint.store import Store
from jaxfm.checkpoint.verify import find_damages
from jaxfm.errors import DataError, MissingInputError
from jaxfm.storage import open_storage

ORIGIN = {'init_from': '/runs/origin', 'step': 12}
BASE = Base(frozenset(['frozen/w', 'frozen/scale']), ORIGIN)
ONLY = 'holds only adapters, not the weights of /runs/origin at step 12 that they belong to'


def state():
    mesh = jax.make_mesh((8,), ('fsdp',))
    values = np.random.default_rng(0).standard_normal((64, 16), dtype=np.float32)
    arrays = {
        'step': np.int32(7),
        'trainable/a': values[:, :2],
        'frozen/b': values[:, 2:4],  # an adapter, too, which this phase does not train
        'frozen/w': values,
        'frozen/scale': values[0].astype(jnp.bfloat16),
    }
    places = {
        n: NamedSharding(mesh, jax.P('fsdp') if x.ndim == 2 else jax.P()) for n, x in arrays.items()
    }
    return jax.device_put(arrays, places)


def origin_params(manifest):
    """What the origin gives: also of a path that no checkpoint needs."""
    return {name.partition('/')[2]: array for name, array in state().items() if '/' in name}


def wanted():
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in state().items()
    }


@pytest.fixture(scope='module')
def reader(tmp_path_factory):
    """Of a place with step 7."""
    root = tmp_path_factory.mktemp('base')
    checkpointer = Checkpointer(CheckpointConfig(), root, base=BASE)
    checkpointer.save(7, state(), {}, must=True)
    checkpointer.close()
    return Reader(CheckpointConfig(), root)


def test_the_frozen_weights_are_named_and_not_saved(reader):
    manifest = reader.read_manifest(7)
    assert manifest['arrays'].keys() == {'step', 'trainable/a', 'frozen/b'}
    assert manifest['base']['origin'] == ORIGIN
    assert manifest['base']['arrays'].keys() == BASE.names
    store = Store(open_storage(reader.root))
    sizes = [file['size'] for name, file in manifest['files'].items() if '/d/' in name]
    assert sum(sizes) < state()['frozen/w'].nbytes
    assert not find_damages(store, store.commits()[7])


def test_they_come_from_their_origin_bit_for_bit(reader):
    restored, _ = reader.restore(7, wanted(), origin_params)
    assert list(restored) == list(state())
    for name, array in state().items():
        assert np.asarray(restored[name]).tobytes() == np.asarray(array).tobytes(), name
        assert restored[name].sharding == array.sharding
    places = {name.partition('/')[2]: leaf for name, leaf in wanted().items() if '/' in name}
    params = reader.restore_params(7, places, origin_params)
    assert params.keys() == {'a', 'b', 'w', 'scale'}


def test_adapters_alone_need_no_origin(reader):
    leaf = wanted()['trainable/a']
    assert reader.restore_params(7, {'a': leaf}).keys() == {'a'}


def test_the_frozen_weights_alone_need_no_arrays_of_the_step(reader):
    leaf = wanted()['frozen/w']
    assert reader.restore_params(7, {'w': leaf}, origin_params).keys() == {'w'}


def test_other_weights_of_the_same_shape_are_refused_and_named(reader, caplog):
    def changed(manifest):
        params = origin_params(manifest)
        w = np.array(params['w'])
        w[3, 5] = np.nextafter(w[3, 5], np.float32(9))
        return params | {'w': jax.device_put(w, params['w'].sharding)}

    with pytest.raises(DataError) as caught:
        reader.newest_whole(lambda step: reader.restore(step, wanted(), changed))
    assert f'{ONLY}; these are others now: frozen/w; put back' in str(caught.value)
    assert not caplog.messages  # this is no damage, and no earlier step would be better


def test_an_origin_that_is_gone_is_named(reader):
    def gone(manifest):
        assert manifest['base']['origin'] == ORIGIN
        raise MissingInputError('there is no /runs/origin')

    with pytest.raises(MissingInputError, match=f'{ONLY}: there is no /runs/origin; if they have'):
        reader.restore(7, wanted(), gone)
    with pytest.raises(MissingInputError, match='checkpoint 7 in .* holds only adapters'):
        reader.restore(7, wanted())

"""What we save, stock Orbax restores: all of it, a part of it, on any mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util
from jax.sharding import NamedSharding
from orbax.checkpoint import v1

from jaxfm.checkpoint import CheckpointConfig, orbax_tree
from jaxfm.checkpoint.arrays import Deadline
from jaxfm.checkpoint.checkpointer import Checkpointer
from jaxfm.checkpoint.fingerprint import fingerprints
from jaxfm.checkpoint.reader import Reader
from jaxfm.checkpoint.store import Store
from jaxfm.errors import DataError, StorageError
from jaxfm.storage import open_storage
from tests.conftest import ROOT
from tools import checkpoint as tool


def host_state():
    random = np.random.default_rng(0)
    weights = random.standard_normal((64, 48), dtype=np.float32)
    weights[0, :3] = np.nan, np.inf, -0.0
    return {
        'step': np.int32(7),
        'rng': random.integers(0, 2**32, 2, dtype=np.uint32),
        'trainable/trunk/0/0/w': weights,
        'trainable/scale': weights[1].astype(jnp.bfloat16),
        'opt_state/0/mu': weights.astype(jnp.bfloat16),
        'opt_state/0/nu': np.zeros((64, 48), np.float32),  # TensorStore might leave zeros out
        'counters/skipped': np.int32(0),
    }


def sharding_of(leaf, devices):
    mesh = jax.make_mesh((devices,), ('fsdp',), devices=jax.devices()[:devices])
    return NamedSharding(mesh, jax.P('fsdp') if leaf.ndim == 2 else jax.P())


def abstract(state, devices):
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(x, devices))
        for name, x in state.items()
    }


def nest(flat):
    return traverse_util.unflatten_dict(flat, sep='/')


def save(root):
    """Saves `host_state` as step 7; returns the store."""
    state = host_state()
    checkpointer = Checkpointer(CheckpointConfig(), root)
    places = {name: sharding_of(x, 8) for name, x in state.items()}
    checkpointer.save(7, jax.device_put(state, places), {}, must=True)
    checkpointer.close()
    return Store(open_storage(root))


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    return save(tmp_path_factory.mktemp('orbax'))


@pytest.fixture
def directory(store):
    return store.storage.directory / store.commits()[7].directory / 'state'


READERS = {
    'StandardCheckpointer': lambda path, tree=None: ocp.StandardCheckpointer().restore(path, tree),
    'PyTreeCheckpointer': lambda path, tree=None: ocp.PyTreeCheckpointer().restore(
        path,
        args=ocp.args.PyTreeRestore(
            item=tree,
            restore_args=tree and ocp.checkpoint_utils.construct_restore_args(tree),
        ),
    ),
    'v1.load': lambda path, tree=None: v1.load(path, tree),
}


def assert_whole(restored, store):
    restored = traverse_util.flatten_dict(restored, sep='/')
    expected = host_state()
    assert restored.keys() == expected.keys()
    for name, want in expected.items():
        got = np.asarray(restored[name])
        assert (got.dtype, got.shape) == (want.dtype, want.shape), name
        assert got.tobytes() == want.tobytes(), name
    described = store.manifest(store.commits()[7])['arrays']
    on_device = {name: jnp.asarray(leaf) for name, leaf in restored.items()}
    assert fingerprints(on_device) == {n: one['fingerprint'] for n, one in described.items()}


@pytest.mark.parametrize('reader', READERS)
def test_stock_orbax_restores_a_step_as_it_was_saved(reader, store, directory):
    assert_whole(READERS[reader](directory), store)


@pytest.mark.parametrize('reader', READERS)
def test_stock_orbax_restores_a_step_onto_another_mesh(reader, store, directory):
    wanted = abstract(host_state(), devices=4)
    restored = READERS[reader](directory, nest(wanted))
    assert_whole(restored, store)
    for name, leaf in traverse_util.flatten_dict(restored, sep='/').items():
        assert leaf.sharding == wanted[name].sharding, name


def test_stock_orbax_restores_a_part_of_a_step(directory):
    wanted = {'trainable': nest(abstract(host_state(), 2))['trainable']}
    args = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,
    )
    restored = ocp.PyTreeCheckpointer().restore(directory, args=args)
    got = traverse_util.flatten_dict(restored, sep='/')
    assert got.keys() == {'trainable/trunk/0/0/w', 'trainable/scale'}
    for name, leaf in got.items():
        assert np.asarray(leaf).tobytes() == host_state()[name].tobytes()


def test_the_lines_in_the_docs_restore_a_step(store, monkeypatch):
    text = (ROOT / 'docs' / 'checkpoints.md').read_text(encoding='utf-8')
    (lines,) = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    monkeypatch.chdir(store.storage.directory)
    names = {}
    exec(lines.replace('runs/quickstart/checkpoints/850', '7'), names)
    assert_whole(names['state'], store)
    assert names['weights'].keys() == {'trunk', 'scale'}


def test_a_step_on_s3_is_downloaded_for_stock_orbax(s3_environment, tmp_path, capsys):
    root = f's3://{s3_environment.BUCKET}/{tmp_path.name}'
    store, into = save(root), tmp_path / 'step'
    command = ['download', root, '--step', '7', '--to', str(into)]
    assert tool.main(command) == 0
    assert_whole(ocp.StandardCheckpointer().restore(into), store)
    capsys.readouterr()
    assert tool.main(command) == 64
    assert f'--to {into}: it exists already' in capsys.readouterr().err
    assert tool.main([*command[:3], '8', *command[4:]]) == 64
    assert tool.main(['download', root, '--step', '8', '--to', str(tmp_path / 'other')]) == 66
    assert 'available steps: 7' in capsys.readouterr().err


def test_saving_and_restoring_print_nothing(tmp_path, capfd, caplog):
    """Orbax warns and logs about much that is none of the user's business."""
    save(tmp_path)
    wanted = abstract(host_state(), 8)
    Reader(CheckpointConfig(), tmp_path).restore(7, wanted)
    assert capfd.readouterr() == ('', '') and not caplog.messages


def test_orbax_reads_and_writes_through_our_arrays_alone(tmp_path):
    """Nothing but its description of the tree comes from the directory that Orbax sees."""
    storage = open_storage(tmp_path)
    state = host_state()
    places = {name: sharding_of(x, 8) for name, x in state.items()}
    parts = orbax_tree.arrays.snapshots(jax.device_put(state, places))
    base = storage.kvstore('state')
    metadata = orbax_tree.save(base, parts, Deadline.after(60), private=False)
    assert {name.split('/')[1] for name in storage.list()} == {'manifest.ocdbt', 'd'}
    restored = orbax_tree.restore(base, metadata, abstract(state, 4), Deadline.after(60))
    for name, want in state.items():
        assert np.asarray(restored[name]).tobytes() == want.tobytes()


def test_names_that_are_one_to_orbax_are_refused(tmp_path, caplog):
    state = {'a/b.c': np.zeros(2), 'a.b/c': np.ones(2)}
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    checkpointer = Checkpointer(CheckpointConfig(max_failures=1), tmp_path)
    with pytest.raises(StorageError):
        checkpointer.save(1, jax.device_put(state, place), {}, must=True)
    checkpointer.close()
    assert "names of arrays that differ only in '/' and '.' are one to Orbax" in caplog.text


def test_a_damaged_step_is_not_downloaded(tmp_path, capsys):
    store = save(tmp_path / 'run')
    (data,) = (n for n in store.storage.list(store.commits()[7].directory) if '/d/' in n)
    content = bytearray(store.storage.read(data))
    content[len(content) // 2] ^= 1
    store.storage.write(data, bytes(content))
    command = ['download', str(tmp_path / 'run'), '--step', '7', '--to']
    assert tool.main([*command, str(tmp_path / 'step')]) == 65
    assert 'checkpoint 7 in' in capsys.readouterr().err
    assert not (tmp_path / 'step').exists()


@pytest.mark.parametrize(
    ('version', 'told'),
    [(1, 'an earlier version of jaxfm saved it; with that version, '), (99, 'update jaxfm')],
)
def test_a_step_of_another_version_is_refused_and_not_damaged(
    version, told, tmp_path, monkeypatch, caplog
):
    with monkeypatch.context() as patch:
        patch.setattr('jaxfm.checkpoint.store.VERSION', version)
        save(tmp_path)
    reader = Reader(CheckpointConfig(), tmp_path)
    with pytest.raises(DataError, match=re.escape(f'has format {version}, not 2: ')) as caught:
        reader.newest_whole(lambda step: reader.restore(step, abstract(host_state(), 8)))
    assert told in str(caught.value) and not caplog.messages

"""Checkpoints on a disk: restored bit for bit on any mesh, committed atomically."""

import contextlib
import resource
import shutil
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxfm.checkpoint import CheckpointConfig, arrays
from jaxfm.checkpoint.checkpointer import Checkpointer
from jaxfm.checkpoint.reader import Reader
from jaxfm.checkpoint.store import Store
from jaxfm.errors import (
    ConfigError,
    DamagedError,
    DataError,
    MissingInputError,
    PermissionDeniedError,
    StorageError,
    UnavailableError,
)
from jaxfm.storage import open_storage
from jaxfm.storage.lease import Holder, Record

EXTRA = {'source': {'next_row': 2**60 + 1}, 'seconds': 0.1, 'metrics': [1, None]}


def make_mesh(*shape):
    names = ('fsdp', 'tensor')[: len(shape)]
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(
        shape, names, axis_types=(AxisType.Explicit,) * len(shape), devices=devices
    )


def spec_of(array, mesh):
    """Two-dimensional leaves are sharded over the mesh, the others are replicated."""
    return P(*mesh.axis_names) if array.ndim == 2 else P()


def place(tree, mesh):
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec_of(x, mesh))), tree)


def abstract_of(tree, mesh):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec_of(x, mesh))
        ),
        tree,
    )


def host_state(seed=0):
    random = np.random.default_rng(seed)
    weights = random.standard_normal((512, 128), dtype=np.float32)
    weights[0, :3] = np.nan, np.inf, -0.0
    return {
        'step': np.int32(seed),
        'rng': random.integers(0, 2**32, 2, dtype=np.uint32),
        'params/w': weights,
        'params/scale': weights[1].astype(jnp.bfloat16),
        'opt_state/0/mu': weights * 2,
        'opt_state/1/count': np.int32(3),
    }


def assert_bitwise_equal(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        got, want = np.asarray(got), np.asarray(want)
        assert got.dtype == want.dtype
        assert got.tobytes() == want.tobytes()


@pytest.fixture
def checkpointer(tmp_path):
    made = Checkpointer(CheckpointConfig(keep=2), tmp_path / 'checkpoints')
    yield made
    made.close()


@pytest.fixture
def saved(checkpointer):
    """A checkpointer with one committed step, 7."""
    checkpointer.save(7, place(host_state(), make_mesh(8)), EXTRA)
    checkpointer.wait()
    return checkpointer


def step_directory(checkpointer, step=7):
    """The directory of the committed attempt."""
    (manifest,) = Path(checkpointer.root, str(step)).glob('*/manifest.json')
    return manifest.parent


def test_a_new_directory_has_no_step(checkpointer):
    assert checkpointer.latest_step() is None
    with pytest.raises(MissingInputError, match='no checkpoint 3 .* available steps: none'):
        checkpointer.restore(3, {})


@pytest.mark.parametrize('shape', [(8,), (2, 4), (1,)])
def test_restore_on_another_mesh_is_bit_equal(saved, shape):
    mesh = make_mesh(*shape)
    abstract = abstract_of(host_state(), mesh)
    state, extra = saved.restore(7, abstract)
    assert_bitwise_equal(state, host_state())
    assert extra == EXTRA
    assert all(
        x.sharding == a.sharding
        for x, a in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True)
    )


def test_another_process_finds_the_step(saved):
    fresh = Checkpointer(CheckpointConfig(), saved.root)
    assert fresh.latest_step() == 7
    state, _ = fresh.restore(7, abstract_of(host_state(), make_mesh(1)))
    assert_bitwise_equal(state, host_state())
    fresh.close()


@pytest.mark.parametrize('devices', [1, 8])
def test_state_may_be_donated_as_soon_as_save_returns(checkpointer, devices):
    mesh = make_mesh(devices)
    host = {'w': np.zeros((4096, 1024), np.float32), 'count': np.int32(0)}
    spoil = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = spoil(place(host, mesh))
    for step in range(1, 4):
        checkpointer.save(step, state, {})
        state = spoil(spoil(state))
        jax.block_until_ready(state)
        checkpointer.wait()
        restored, _ = checkpointer.restore(step, abstract_of(host, mesh))
        assert np.unique(restored['w']) == restored['count'] == 2 * step - 1


class Watched(dict):
    """A dict that records which threads read it."""

    readers = frozenset()

    def items(self):
        self.readers |= {threading.get_ident()}
        return super().items()


def test_extra_may_change_as_soon_as_save_returns(checkpointer):
    extra = Watched(next_row=5)
    checkpointer.save(1, place({'w': np.zeros((512, 8))}, make_mesh(1)), extra)
    extra['next_row'] = 6
    checkpointer.wait()
    assert checkpointer.read_manifest(1)['extra'] == {'next_row': 5}
    assert extra.readers == {threading.get_ident()}, 'read by the background thread'


def test_extra_that_is_not_json_fails_in_the_call(checkpointer):
    with pytest.raises(TypeError, match='not JSON serializable'):
        checkpointer.save(1, place({'w': np.zeros((8, 8))}, make_mesh(1)), {'key': object()})
    assert checkpointer.latest_step() is None


def test_only_the_newest_checkpoints_are_kept(checkpointer):
    for step in (1, 2, 3, 4):
        checkpointer.save(step, place(host_state(step), make_mesh(1)), {})
    checkpointer.wait()
    assert checkpointer.steps() == [3, 4]


def test_saving_a_step_twice_keeps_the_first(saved):
    saved.save(7, place(host_state(1), make_mesh(8)), {})
    saved.wait()
    state, extra = saved.restore(7, abstract_of(host_state(), make_mesh(8)))
    assert_bitwise_equal(state, host_state())
    assert extra == EXTRA


def test_an_older_step_is_saved_and_not_silently_skipped(saved):
    saved.save(5, place(host_state(5), make_mesh(1)), {})
    saved.wait()
    assert saved.steps() == [5, 7]


def test_parameters_are_restored_without_the_rest(saved):
    w, scale = host_state()['params/w'], host_state()['params/scale']
    state = {'trainable/a/w': w, 'frozen/b': scale, 'opt_state/mu': w}
    saved.save(8, place(state, make_mesh(8)), {})
    saved.wait()
    wanted = {'a/w': w, 'b': scale}
    restored = saved.restore_params(8, abstract_of(wanted, make_mesh(2, 4)))
    assert_bitwise_equal(restored, wanted)


def test_milestones_are_never_deleted(tmp_path):
    config = CheckpointConfig(keep=2)
    for milestones, steps in (((3, 9), [3, 5, 6]), ((), [5, 6])):
        made = Checkpointer(config, tmp_path / str(milestones), milestones=milestones)
        for step in (2, 3, 4, 5, 6):
            made.save(step, place(host_state(step), make_mesh(1)), {})
        made.close()
        assert made.steps() == steps


def test_future_milestones_need_room(tmp_path, monkeypatch):
    made = Checkpointer(CheckpointConfig(), tmp_path, milestones=(3, 9))
    monkeypatch.setattr(made._store.storage, 'free_bytes', lambda: 49 * 2**30)
    with pytest.raises(StorageError, match='need 50 GiB .5 of 10 GiB each., have 49 GiB'):
        made.check_room(10 * 2**30)
    made.save(3, place(host_state(), make_mesh(1)), {})
    made.wait()
    made.check_room(10 * 2**30)  # the next one, and the one at step 9
    with pytest.raises(StorageError, match='need 50 GiB'):
        made.check_room(10 * 2**30, at=2)  # the checkpoint of step 3 will be set aside
    made.close()


def test_a_reader_sees_new_steps_and_sweeps_nothing(saved, tmp_path):
    torn = Path(saved.root, '9', 'attempt', 'state')
    torn.mkdir(parents=True)
    (torn / 'd').write_text('half')
    reader = Reader(CheckpointConfig(), saved.root)
    saved.save(8, place(host_state(8), make_mesh(1)), {})
    saved.wait()
    assert reader.latest_step() == 8
    assert_bitwise_equal(
        reader.restore(8, abstract_of(host_state(), make_mesh(1)))[0], host_state(8)
    )
    assert torn.is_dir()
    nowhere = Reader(CheckpointConfig(), tmp_path / 'nowhere')
    assert nowhere.latest_step() is None
    assert not (tmp_path / 'nowhere').exists()


def files_below(root):
    return {path.relative_to(root).as_posix() for path in root.rglob('*') if path.is_file()}


def test_the_next_writer_sweeps_torn_saves_and_nothing_else(saved):
    saved.close()
    root = Path(saved.root)
    gone = {
        '9/0123456789ab/state/d', '9/0123456789ab/manifest.json', '7/0123456789ab/state/d',
        '7/.commit.json.0123abcd.tmp', '11/.commit.json.0123abcd.tmp',
    }  # fmt: skip
    mine = {'notes.txt', 'other/9/attempt', '7/notes.txt', '2026/thesis.txt', '2026/jan/a.txt'}
    for name in gone | mine:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text('half')
    before = files_below(root)
    fresh = Checkpointer(CheckpointConfig(), saved.root)
    assert before - files_below(root) == gone | {'lease/00000001.json'}
    assert files_below(root) - before == {'lease/00000002.json'}
    assert not (root / '9').exists() and not (root / '7' / '0123456789ab').exists()
    state, _ = fresh.restore(7, abstract_of(host_state(), make_mesh(1)))
    assert_bitwise_equal(state, host_state())
    fresh.close()


def test_empty_directories_of_a_killed_deletion_are_swept(saved):
    saved.close()
    root = Path(saved.root)
    for name in ('5/0123456789ab/state/d', '6', 'other/9'):
        (root / name).mkdir(parents=True)
    Checkpointer(CheckpointConfig(), saved.root).close()
    assert {path.name for path in root.iterdir()} == {'7', 'lease', 'other'}
    assert (root / 'other' / '9').is_dir()


def test_attempts_under_a_damaged_commit_are_not_swept(saved):
    saved.close()
    state = step_directory(saved)
    (state.parent / 'commit.json').write_text('{')
    before = files_below(state)
    Checkpointer(CheckpointConfig(), saved.root).close()
    assert files_below(state) == before


def test_all_differences_of_dtype_shape_and_name_are_reported_at_once(saved):
    wanted = host_state()
    wanted['params/w'] = wanted['params/w'].astype(np.float16)
    wanted['params/scales'] = wanted.pop('params/scale')
    wanted['rng'] = np.zeros(4, np.uint32)
    with pytest.raises(ConfigError) as caught:
        saved.restore(7, abstract_of(wanted, make_mesh(8)))
    message = str(caught.value)
    assert 'params/w: float32 [512, 128] in the checkpoint, float16 [512, 128] in' in message
    assert 'rng: uint32 [2] in the checkpoint, uint32 [4] in the run' in message
    assert 'params/scales: not in the checkpoint (nearest: params/scale)' in message
    assert 'params/scale: only in the checkpoint' in message


def test_a_subset_may_not_contain_a_missing_array(saved):
    subset = abstract_of({'bias': np.zeros(3)}, make_mesh(1))
    with pytest.raises(ConfigError, match='trainable/bias: not in the checkpoint'):
        saved.restore_params(7, subset)


def cut_the_largest_file(step):
    largest = max(step.glob('state/d/*'), key=lambda path: path.stat().st_size)
    with largest.open('r+b') as file:
        file.truncate(largest.stat().st_size // 2)


def flip_a_bit_of_the_largest_file(step):
    largest = max(step.glob('state/d/*'), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 16
    largest.write_bytes(content)


def remove_the_data(step):
    for path in step.glob('state/d/*'):
        path.unlink()


@pytest.mark.parametrize(
    'damage',
    [
        cut_the_largest_file,
        flip_a_bit_of_the_largest_file,
        remove_the_data,
        lambda step: (step / 'state' / 'manifest.ocdbt').unlink(),
        lambda step: (step / 'state' / 'manifest.ocdbt').write_text('{'),
        lambda step: (step / 'manifest.json').write_text('{'),
        lambda step: (step / 'manifest.json').unlink(),
        lambda step: (step.parent / 'commit.json').write_text('{'),
        lambda step: shutil.rmtree(step),
    ],
)
def test_a_damaged_checkpoint_is_named_in_one_line(saved, damage, capfd):
    damage(step_directory(saved))
    fresh = Reader(CheckpointConfig(), saved.root)
    with pytest.raises(DamagedError, match='checkpoint 7 in .*: digest mismatch: ') as caught:
        fresh.restore(7, abstract_of(host_state(), make_mesh(8)))
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 600
    assert 'Traceback' not in capfd.readouterr().err


def restore_newest(checkpointer):
    wanted = abstract_of(host_state(), make_mesh(8))
    return checkpointer.newest_whole(lambda step: (step, checkpointer.restore(step, wanted)[0]))


def test_after_a_damaged_checkpoint_the_previous_one_is_used_and_counted(saved, caplog):
    saved.save(8, place(host_state(8), make_mesh(8)), {})
    saved.wait()
    flip_a_bit_of_the_largest_file(step_directory(saved, 8))
    saved.events()
    step, state = restore_newest(saved)
    assert step == 7
    assert_bitwise_equal(state, host_state())
    assert saved.events() == [{'checkpoint/fallbacks': 1}]
    assert 'checkpoint 8 in' in caplog.text and 'digest mismatch: ' in caplog.text
    # The run reaches step 8 again and saves it again.
    saved.save(8, place(host_state(80), make_mesh(8)), {})
    saved.wait()
    step, state = restore_newest(saved)
    assert step == 8
    assert_bitwise_equal(state, host_state(80))


def test_a_lost_lease_file_does_not_make_old_commits_outrank_new_ones(saved):
    saved.close()
    again = Checkpointer(CheckpointConfig(), saved.root)
    again.save(8, place(host_state(8), make_mesh(8)), {}, must=True)
    again.close()
    shutil.rmtree(Path(saved.root, 'lease'))
    flip_a_bit_of_the_largest_file(step_directory(saved, 8))
    fresh = Checkpointer(CheckpointConfig(), saved.root)
    assert restore_newest(fresh)[0] == 7
    fresh.save(8, place(host_state(80), make_mesh(8)), {}, must=True)
    assert_bitwise_equal(restore_newest(fresh)[1], host_state(80))
    fresh.close()


def test_if_every_checkpoint_is_damaged_the_run_fails_instead_of_starting_afresh(saved):
    saved.save(8, place(host_state(8), make_mesh(8)), {})
    saved.wait()
    for step in (7, 8):
        flip_a_bit_of_the_largest_file(step_directory(saved, step))
    with pytest.raises(DataError, match='every checkpoint is damaged') as caught:
        restore_newest(saved)
    assert 'checkpoint 7 in' in str(caught.value) and 'checkpoint 8 in' in str(caught.value)


def test_a_step_under_way_is_invisible(checkpointer):
    checkpointer.save(1, place(host_state(), make_mesh(1)), {})
    assert checkpointer.latest_step() in (None, 1)
    torn = Path(checkpointer.root, '2', 'attempt')
    torn.mkdir(parents=True)
    (torn / 'manifest.json').write_text('{}')
    checkpointer.wait()
    assert checkpointer.latest_step() == 1


@contextlib.contextmanager
def a_full_disk():
    """Limits files to one page, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_save_is_logged_and_counted_and_the_next_one_works(saved, caplog):
    saved.events()
    with a_full_disk():
        saved.save(8, place(host_state(8), make_mesh(8)), {})
        saved.wait()
    assert 'checkpoint 8 was not saved (1 of 3 in a row)' in caplog.text
    assert 'File too large' in caplog.text
    assert saved.events() == [{'checkpoint/lost': 1}]
    assert saved.steps() == [7]
    assert not Path(saved.root, '8').exists(), 'a full disk gets fuller'
    saved.save(9, place(host_state(9), make_mesh(8)), {})
    saved.wait()
    assert_bitwise_equal(
        saved.restore(9, abstract_of(host_state(), make_mesh(8)))[0], host_state(9)
    )


def test_several_failed_saves_in_a_row_end_the_run(saved):
    with a_full_disk():
        for step in (8, 9, 10):
            saved.save(step, place(host_state(8), make_mesh(8)), {})
        with pytest.raises(StorageError, match='3 checkpoints in a row .* the newest one .* is 7'):
            saved.save(11, place(host_state(8), make_mesh(8)), {})


def test_a_save_that_must_succeed_retries_and_then_ends_the_run(saved, monkeypatch):
    state = place(host_state(8), make_mesh(8))
    write, calls = arrays.write, []

    def failing_once(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise ValueError('UNAVAILABLE: once')
        write(*arguments)

    monkeypatch.setattr(arrays, 'write', failing_once)
    saved.save(8, state, {}, must=True)
    assert saved.steps() == [7, 8] and len(calls) == 2
    with a_full_disk(), pytest.raises(StorageError, match='3 checkpoints in a row'):
        saved.save(9, state, {}, must=True)


def test_a_save_is_dropped_while_the_previous_one_is_stuck(saved, monkeypatch, caplog):
    state = place(host_state(8), make_mesh(8))
    monkeypatch.setattr('jaxfm.checkpoint.checkpointer.PATIENCE_SECONDS', 0.1)
    go_on, write = threading.Event(), arrays.write

    def stuck(*arguments):
        go_on.wait()
        write(*arguments)

    monkeypatch.setattr(arrays, 'write', stuck)
    saved.save(8, state, {})
    saved.save(9, state, {})
    assert 'checkpoint 9 was not saved' in caplog.text and '8 is still being' in caplog.text
    go_on.set()
    saved.wait()
    saved.save(10, state, {})
    saved.wait()
    assert saved.steps() == [8, 10]


def test_slow_saves_do_not_end_the_run(saved, monkeypatch):
    state = place(host_state(8), make_mesh(8))
    monkeypatch.setattr('jaxfm.checkpoint.checkpointer.PATIENCE_SECONDS', 0.01)
    go_on, write = threading.Event(), arrays.write

    def stuck(*arguments):
        go_on.wait()
        write(*arguments)

    monkeypatch.setattr(arrays, 'write', stuck)
    for step in range(8, 14):
        saved.save(step, state, {})
    go_on.set()
    saved.wait()
    assert saved.steps() == [7, 8]


def test_a_commit_whose_reply_is_lost_keeps_its_data(saved, monkeypatch, caplog):
    commit = Store.commit

    def lost(store, ready):
        commit(store, ready)
        raise UnavailableError('no reply')

    monkeypatch.setattr(Store, 'commit', lost)
    saved.save(8, place(host_state(8), make_mesh(8)), {})
    saved.wait()
    assert 'checkpoint 8 was not saved' in caplog.text
    monkeypatch.undo()
    step, state = restore_newest(saved)
    assert step == 8
    assert_bitwise_equal(state, host_state(8))


def test_a_run_that_is_replaced_while_it_writes_commits_nothing(saved, monkeypatch, caplog):
    """It slept, so to say, and looks at the lease once more before it commits."""
    write, storage = arrays.write, open_storage(saved.root)

    def write_and_be_replaced(*arguments):
        write(*arguments)
        record = Record(2, Holder('elsewhere', 17, '1', 'its boot'), seconds=60)
        storage.write('lease/00000002.json', record.to_json())

    monkeypatch.setattr(arrays, 'write', write_and_be_replaced)
    saved.save(8, place(host_state(8), make_mesh(8)), {})
    saved.wait()
    assert 'checkpoint 8 was not saved' in caplog.text
    assert 'was taken over by process 17 on elsewhere' in caplog.text
    assert list(storage.list('8')) == []


def test_an_unrelated_error_is_not_reported_as_damage(saved, monkeypatch):
    def exhausted(*_):
        raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory')

    monkeypatch.setattr(arrays, 'read', exhausted)
    with pytest.raises(jax.errors.JaxRuntimeError, match='RESOURCE_EXHAUSTED'):
        restore_newest(saved)


def test_a_save_that_times_out_fails_and_never_commits(tmp_path, monkeypatch, caplog):
    made = Checkpointer(CheckpointConfig(timeout_seconds=0.3), tmp_path)
    write = arrays.write

    def slow(*arguments):
        write(*arguments)
        time.sleep(0.5)

    monkeypatch.setattr(arrays, 'write', slow)
    made.save(1, place(host_state(), make_mesh(1)), {})
    made.wait()
    assert 'longer than checkpoint.timeout_seconds' in caplog.text
    assert made.steps() == []
    made.close()


def test_saving_is_an_allowed_transfer_inside_the_training_loop(saved):
    state = place(host_state(8), make_mesh(8))
    with jax.transfer_guard('disallow'):
        saved.save(8, state, EXTRA)
        saved.wait()
    assert saved.steps() == [7, 8]


def test_too_little_space_is_refused_with_the_numbers(saved, tmp_path):
    free = shutil.disk_usage(tmp_path).free
    empty = Checkpointer(CheckpointConfig(), tmp_path / 'empty')
    empty.check_room(free // 4)
    with pytest.raises(
        StorageError, match=r'need \d+ GiB \(3 of \d+ GiB each\), have [\d.]+ GiB'
    ) as e:
        empty.check_room(free // 4 * 3 + 2**38)
    assert empty.root in str(e.value)
    saved.check_room(free // 5 * 2)  # besides the existing one
    empty.close()


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(PermissionDeniedError, match='/sys/jaxfm cannot be written'):
        Checkpointer(CheckpointConfig(), '/sys/jaxfm')
    (tmp_path / 'file').write_text('')
    for path in (tmp_path / 'file', tmp_path / 'file' / 'below'):
        with pytest.raises(ConfigError, match='is not a directory'):
            Checkpointer(CheckpointConfig(), path)
    with pytest.raises(ConfigError, match='want a directory path or s3://'):
        Checkpointer(CheckpointConfig(directory='gs://bucket/run'), tmp_path)


def test_the_config_may_name_another_directory(tmp_path):
    config = CheckpointConfig(directory=str(tmp_path / 'elsewhere'))
    made = Checkpointer(config, tmp_path / 'here')
    assert made.root == str(tmp_path / 'elsewhere')
    made.close()


def test_a_partly_deleted_step_is_harmless(saved):
    saved.save(8, place(host_state(8), make_mesh(1)), {})
    saved.wait()
    Path(saved.root, '7', 'commit.json').unlink()
    fresh = Checkpointer(CheckpointConfig(), saved.root)
    assert not Path(saved.root, '7').exists()
    state, _ = fresh.restore(fresh.latest_step(), abstract_of(host_state(), make_mesh(1)))
    assert_bitwise_equal(state, host_state(8))
    fresh.save(9, place(host_state(9), make_mesh(1)), {})
    fresh.close()
    assert fresh.steps() == [8, 9]


def test_the_manifest_describes_the_checkpoint(tmp_path):
    made = Checkpointer(CheckpointConfig(), tmp_path, about={'config': {'seed': 3}})
    made.save(7, place(host_state(7), make_mesh(2, 4)), EXTRA)
    made.wait()
    manifest = made.read_manifest(7)
    made.close()
    assert manifest['step'] == 7 and manifest['config'] == {'seed': 3}
    assert manifest['extra'] == EXTRA
    assert manifest['mesh'] == {'fsdp': 2, 'tensor': 4} and manifest['processes'] == 1
    entry = manifest['arrays']['params/w']
    assert entry['shape'] == [512, 128] and entry['dtype'] == 'float32'
    assert manifest['arrays']['step']['value'] == 7
    assert len(manifest['arrays']['rng']['value']) == 2
    assert all('size' in file for file in manifest['files'].values())
    assert 'sha256' in manifest['files']['state/manifest.ocdbt']


def test_large_arrays_are_cut_into_chunks_that_no_two_shards_share(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, 'CHUNK_BYTES', 1000)
    for part, itemsize in (((512, 128), 4), ((7, 11), 4), ((1, 997), 2), ((6, 5, 4), 8), ((), 4)):
        for split in (1, 2):
            chunk = arrays._chunk(part, tuple(split * size for size in part), itemsize)
            assert np.prod(chunk) * itemsize <= 1000 or (split == 2 and 997 in part)
            assert split == 1 or all(size % n == 0 for size, n in zip(part, chunk, strict=True))
            assert np.prod(chunk) * itemsize >= min(1000 // 8, np.prod(part) * itemsize)
    made = Checkpointer(CheckpointConfig(), tmp_path)
    made.save(7, place(host_state(), make_mesh(2, 4)), {})
    made.wait()
    state, _ = made.restore(7, abstract_of(host_state(), make_mesh(8)))
    assert_bitwise_equal(state, host_state())
    made.close()

"""The local tier: each host's disk holds the shards of its process."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxfm.checkpoint import CheckpointConfig, LocalConfig, arrays
from jaxfm.checkpoint.checkpointer import Checkpointer
from jaxfm.checkpoint.reader import Reader
from jaxfm.errors import StorageError
from tests.runs import PATIENCE


def mesh_of(count):
    axis_types = (AxisType.Explicit,)
    return jax.make_mesh((count,), ('fsdp',), axis_types=axis_types, devices=jax.devices()[:count])


def state_at(step, count=8):
    values = np.random.default_rng(step).standard_normal((8, 10), dtype=np.float32)
    sharding = NamedSharding(mesh_of(count), P('fsdp'))
    return {'w': jax.device_put(values, sharding)}


def abstract(count=8):
    sharding = NamedSharding(mesh_of(count), P('fsdp'))
    return {'w': jax.ShapeDtypeStruct((8, 10), np.float32, sharding=sharding)}


@pytest.fixture
def config(tmp_path):
    local = LocalConfig(directory=str(tmp_path / 'local'), every=2, keep=2)
    return CheckpointConfig(directory=str(tmp_path / 'durable'), every=6, keep=2, local=local)


def save_until(config, last):
    checkpointer = Checkpointer(config, '')
    for step in range(1, last + 1):
        if checkpointer.is_due(step):
            checkpointer.save(step, state_at(step), {'step': step})
    checkpointer.wait()
    return checkpointer


def newest(checkpointer, count=8):
    wanted = abstract(count)
    return checkpointer.newest_whole(lambda step: (step, checkpointer.restore(step, wanted)))


def assert_newest_is(checkpointer, step, count=8):
    found, (state, extra) = newest(checkpointer, count)
    assert found == step and extra == {'step': step}
    np.testing.assert_array_equal(state['w'], state_at(step)['w'])


def steps_below(directory):
    return sorted(int(path.parent.name) for path in Path(directory).rglob('commit.json'))


def test_each_tier_has_its_cadence_and_the_newest_step_of_both_is_restored(config):
    checkpointer = save_until(config, 10)
    assert steps_below(config.directory) == [6]
    assert steps_below(config.local.directory) == [8, 10]  # 2 and 4 were saved and deleted before
    assert_newest_is(checkpointer, 10)
    checkpointer.close()
    fresh = Checkpointer(config, '')
    assert_newest_is(fresh, 10)
    fresh.close()


def test_the_last_save_is_durable_whatever_the_cadence(config):
    checkpointer = save_until(config, 4)
    checkpointer.save(5, state_at(5), {'step': 5}, must=True)
    assert steps_below(config.directory) == [5]
    checkpointer.close()


def test_without_the_local_disk_the_durable_step_is_restored(config):
    save_until(config, 10).close()
    shutil.rmtree(config.local.directory)
    fresh = Checkpointer(config, '')
    assert_newest_is(fresh, 6)
    fresh.close()


def test_a_damaged_local_step_is_named_and_the_one_before_restored(config, caplog):
    save_until(config, 10).close()
    (data,) = Path(config.local.directory).rglob('10/*/state/d/*')
    content = bytearray(data.read_bytes())
    content[content.index(np.asarray(state_at(10)['w'])[3].tobytes())] ^= 1
    data.write_bytes(content)
    fresh = Checkpointer(config, '')
    assert_newest_is(fresh, 8)
    assert 'checkpoint 10 in' in caplog.text and 'digest mismatch: state/d/' in caplog.text
    fresh.close()


def test_another_mesh_restores_the_durable_step(config, caplog):
    """A local disk holds the shards of one mesh; another mesh may need others."""
    save_until(config, 10).close()
    fresh = Checkpointer(config, '')
    assert_newest_is(fresh, 6, count=2)
    assert 'the shards of another mesh' in caplog.text
    fresh.close()


def test_stale_local_steps_of_a_host_that_was_away_are_ignored(config):
    save_until(config, 10).close()
    away = Path(config.local.directory)
    away.rename(away.with_name('away'))
    elsewhere = Checkpointer(config, '')  # restores step 6 and continues from there
    elsewhere.save(9, state_at(90), {'step': 9}, must=True)
    elsewhere.close()
    shutil.rmtree(away)
    away.with_name('away').rename(away)
    back = Checkpointer(config, '')
    assert newest(back)[0] == 9
    back.close()


def test_after_a_fallback_the_local_tier_keeps_the_new_steps(config):
    save_until(config, 10).close()
    for data in Path(config.local.directory).rglob('state/d/*'):
        data.write_bytes(b'')
    fresh = Checkpointer(config, '')
    assert_newest_is(fresh, 6)
    fresh.save(8, state_at(8), {'step': 8})
    fresh.wait()
    assert steps_below(config.local.directory) == [8]
    fresh.close()
    assert_newest_is(Reader(config, ''), 8)


def test_steps_of_another_mesh_make_room_for_new_ones(config):
    save_until(config, 10).close()
    fresh = Checkpointer(config, '')
    assert_newest_is(fresh, 6, count=2)
    fresh.save(8, state_at(8, count=2), {'step': 8})
    fresh.wait()
    assert steps_below(config.local.directory) == [8]
    fresh.close()


def test_local_saves_neither_hide_failing_durable_ones_nor_wait_for_them(config, monkeypatch):
    durable = Path(config.directory)
    checkpointer = Checkpointer(config, '')
    write = arrays.write

    def failing(base, *rest):
        if base['path'].startswith(str(durable)):
            raise ValueError('UNAVAILABLE: no answer')
        write(base, *rest)

    monkeypatch.setattr(arrays, 'write', failing)
    with pytest.raises(StorageError, match='3 checkpoints in a row'):
        for step in range(2, 40, 2):
            checkpointer.save(step, state_at(step), {'step': step})
    assert step == 24
    checkpointer.close()


def test_a_failing_local_disk_does_not_end_the_run(config, monkeypatch, caplog):
    checkpointer = Checkpointer(config, '')
    write = arrays.write

    def failing(base, *rest):
        if base['path'].startswith(config.local.directory):
            raise ValueError('INTERNAL: bad disk')
        write(base, *rest)

    monkeypatch.setattr(arrays, 'write', failing)
    for step in range(2, 26, 2):
        checkpointer.save(step, state_at(step), {'step': step})
    checkpointer.wait()
    assert checkpointer.steps() == [18, 24]
    assert 'checkpoint 22 was not saved (8 in a row): INTERNAL: bad disk' in caplog.text
    checkpointer.close()


def test_runs_share_a_local_directory(config, tmp_path):
    one = save_until(config, 10)
    two = save_until(config.model_copy(update={'directory': str(tmp_path / 'other')}), 4)
    assert_newest_is(one, 10)
    assert_newest_is(two, 4)
    one.close()
    two.close()


ONE_OF_TWO = """
import sys
import jax, numpy as np
jax.config.update('jax_num_cpu_devices', 2)
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
root, port, rank, mode = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
jax.distributed.initialize(f'localhost:{port}', 2, rank)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxfm.checkpoint import CheckpointConfig, LocalConfig
from jaxfm.checkpoint.checkpointer import Checkpointer

mesh = jax.make_mesh((4,), ('fsdp',), axis_types=(AxisType.Explicit,))
specs = {'w': P('fsdp'), 'all': P()}
values = {'w': np.arange(80, dtype=np.float32).reshape(8, 10), 'all': np.arange(5, dtype=np.int32)}
wanted = {
    name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=NamedSharding(mesh, specs[name]))
    for name, value in values.items()
}

def state(step):
    return {
        name: jax.make_array_from_callback(
            value.shape, wanted[name].sharding, lambda index: value[index] + step
        )
        for name, value in values.items()
    }

# Every host has its own disk.
local = LocalConfig(directory=f'{root}/host{rank}', every=1, keep=2)
config = CheckpointConfig(directory=f'{root}/durable', every=3, local=local)
checkpointer = Checkpointer(config, '')
if mode == 'save':
    for step in range(1, 6):
        checkpointer.save(step, state(step), {'step': step})
    checkpointer.wait()
found, restored = checkpointer.newest_whole(
    lambda step: (step, checkpointer.restore(step, wanted)[0])
)
for name, value in values.items():
    for shard in restored[name].addressable_shards:
        np.testing.assert_array_equal(shard.data, value[shard.index] + found)
print(found)
checkpointer.close()
"""


def run_two(root, mode):
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = str(server.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', ONE_OF_TWO, str(root), port, str(rank), mode],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=PATIENCE) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [int(out.split()[-1]) for out, _ in outputs]


def test_processes_use_their_own_disks_and_agree_on_the_steps_all_have(tmp_path):
    assert run_two(tmp_path, 'save') == [5, 5]
    for host in ('host0', 'host1'):
        assert steps_below(tmp_path / host) == [4, 5]
    # Process 1 was killed before its commit of step 5.
    (commit,) = (tmp_path / 'host1').rglob('5/commit.json')
    commit.unlink()
    assert run_two(tmp_path, 'restore') == [4, 4]
    # A disk is gone with its host.
    shutil.rmtree(tmp_path / 'host1')
    assert run_two(tmp_path, 'restore') == [3, 3]
    manifest = json.loads(next((tmp_path / 'durable').rglob('3/*/manifest.json')).read_text())
    assert manifest['processes'] == 2


def test_a_save_that_waited_goes_to_the_tier_in_which_it_was_due(config):
    checkpointer = Checkpointer(config, '')
    checkpointer.save(7, state_at(7), {'step': 7}, due=6)
    checkpointer.save(9, state_at(9), {'step': 9}, due=8)
    checkpointer.save(13, state_at(13), {'step': 13}, due=10)  # 12 is a step of the durable tier
    checkpointer.wait()
    assert steps_below(config.directory) == [7, 13]
    assert steps_below(config.local.directory) == [9]
    checkpointer.close()


def test_steps_of_both_tiers_are_set_aside(config):
    checkpointer = save_until(config, 10)
    assert checkpointer.set_aside(6) == [6, 8, 10]
    assert checkpointer.steps() == [] and checkpointer.latest_step() is None
    assert [event for event in checkpointer.events() if 'checkpoint/set_aside' in event] == [
        {'checkpoint/set_aside': step} for step in (6, 8, 10)
    ]
    checkpointer.save(6, state_at(60), {'step': 6})
    checkpointer.close()
    fresh = Checkpointer(config, '')
    np.testing.assert_array_equal(newest(fresh)[1][0]['w'], state_at(60)['w'])
    # The next start empties the hosts' own disks, and keeps what is on the durable tier.
    assert not list(Path(config.local.directory).rglob('manifest.json'))
    assert len(list(Path(config.directory).rglob('manifest.json'))) == 2
    fresh.close()

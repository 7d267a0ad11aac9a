"""The checkpoint tool, on a disk and on S3: what it lists, verifies and deletes."""

import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxfm.checkpoint import CheckpointConfig
from jaxfm.checkpoint.checkpointer import Checkpointer
from jaxfm.checkpoint.store import Commit, Store
from jaxfm.config.load import load_config, write_config
from jaxfm.storage import open_storage
from tests.conftest import ROOT
from tools import checkpoint

HOLD = """
import sys, time
from jaxfm.storage.lease import Lease
from jaxfm.storage import open_storage

Lease(open_storage(sys.argv[1]), seconds=1).acquire(dict)
print('held', flush=True)
time.sleep(600)
"""


@pytest.fixture(params=['disk', 's3'])
def place(request, tmp_path) -> str:
    """A place for checkpoints that does not exist yet."""
    if request.param == 'disk':
        return str(tmp_path / 'checkpoints')
    request.getfixturevalue('s3_environment')
    return f's3://bucket/{tmp_path.name}/checkpoints'


@pytest.fixture
def storage(place):
    return open_storage(place)


def state_of(step):
    """Four arrays; the large ones are split over all devices."""
    random = np.random.default_rng(step)
    mesh = jax.make_mesh((8,), ('fsdp',))
    split, whole = NamedSharding(mesh, jax.P('fsdp')), NamedSharding(mesh, jax.P())
    weights = random.standard_normal((64, 300, 100), dtype=np.float32)
    return {
        'trainable/w': jax.device_put(weights, split),
        'opt_state/mu': jax.device_put(weights.astype(jax.numpy.bfloat16), split),
        'trainable/scale': jax.device_put(weights[0, 0], whole),
        'step': jax.device_put(np.int32(step), whole),
    }


def save(place, *steps):
    made = Checkpointer(CheckpointConfig(keep=9), place)
    for step in steps:
        made.save(step, state_of(step), {'phase': 'pretrain'})
        made.wait()
    made.close()


@pytest.fixture
def saved(place):
    save(place, 5, 10)
    return Store(open_storage(place))


def rows(shown: str) -> dict[int, list[str]]:
    """The table of `ls`: {step: the other cells}."""
    lines = [line.split() for line in shown.splitlines()]
    return {int(line[0]): line[1:] for line in lines if line and line[0].isdecimal()}


def flip_a_bit(storage, name):
    content = bytearray(storage.read(name))
    content[len(content) // 2] ^= 16
    storage.write(name, bytes(content))


def largest_file(storage, directory):
    """The file that contains most of a step's arrays."""
    found = storage.list(f'{directory}/state/d')
    return max(found, key=lambda name: found[name].size)


def plant_a_fenced_commit(store, step):
    """Commits a step with the lease of an earlier writer, after its successor has started."""
    save(store.storage.root)  # acquires and releases the lease
    digest = store.write_manifest(step, 'fedcba987654', {'epoch': 1, 'arrays': {}})
    store.commit(Commit(step, 'fedcba987654', 1, digest))


def test_ls_shows_every_save_and_what_became_of_it(saved, place, capsys):
    plant_a_fenced_commit(saved, 15)
    saved.storage.write('20/0123456789ab/state/d/half', bytes(5000))
    saved.storage.write('5/commit.json', b'{')
    flip_a_bit(saved.storage, f'{saved.commits()[10].directory}/manifest.json')
    assert checkpoint.main(['ls', place]) == 0
    shown = capsys.readouterr().out
    found = rows(shown)
    assert {step: cells[0] for step, cells in found.items()} == {
        5: 'damaged', 10: 'damaged', 15: 'fenced', 20: 'torn',
    }  # fmt: skip
    assert re.search(r'20 +torn +0123456789ab +5 kB', shown)
    assert ', released' in shown
    save(place, 25)
    assert checkpoint.main(['ls', place]) == 0
    shown = capsys.readouterr().out
    attempt = saved.commits()[25].attempt
    assert re.search(rf'25 +committed +{attempt} +\d.* MB +\d+ s +4 +fsdp=8 +1 +pretrain', shown)


@pytest.fixture
def holder(place):
    """Another process that holds the lease."""
    process = subprocess.Popen(
        [sys.executable, '-c', HOLD, place],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
    )
    with process:
        assert process.stdout.readline() == 'held\n'
        yield process
        process.kill()


def test_while_a_run_writes_nothing_is_swept(saved, holder, place, capsys):
    saved.storage.write('20/0123456789ab/state/d/half', bytes(5000))
    before = saved.storage.list()
    assert checkpoint.main(['sweep', place]) == 73
    assert f'is written by process {holder.pid} on ' in capsys.readouterr().err
    assert checkpoint.main(['sweep', place, '--dry_run']) == 0
    assert checkpoint.main(['ls', place]) == 0
    shown = capsys.readouterr().out
    assert rows(shown)[20][0] == 'unfinished'
    assert f'process {holder.pid} on ' in shown and 'still held' in shown
    assert saved.storage.list().keys() == before.keys()


def test_after_a_kill_nobody_holds_the_lease(saved, holder, place, capsys):
    holder.kill()
    holder.wait()
    saved.storage.write('20/0123456789ab/state/d/half', bytes(5000))
    assert checkpoint.main(['ls', place]) == 0
    shown = capsys.readouterr().out
    assert rows(shown)[20][0] == 'torn' and 'ended without releasing it' in shown
    assert checkpoint.main(['sweep', place]) == 0


def test_a_sweep_removes_exactly_the_orphans(saved, place, capsys):
    plant_a_fenced_commit(saved, 15)
    attempt = saved.commits()[5].attempt
    mine = ['notes.txt', 'other/9/a', '5/notes.txt', '2026/thesis.txt', f'{attempt}/state/x']
    torn = ['20/0123456789ab/state/d/half', '10/0123456789ab/manifest.json']
    for name in mine + torn:
        saved.storage.write(name, bytes(1000))
    orphans = {*torn, '15/fedcba987654/manifest.json', '15/commit.json'}
    before = saved.storage.list()

    assert checkpoint.main(['sweep', place, '--dry_run']) == 0
    shown = capsys.readouterr().out
    assert saved.storage.list() == before
    assert '4 orphans, ' in shown and 'would be deleted' in shown
    assert '20/0123456789ab  1 kB' in shown

    assert checkpoint.main(['sweep', place]) == 0
    assert capsys.readouterr().out == shown.replace('would be deleted', 'deleted')
    after = saved.storage.list()
    changed = before.keys() ^ after.keys()
    assert {name for name in changed if not name.startswith('lease/')} == orphans
    assert checkpoint.main(['sweep', place]) == 0
    assert '0 orphans' in capsys.readouterr().out
    assert checkpoint.main(['verify', place]) == 0


def test_where_only_torn_steps_were_nothing_is_left(storage, place):
    storage.write('20/0123456789ab/state/d/half', bytes(1000))
    assert checkpoint.main(['verify', place]) == 66
    assert checkpoint.main(['sweep', place]) == 0
    assert not storage.list()
    assert checkpoint.main(['sweep', place]) == 66


def test_every_step_is_read_back(saved, place, capsys, monkeypatch):
    monkeypatch.setattr('jaxfm.checkpoint.arrays.CHUNK_BYTES', 50_000)
    save(place, 15)
    assert checkpoint.main(['verify', place]) == 0
    assert re.findall(r'step (\d+): whole', capsys.readouterr().out) == ['5', '10', '15']
    assert checkpoint.main(['verify', place, '--step', '10']) == 0
    assert re.findall(r'step (\d+): whole', capsys.readouterr().out) == ['10']
    assert checkpoint.main(['verify', place, '--step', '11']) == 66
    assert 'no checkpoint 11' in capsys.readouterr().err


def test_a_flipped_bit_is_found_wherever_it_is_and_all_steps_are_looked_at(saved, place, capsys):
    save(place, 15, 20, 25, 30)
    storage, commits = saved.storage, saved.commits()
    flip_a_bit(storage, largest_file(storage, commits[5].directory))
    flip_a_bit(storage, f'{commits[15].directory}/state/manifest.ocdbt')
    flip_a_bit(storage, f'{commits[20].directory}/manifest.json')
    storage.remove(f'{commits[30].directory}/state/manifest.ocdbt')
    assert checkpoint.main(['verify', place]) == 65
    shown, said = capsys.readouterr()
    states = dict(re.findall(r'step (\d+): (\w+)', shown))
    assert states == {
        '5': 'damaged', '10': 'whole', '15': 'damaged', '20': 'damaged', '25': 'whole',
        '30': 'damaged',
    }  # fmt: skip
    assert said == f'error: 4 of 6 checkpoints in {place} are damaged: 5, 15, 20, 30\n'
    damages = dict(re.findall(r'step (\d+): damaged.*\n((?:  .*\n)+)', shown))
    assert re.fullmatch(r'  digest mismatch: array (trainable/w|opt_state/mu).*\n', damages['5'])
    assert damages['15'].startswith('  digest mismatch: state/manifest.ocdbt\n')
    manifest = f'{commits[20].directory}/manifest.json'
    assert damages['20'] == f'  digest mismatch: {manifest}\n'
    assert 'digest mismatch: state/manifest.ocdbt is missing' in damages['30']
    assert damages['30'].count('cannot be read') == 4
    assert checkpoint.main(['verify', place, '--step', '10']) == 0
    assert checkpoint.main(['verify', place, '--step', '5']) == 65


def test_a_step_that_its_run_deletes_meanwhile_is_not_called_damaged(
    saved, place, capsys, monkeypatch
):
    differences = Store.differences

    def late(store, commit, manifest):
        if commit.step == 5:
            store.remove(commit, store.storage.list())
        return differences(store, commit, manifest)

    monkeypatch.setattr(Store, 'differences', late)
    assert checkpoint.main(['verify', place]) == 0
    assert 'step 5: deleted by its run meanwhile\nstep 10: whole' in capsys.readouterr().out


def test_the_work_directory_of_a_run_says_where_its_checkpoints_are(saved, tiny, tmp_path, capsys):
    run = tmp_path / 'run'
    run.mkdir()
    override = f'checkpoint.directory={saved.storage.root}'
    write_config(load_config(str(tiny.config), [override]), run / 'config.json')
    assert checkpoint.main(['ls', str(run)]) == 0
    assert list(rows(capsys.readouterr().out)) == [5, 10]


@pytest.mark.parametrize(
    'arguments, code, message',
    [
        (['ls'], 64, 'PATH'),
        (['lst', 'DIR'], 64, 'invalid choice'),
        (['verify', 'DIR', '--step', 'x'], 64, '--step'),
        (['ls', 'gs://bucket/run'], 64, 'must be a directory or s3://'),
        (['ls', 's3://'], 64, 'must be a directory or s3://'),
        (['ls', 'DIR/gone/deep'], 66, 'the nearest parent is DIR\n'),
        (['ls', 'DIR'], 66, 'DIR holds no checkpoints'),
        (['verify', 'DIR'], 66, 'DIR holds no checkpoints'),
        (['sweep', 'DIR'], 66, 'DIR holds no checkpoints'),
        (['ls', 'DIR/file'], 66, 'no such directory'),
    ],
)
def test_mistakes_are_told(tmp_path, capsys, arguments, code, message):
    (tmp_path / 'file').write_text('')
    arguments = [argument.replace('DIR', str(tmp_path)) for argument in arguments]
    assert checkpoint.main(arguments) == code
    assert message.replace('DIR', str(tmp_path)) in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ['file']


def test_s3_that_refuses_or_does_not_answer_is_told(s3_environment, monkeypatch, capsys):
    place = 's3://bucket/told/checkpoints'
    save(place, 5)
    monkeypatch.setattr('jaxfm.storage.s3.TRIES', 1)
    assert checkpoint.main(['ls', 's3://no-such-bucket/x']) == 66
    assert checkpoint.main(['ls', 's3://bucket/told/elsewhere']) == 66
    monkeypatch.setenv('AWS_ACCESS_KEY_ID', 'reader')
    assert checkpoint.main(['verify', place]) == 0
    assert checkpoint.main(['sweep', place]) == 77
    monkeypatch.setenv('AWS_ACCESS_KEY_ID', 'other')
    assert checkpoint.main(['ls', place]) == 77
    monkeypatch.setenv('AWS_ENDPOINT_URL', 'http://127.0.0.1:9')
    assert checkpoint.main(['ls', place]) == 69
    assert 'cannot be reached' in capsys.readouterr().err


def test_what_cannot_be_listed_is_not_empty(tmp_path, capsys, monkeypatch):
    place = tmp_path / 'checkpoints'
    save(place, 5)
    scandir = os.scandir

    def refusing(path):
        if str(path) == str(place):
            raise PermissionError(13, 'Permission denied', path)
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refusing)
    assert checkpoint.main(['verify', str(place)]) == 77
    assert 'cannot be read: Permission denied' in capsys.readouterr().err


def test_the_lease_says_how_long_to_wait_for_its_holder(tmp_path):
    save(tmp_path, 5)
    (lease,) = tmp_path.glob('lease/*.json')
    assert json.loads(lease.read_text())['seconds'] == CheckpointConfig().lease_seconds


def test_what_was_set_aside_is_listed_kept_and_taken_back(saved, place, capsys):
    commit = saved.commits()[10]
    saved.set_aside(commit)
    assert list(saved.commits()) == [5]
    assert checkpoint.main(['sweep', place]) == 0
    assert '0 orphans' in capsys.readouterr().out
    assert checkpoint.main(['ls', place]) == 0
    assert rows(capsys.readouterr().out)[10][:3] == ['set', 'aside', commit.attempt]

    assert checkpoint.main(['take_back', place, '--step', '5']) == 66
    assert 'no checkpoint 5 was set aside' in (error := capsys.readouterr().err)
    assert error.endswith('set aside: 10\n')
    assert checkpoint.main(['take_back', place, '--step', '10']) == 0
    taken = saved.commits()[10]
    assert (taken.attempt, taken.digest) == (commit.attempt, commit.digest)
    assert not [name for name in saved.storage.list('10') if 'set_aside' in name]
    assert checkpoint.main(['verify', place]) == 0


def test_a_step_that_was_saved_again_is_not_replaced_and_the_other_can_be_deleted(
    saved, place, capsys
):
    first = saved.commits()[10]
    saved.set_aside(first)
    save(place, 10)
    second = saved.commits()[10]
    assert checkpoint.main(['take_back', place, '--step', '10']) == 65
    assert 'was saved again since' in capsys.readouterr().err
    assert saved.commits()[10] == second

    saved.set_aside(second)
    take_back = ['take_back', place, '--step', '10', '--attempt']
    assert checkpoint.main([*take_back, 'f' * 12]) == 66
    error = capsys.readouterr().err
    assert 'no attempt ffffffffffff of checkpoint 10' in error
    assert first.attempt in error and second.attempt in error
    assert checkpoint.main([*take_back, first.attempt]) == 0  # not the newest
    assert saved.commits()[10].attempt == first.attempt
    saved.set_aside(first)
    assert checkpoint.main(take_back[:-1]) == 0
    second = saved.commits()[10]
    assert second.attempt != first.attempt

    saved.remove(second, saved.storage.list())
    names = saved.storage.list('10')
    assert names and all(first.attempt in name for name in names)
    assert checkpoint.main(['sweep', place, '--set_aside']) == 0
    assert '2 orphans' in capsys.readouterr().out
    assert not saved.storage.list('10') and list(saved.commits()) == [5]


def test_the_newest_attempt_is_known_without_the_times_of_its_files(tmp_path, capsys):
    store = Store(open_storage(tmp_path))
    for _ in range(2):
        save(tmp_path, 10)
        newest = store.commits()[10]
        store.set_aside(newest)
    for path in (tmp_path / newest.directory).rglob('*'):
        os.utime(path, (1, 1))  # a copy, or S3, which counts whole seconds
    assert checkpoint.main(['take_back', str(tmp_path), '--step', '10']) == 0
    assert store.commits()[10].attempt == newest.attempt


def test_a_damaged_marker_is_told(saved, place, capsys):
    commit = saved.commits()[10]
    saved.set_aside(commit)
    saved.storage.write(f'10/set_aside.{commit.attempt}.json', b'{"torn')
    assert checkpoint.main(['take_back', place, '--step', '10']) == 65
    assert 'digest mismatch: 10/set_aside' in capsys.readouterr().err

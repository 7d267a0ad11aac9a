"""Whatever is damaged in the newest checkpoint, a restore returns a saved state, bit for bit.

Bits are flipped and objects truncated or deleted, for every kind of object in a checkpoint, on a
disk and on a real S3 server. The last tests disable the verification and expect failures.
"""

import dataclasses
import itertools
import json
import random
import re
import secrets

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
from jaxfm.storage import open_storage

TRIALS = 20
OLD, NEW = 1, 2
# Every object of the newest step is of one of these kinds, and so is the lease.
KINDS = {
    'commit': r'2/commit\.json',
    'manifest': r'2/\w+/manifest\.json',
    'tree for Orbax': r'2/\w+/state/_METADATA',
    'database': r'2/\w+/state/manifest\.ocdbt',
    'index': r'2/\w+/state/d/\w+',
    'database of a process': r'2/\w+/state/process_\d/manifest\.ocdbt',
    'data of a process': r'2/\w+/state/process_\d/d/\w+',
    'lease': r'lease/\d+\.json',
}


def state_of(step):
    """About 1 MB, in arrays that are sharded over the mesh or replicated."""
    draw = np.random.default_rng(step)
    weights = draw.standard_normal((512, 256), dtype=np.float32)
    return {
        'step': np.int32(step),
        'rng': draw.integers(0, 2**32, 2, dtype=np.uint32),
        'trainable/w': weights,
        'trainable/scale': weights[0].astype(jnp.bfloat16),
        'opt_state/mu': (weights * 2).astype(jnp.bfloat16),
        'opt_state/nu': weights * 3,
    }


def extra_of(step):
    return {'source': {'next_row': 1000 + step}, 'seconds': step / 3}


def sharding_of(leaf):
    mesh = jax.make_mesh((8,), ('fsdp',), axis_types=(AxisType.Explicit,))
    return NamedSharding(mesh, P('fsdp') if leaf.ndim == 2 else P())


def write_as_two(write):
    """Makes `arrays.write` act as two processes: each writes half of the pieces; then merge."""

    def halved(base, parts, deadline):
        bases = [base | {'path': f'{base["path"]}process_{rank}/'} for rank in (0, 1)]
        for rank, own in enumerate(bases):
            halves = {
                name: dataclasses.replace(part, pieces=part.pieces[rank::2])
                for name, part in parts.items()
            }
            write(own, halves, deadline)
        arrays.merge(base, bases, deadline)

    return halved


def save_two_steps(root, monkeypatch, processes=2):
    """Saves two steps in one run; another run then takes the lease and inherits both."""
    # Share one S3 client: making one takes longer than a restore.
    storage = open_storage(root)
    monkeypatch.setattr('jaxfm.checkpoint.reader.open_storage', lambda place: storage)
    # Data files of a real state are large, so only the fingerprints of their arrays protect them.
    monkeypatch.setattr('jaxfm.checkpoint.store.SMALL_BYTES', 10_000)
    monkeypatch.setattr(arrays, 'FILE_BYTES', 100_000)
    with monkeypatch.context() as patch:
        if processes == 2:
            patch.setattr(arrays, 'write', write_as_two(arrays.write))
        checkpointer = Checkpointer(CheckpointConfig(), root)
        for step in (OLD, NEW):
            state = {
                name: jax.device_put(leaf, sharding_of(leaf))
                for name, leaf in state_of(step).items()
            }
            checkpointer.save(step, state, extra_of(step), must=True)
        checkpointer.close()
    Checkpointer(CheckpointConfig(), root).close()
    return storage


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """A directory with two committed steps."""
    return save_two_steps(str(tmp_path), monkeypatch)


@pytest.fixture(params=['disk', 's3'])
def storage(request, monkeypatch):
    """A directory or a prefix of a bucket, with two committed steps."""
    if request.param == 'disk':
        return request.getfixturevalue('disk')
    bucket = request.getfixturevalue('s3_environment').BUCKET
    return save_two_steps(f's3://{bucket}/damage-{secrets.token_hex(4)}', monkeypatch)


def restore_newest(root):
    """(step, state, extra, fallbacks) as a new process restores them."""
    reader = Reader(CheckpointConfig(), root)
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_of(leaf))
        for name, leaf in state_of(NEW).items()
    }
    found = reader.newest_whole(lambda step: (step, *reader.restore(step, wanted)))
    fallbacks = sum(event.get('checkpoint/fallbacks', 0) for event in reader.events())
    return *found, fallbacks


def assert_saved(step, state, extra):
    expected = state_of(step)
    assert state.keys() == expected.keys()
    for name, want in expected.items():
        got = np.asarray(state[name])
        assert got.dtype == want.dtype and got.shape == want.shape
        assert got.tobytes() == want.tobytes(), f'{name} of step {step} is not what was saved'
    assert extra == extra_of(step)


def objects(storage, kind):
    return [name for name in sorted(storage.list()) if re.fullmatch(KINDS[kind], name)]


def flip(content, bit):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def flip_one_bit(content, draw):
    bit = draw.randrange(8 * len(content))
    return flip(content, bit), f'bit {bit} of {8 * len(content)} flipped'


def cut_short(content, draw):
    size = draw.randrange(len(content))
    return content[:size], f'cut to {size} of {len(content)} bytes'


def delete(content, draw):
    return None, 'deleted'


def with_damage(storage, name, changed, see):
    """The result of `see` while an object has changed content; None deletes the object."""
    whole = storage.read(name)
    try:
        if changed is None:
            storage.remove(name)
        else:
            storage.write(name, changed)
        return see()
    finally:
        storage.write(name, whole)


def check_damage(storage, kind, name, changed, caplog):
    """Damages one object, checks that a saved state is restored and that the damage is reported."""
    caplog.clear()
    root = storage.root
    step, *saved, fallbacks = with_damage(storage, name, changed, lambda: restore_newest(root))
    assert_saved(step, *saved)
    assert step in (OLD, NEW)
    if kind == 'lease' or (kind == 'commit' and changed is None):
        # The first says nothing about contents. Without the other the step was never committed.
        assert fallbacks == 0 and step == (NEW if kind == 'lease' else OLD)
    elif step == OLD:
        assert fallbacks == 1
        (told,) = caplog.messages
        assert told.startswith(f'checkpoint {NEW} in {root}: digest mismatch: ')
        assert name.split('/', 2)[-1] in told or 'array ' in told or 'cannot be read' in told
    else:
        assert kind == 'data of a process' and changed is not None, f'{kind}: not noticed'


@pytest.mark.parametrize('damage', [flip_one_bit, cut_short, delete])
def test_damage_of_any_object_never_gives_other_weights(storage, damage, caplog):
    seed = secrets.randbits(32)
    draw = random.Random(seed)
    for kind in itertools.islice(itertools.cycle(KINDS), TRIALS):
        name = draw.choice(objects(storage, kind))
        changed, how = damage(storage.read(name), draw)
        print(f'seed {seed}: {name}: {how}')
        check_damage(storage, kind, name, changed, caplog)
    step, *saved, fallbacks = restore_newest(storage.root)
    assert step == NEW and not fallbacks
    assert_saved(step, *saved)


def test_the_trials_damage_every_kind_of_object(storage):
    assert all(objects(storage, kind) for kind in KINDS)
    others = '1/.*'
    for name in storage.list():
        assert any(re.fullmatch(kind, name) for kind in [*KINDS.values(), others]), name


def find_in_data(storage, part):
    """(object, offset): where the newest step stores the bytes of a part of an array."""
    for name in objects(storage, 'index') + objects(storage, 'data of a process'):
        position = storage.read(name).find(part.tobytes())
        if position >= 0:
            return name, position
    raise LookupError('in no file')


@pytest.mark.parametrize('processes', [1, 2])
def test_a_flipped_bit_of_an_array_is_always_found_and_the_array_is_named(
    tmp_path, monkeypatch, caplog, processes
):
    disk = save_two_steps(str(tmp_path), monkeypatch, processes)
    seed = secrets.randbits(32)
    draw = random.Random(seed)
    large = itertools.cycle(['trainable/w', 'opt_state/mu', 'opt_state/nu'])
    for array in itertools.islice(large, TRIALS):
        row = state_of(NEW)[array][draw.randrange(512)]
        name, position = find_in_data(disk, row)
        bit = 8 * position + draw.randrange(8 * row.nbytes)
        print(f'seed {seed}: {name}: bit {bit} flipped, of {array}')
        check_damage(disk, 'data of a process', name, flip(disk.read(name), bit), caplog)
        assert f'digest mismatch: array {array}' in caplog.text


def test_an_object_that_goes_after_the_check_is_damage(disk, caplog):
    """A run beside us deletes the step, or a network disk lags."""
    reader = Reader(CheckpointConfig(), disk.root)
    assert reader.read_manifest(NEW)['step'] == NEW
    (metadata,) = objects(disk, 'tree for Orbax')
    disk.remove(metadata)
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_of(leaf))
        for name, leaf in state_of(NEW).items()
    }
    step, restored = reader.newest_whole(lambda step: (step, reader.restore(step, wanted)))
    assert step == OLD
    assert_saved(step, *restored)
    assert caplog.messages == [
        f'checkpoint {NEW} in {disk.root}: digest mismatch: {metadata} is missing'
    ]


def test_two_exchanged_parts_of_an_array_are_found(disk, caplog):
    weights = state_of(NEW)['trainable/w']
    name, position = find_in_data(disk, weights[:1])
    content = bytearray(disk.read(name))
    row = weights[0].nbytes
    rows = content[position : position + 2 * row]
    content[position : position + 2 * row] = rows[row:] + rows[:row]
    check_damage(disk, 'data of a process', name, bytes(content), caplog)
    assert 'digest mismatch: array trainable/w' in caplog.text


# The tests above need each of these checks: without it, they fail.


def test_without_fingerprints_wrong_weights_come_back(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr('jaxfm.checkpoint.fingerprint.Fingerprint.part', lambda self: 0)
    storage = save_two_steps(str(tmp_path), monkeypatch)
    name, position = find_in_data(storage, state_of(NEW)['trainable/w'][:1])
    changed = flip(storage.read(name), 8 * position)
    with pytest.raises(AssertionError, match='trainable/w of step 2 is not what was saved'):
        check_damage(storage, 'data of a process', name, changed, caplog)


def test_without_the_digest_of_the_manifest_another_position_comes_back(disk, monkeypatch, caplog):
    def believing(store, commit):
        return json.loads(store.storage.read(f'{commit.directory}/manifest.json'))

    monkeypatch.setattr(Store, 'check', believing)
    (name,) = objects(disk, 'manifest')
    content = disk.read(name)
    changed = flip(content, 8 * content.index(b'1002') + 24)
    with pytest.raises(AssertionError, match='next_row'):
        check_damage(disk, 'manifest', name, changed, caplog)


@pytest.mark.parametrize('damage', [flip_one_bit, cut_short, delete])
def test_without_the_digests_of_files_damage_goes_unnoticed(disk, monkeypatch, caplog, damage):
    monkeypatch.setattr(Store, 'differences', lambda store, commit, manifest: ())
    name, _ = objects(disk, 'database of a process')
    changed, _ = damage(disk.read(name), random.Random(0))
    with pytest.raises(AssertionError, match='not noticed'):
        check_damage(disk, 'database of a process', name, changed, caplog)

"""Which saves count as checkpoints: not incomplete, fenced off, damaged or partly deleted ones."""

import json
from pathlib import Path

import pytest

from jaxfm.checkpoint.store import Commit, Store, new_attempt
from jaxfm.errors import DamagedError, LockedError
from jaxfm.storage.lease import Holder, Record
from jaxfm.storage.posix import PosixStorage

HOLDER = Holder('host', 12, '345', 'boot')


@pytest.fixture
def store(tmp_path):
    return Store(PosixStorage(tmp_path))


def save(store, step, epoch=1):
    """Writes a committed step with two files -> its directory."""
    attempt = new_attempt()
    store.storage.write(f'{step}/{attempt}/state/manifest.ocdbt', b'database')
    store.storage.write(f'{step}/{attempt}/state/d/data', b'arrays')
    digest = store.write_manifest(step, attempt, {'extra': {'next_row': step}})
    store.commit(Commit(step, attempt, epoch, digest))
    return f'{step}/{attempt}'


def hold(store, epoch, inherited=()):
    record = Record(epoch, HOLDER, 30, inherited=tuple(inherited))
    store.storage.write(f'lease/{epoch:08d}.json', record.to_json())


def steps(store):
    return list(store.commits())


def flips(content):
    """The content with each of its bits flipped in turn."""
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


def test_commits_are_ordered_by_step_and_not_by_name(store):
    for step in (10, 9, 100):
        save(store, step)
    assert steps(store) == [9, 10, 100]


def test_without_a_lease_every_commit_counts(store):
    save(store, 1, epoch=1)
    save(store, 2, epoch=7)
    assert steps(store) == [1, 2]


def test_a_commit_counts_in_its_own_epoch_and_where_it_was_inherited(store):
    directory = save(store, 1, epoch=1)
    hold(store, 1)
    assert steps(store) == [1]
    hold(store, 2)
    assert steps(store) == []
    hold(store, 2, inherited=[directory])
    save(store, 2, epoch=1)  # by the holder of epoch 1, which was only asleep
    save(store, 3, epoch=2)
    assert steps(store) == [1, 3]
    assert list(store.all_commits(store.storage.list())) == [1, 2, 3]


def test_another_attempt_at_an_inherited_step_is_not_inherited(store):
    hold(store, 2, inherited=[f'1/{new_attempt()}'])
    save(store, 1, epoch=1)
    assert steps(store) == []


def test_the_lease_with_the_highest_epoch_is_in_force(store):
    save(store, 1, epoch=10)
    hold(store, 9)
    hold(store, 10)
    assert steps(store) == [1]


def test_a_commit_replaces_one_that_does_not_count(store):
    save(store, 1, epoch=1)
    hold(store, 2)
    directory = save(store, 1, epoch=2)
    assert [commit.directory for commit in store.commits().values()] == [directory]


def test_a_commit_replaces_one_of_its_own_epoch(store):
    """A run saves a step again when it has found its first save damaged."""
    hold(store, 1)
    save(store, 1, epoch=1)
    directory = save(store, 1, epoch=1)
    assert [commit.directory for commit in store.commits().values()] == [directory]


def test_a_commit_does_not_replace_one_of_a_later_epoch(store):
    directory = save(store, 1, epoch=2)
    with pytest.raises(LockedError, match='step 1 .* was committed by a run that took over'):
        save(store, 1, epoch=1)
    assert store.commits()[1].directory == directory


def test_an_undamaged_step_returns_its_manifest(store):
    save(store, 4)
    manifest = store.check(store.commits()[4])
    assert manifest['step'] == 4 and manifest['extra'] == {'next_row': 4}
    assert {name: file['size'] for name, file in manifest['files'].items()} == {
        'state/manifest.ocdbt': len(b'database'),
        'state/d/data': len(b'arrays'),
    }


@pytest.mark.parametrize(
    ('name', 'content', 'what'),
    [
        ('manifest.json', b'{}', '/manifest.json'),
        ('manifest.json', None, '/manifest.json is missing'),
        ('state/d/data', b'Arrays', 'state/d/data'),
        ('state/d/data', b'array', 'state/d/data has 5 bytes, not 6'),
        ('state/d/data', None, 'state/d/data is missing'),
        ('state/manifest.ocdbt', b'', 'state/manifest.ocdbt has 0 bytes, not 8'),
        ('../commit.json', b'', 'commit.json'),
        ('../commit.json', b'[]', 'commit.json'),
        ('../commit.json', b'{"step": 4}', 'commit.json'),
    ],
)
def test_a_damaged_or_missing_file_is_named(store, name, content, what):
    directory = save(store, 4)
    if content is None:
        store.storage.remove(f'{directory}/{name}')
    else:
        store.storage.write(f'{directory}/{name}', content)
    with pytest.raises(DamagedError) as caught:
        store.check(store.commits()[4])
    assert str(caught.value).startswith(f'checkpoint 4 in {store.storage.root}: digest mismatch: ')
    assert str(caught.value).endswith(what)


def test_a_file_that_is_not_in_the_manifest_is_not_damage(store):
    directory = save(store, 4)
    store.storage.write(f'{directory}/state/d/.data.tmp', b'half')
    store.check(store.commits()[4])


def test_the_contents_of_large_files_are_left_to_the_fingerprints(store, monkeypatch):
    monkeypatch.setattr('jaxfm.checkpoint.store.SMALL_BYTES', 7)
    directory = save(store, 4)
    files = store.check(store.commits()[4])['files']
    assert 'sha256' in files['state/d/data'] and 'sha256' not in files['state/manifest.ocdbt']
    store.storage.write(f'{directory}/state/manifest.ocdbt', b'DATABASE')
    store.check(store.commits()[4])


def test_the_tree_for_orbax_has_a_digest_however_large_it_is(store, monkeypatch):
    monkeypatch.setattr('jaxfm.checkpoint.store.SMALL_BYTES', 7)
    store.storage.write('4/0123456789ab/state/_METADATA', b'{"tree_metadata": {}}')
    manifest = {'extra': {}, 'arrays': {}}
    digest = store.write_manifest(4, '0123456789ab', manifest)
    commit = Commit(4, '0123456789ab', 1, digest)
    store.check(commit)
    store.storage.write('4/0123456789ab/state/_METADATA', b'{"tree_metadata": []}')
    with pytest.raises(DamagedError, match='state/_METADATA$'):
        store.check(commit)


def test_a_commit_of_another_step_is_damage(store):
    save(store, 4)
    store.storage.write('5/commit.json', store.storage.read('4/commit.json'))
    assert steps(store) == [4, 5]
    with pytest.raises(DamagedError, match='checkpoint 5 in .*: digest mismatch: commit.json'):
        store.check(store.commits()[5])


def test_no_flipped_bit_of_a_commit_hides_its_step(store):
    directory = save(store, 3, epoch=1)
    hold(store, 2, inherited=[directory])
    save(store, 4, epoch=2)
    listing = store.storage.list()
    for step in (3, 4):
        name = f'{step}/commit.json'
        whole = store.storage.read(name)
        for changed in flips(whole):
            Path(store.storage.root, name).write_bytes(changed)
            commits = store.commits(listing)
            assert list(commits) == [3, 4], changed
            with pytest.raises(DamagedError, match='digest mismatch: commit.json'):
                store.check(commits[step])
        store.storage.write(name, whole)
        store.check(store.commits()[step])


def test_no_flipped_bit_of_a_lease_hides_a_step_or_gets_it_swept(store):
    directory = save(store, 3, epoch=1)
    hold(store, 2, inherited=[directory])
    save(store, 4, epoch=2)
    name = 'lease/00000002.json'
    listing = store.storage.list()
    for changed in flips(store.storage.read(name)):
        Path(store.storage.root, name).write_bytes(changed)
        assert list(store.commits(listing)) == [3, 4], changed
    store.sweep()
    for commit in store.commits().values():
        store.check(commit)


def test_a_commit_and_a_lease_read_as_json(store):
    """People inspect them with ordinary tools."""
    directory = save(store, 3)
    hold(store, 1, inherited=[directory])
    assert json.loads(store.storage.read('3/commit.json'))['attempt'] == directory.split('/')[1]
    assert json.loads(store.storage.read('lease/00000001.json'))['holder']['host'] == 'host'


@pytest.mark.parametrize(
    'name',
    [
        'notes.txt',
        'config.json',
        'lease/00000001.json',
        'lease/7/0123456789ab/state/d',
        '7',
        '7/notes.txt',
        '7/commit.json.bak',
        '7/0123456789ab',
        '7/0123456789abc/state/d',
        '7/0123456789AB/state/d',
        'old/7/0123456789ab/state/d',
        '-7/0123456789ab/state/d',
        '7.0/0123456789ab/state/d',
    ],
)
def test_a_file_with_a_foreign_name_is_not_an_orphan(store, name):
    store.storage.write(name, b'of somebody else')
    assert store.orphans(store.storage.list(), {}) == {}
    store.sweep()
    assert store.storage.read(name) == b'of somebody else'


def test_orphans_are_left_over_saves_with_their_sizes(store):
    save(store, 7)
    save(store, 8)
    torn, older = new_attempt(), new_attempt()
    left = {
        f'9/{torn}/state/d/data': b'123',
        f'9/{torn}/manifest.json': b'4567',
        f'8/{older}/state/manifest.ocdbt': b'12',
        '7/.commit.json.0123abcd.tmp': b'1',
    }
    for name, content in left.items():
        store.storage.write(name, content)
    expected = {f'9/{torn}': 7, f'8/{older}': 2, '7/.commit.json.0123abcd.tmp': 1}
    assert store.orphans(store.storage.list(), store.commits()) == expected
    assert store.sweep() == expected
    assert store.sweep() == {}
    assert steps(store) == [7, 8]
    for commit in store.commits().values():
        store.check(commit)


def test_a_fenced_off_commit_is_swept_with_its_step(store):
    fenced = save(store, 7, epoch=1)
    hold(store, 2)
    assert store.sweep().keys() == {fenced, '7/commit.json'}
    assert not any(name.startswith('7') for name in store.storage.list())


@pytest.mark.parametrize('deletions', range(4))
def test_an_interrupted_deletion_leaves_a_whole_step_or_none(store, monkeypatch, deletions):
    save(store, 7)
    save(store, 8)
    remove, done = Path.unlink, []

    def interrupted(path, **options):
        if len(done) == deletions:
            raise KeyboardInterrupt
        done.append(path)
        remove(path, **options)

    monkeypatch.setattr(Path, 'unlink', interrupted)
    monkeypatch.setattr('shutil.rmtree', lambda path: [one.unlink() for one in files_of(path)])
    with pytest.raises(KeyboardInterrupt):
        remove_step(store, 7)
    monkeypatch.undo()
    assert steps(store) == ([8] if deletions else [7, 8])
    for commit in store.commits().values():
        store.check(commit)
    store.sweep()
    assert not deletions or not Path(store.storage.root, '7').exists()


def remove_step(store, step):
    listing = store.storage.list()
    store.remove(store.commits(listing)[step], listing)


def files_of(directory):
    return [path for path in sorted(Path(directory).rglob('*')) if path.is_file()]


def test_a_step_deleted_during_a_read_is_damage_and_not_a_crash(store):
    save(store, 7)
    commit = store.commits()[7]
    listing = store.storage.list()
    manifest = store.manifest(commit)
    remove_step(store, 7)
    assert store.commits(listing) == {}
    assert list(store.differences(commit, manifest))
    with pytest.raises(DamagedError, match='manifest.json is missing'):
        store.check(commit)

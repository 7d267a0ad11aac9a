"""What `init_from` may name of Orbax's, and what is refused: half-copied, unfinished, ambiguous."""

import json
import shutil
import sys

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxfm import main
from jaxfm.config.load import load_config
from jaxfm.errors import ConfigError, DataError
from jaxfm.pretrained.locate import is_without_config
from jaxfm.pretrained.orbax import Entry, parse_entry
from jaxfm.pretrained.orbax.directory import find_tree, open_tree
from jaxfm.pretrained.orbax.tensors import OrbaxTensors
from tests.orbax_trees import FORMATS
from tests.pretrained.test_locate import PRETRAINED

TREE = {'a': {'kernel': jnp.arange(12.0).reshape(3, 4)}, 'zeros': jnp.zeros((4, 4))}


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp('saved')
    return {name: save(root / name, TREE) for name, save in FORMATS.items()}


@pytest.mark.parametrize(
    'kind, place',
    [
        ('standard', ''),
        ('v1', '/state'),
        ('steps', '/12/default'),
        ('items', '/params'),
    ],
)
def test_the_tree_is_found_below_what_is_named(kind, place, saved, caplog):
    caplog.set_level('INFO', 'jaxfm')
    found = find_tree(saved[kind])
    assert found == f'{saved[kind]}{place}' and find_tree(found) == found
    assert is_without_config(saved[kind]) and is_without_config(found)
    assert OrbaxTensors(open_tree(found)).shapes == {'a/kernel': (3, 4), 'zeros': (4, 4)}
    assert ('step 12 is the newest of 9, 12' in caplog.text) == (kind == 'steps')


@pytest.fixture
def copied(saved, tmp_path):
    return {
        name: shutil.copytree(path, tmp_path / name, dirs_exist_ok=True)
        for name, path in saved.items()
    }


def read_all(path):
    tensors = OrbaxTensors(open_tree(find_tree(str(path))))
    tensors.check_chunks(list(tensors.shapes))
    return {name: tensors.read(name) for name in tensors.shapes}


@pytest.mark.parametrize('kind', FORMATS)
@pytest.mark.parametrize('lost', ['a quarter', 'half', 'all but one'])
def test_a_copy_that_lacks_files_is_refused_or_whole(kind, lost, copied):
    """Whichever files are missing: never wrong weights, and never another error."""
    files = sorted(path for path in copied[kind].rglob('*') if path.is_file())
    for path in {'a quarter': files[::4], 'half': files[1::2], 'all but one': files[1:]}[lost]:
        path.unlink()
    try:
        found = read_all(copied[kind])
    except DataError as error:
        assert '\n' not in str(error)
    else:
        np.testing.assert_array_equal(found['a/kernel'], TREE['a']['kernel'])


@pytest.mark.parametrize('kind, chunk', [('zarr', '0.0'), ('zarr3', 'c/0/0')])
def test_a_lost_chunk_without_ocdbt_is_not_read_as_zeros(kind, chunk, copied):
    (copied[kind] / 'a.kernel' / chunk).unlink()
    with pytest.raises(DataError, match=r'lacks chunks of a/kernel \(1\): it was copied only in'):
        read_all(copied[kind])


def test_each_of_several_chunks_is_looked_for(tmp_path):
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    save_args = {'a': ocp.SaveArgs(chunk_byte_size=16)}
    with ocp.Checkpointer(handler) as checkpointer:
        tree = {'a': np.arange(30, dtype=np.float32).reshape(5, 6)}
        checkpointer.save(tmp_path / 'x', tree, ocp.args.PyTreeSave(tree, save_args=save_args))
    read_all(tmp_path / 'x')
    chunks = sorted(path for path in (tmp_path / 'x' / 'a').glob('[0-9]*'))
    assert len(chunks) > 4
    chunks[-1].unlink()
    with pytest.raises(DataError, match=r'lacks chunks of a \(1\)'):
        read_all(tmp_path / 'x')


@pytest.mark.parametrize('kind', ['zarr', 'zarr in ocdbt'])
def test_truncated_files_are_refused(kind, copied):
    for path in copied[kind].rglob('*'):
        if path.is_file() and (path.parent.name in ('a.kernel', 'd')) and path.name != '.zarray':
            path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match='is damaged or was copied only in part: a/kernel'):
        read_all(copied[kind])


def without_marks(path):
    for name in ('_CHECKPOINT_METADATA', 'commit_success.txt'):
        for file in path.rglob(name):
            file.unlink()


def never_committed(path):
    without_marks(path)
    (path / '_CHECKPOINT_METADATA').write_text(json.dumps({'commit_timestamp_nsecs': None}))


@pytest.mark.parametrize(
    'damage, words',
    [
        (
            without_marks,
            'neither commit_success.txt nor _CHECKPOINT_METADATA says that it is whole',
        ),
        (never_committed, 'neither commit_success.txt nor _CHECKPOINT_METADATA'),
        (
            lambda path: (path / '_METADATA').unlink(),
            'has no _METADATA: it was not saved to its end',
        ),
        (lambda path: (path / '_METADATA').write_text('{'), '_METADATA is damaged'),
        (lambda path: (path / '_METADATA').write_text('{}'), '_METADATA is damaged'),
        (lambda path: (path / 'manifest.ocdbt').unlink(), 'has no manifest.ocdbt'),
        (lambda path: [f.unlink() for f in path.glob('d/*')], 'a/kernel cannot be read'),
    ],
)
def test_an_unfinished_tree_is_refused_in_one_line(damage, words, copied):
    damage(copied['standard'])
    with pytest.raises(DataError, match=words) as raised:
        read_all(copied['standard'])
    assert '\n' not in str(raised.value)


def test_an_unfinished_step_is_passed_over_but_not_taken(copied):
    root = copied['steps']
    tmp = shutil.copytree(root / '12', root / '13.orbax-checkpoint-tmp')
    assert find_tree(str(root)) == str(root / '12' / 'default')
    with pytest.raises(DataError, match='13.orbax-checkpoint-tmp was not saved to its end'):
        find_tree(str(tmp))
    (root / '12' / 'default' / '_METADATA').unlink()  # the newest is not replaced silently
    with pytest.raises(DataError, match='12 has no _METADATA(.|\n)*name another step'):
        find_tree(str(root))


def test_several_trees_must_be_chosen_from(copied):
    shutil.move(copied['items'] / 'params', copied['items'] / 'weights')
    with pytest.raises(
        DataError, match='has several trees; name one of them: .*opt_state, weights'
    ):
        find_tree(str(copied['items']))


def test_our_own_checkpoints_are_read_as_a_run(straight):
    with pytest.raises(DataError, match='of a run of jaxfm: name the work directory'):
        find_tree(str(straight / 'checkpoints'))


# The command line


@pytest.mark.parametrize(
    'entry, parsed',
    [
        ('a/kernel', Entry('a/kernel')),
        ('a_{layer}/kernel [heads, embed]', Entry('a_{layer}/kernel', ('heads', 'embed'))),
        ('a[b]', Entry('a', ('b',))),
    ],
)
def test_an_entry_is_a_name_and_axes(entry, parsed):
    assert parse_entry(entry) == parsed


@pytest.mark.parametrize('entry', ['', 'a b', 'a_{Layer}', 'a_{layer', 'a [b, b]', 'a [b,]', '[b]'])
def test_a_malformed_entry_is_refused(entry, tiny, saved):
    with pytest.raises(ConfigError, match='config.init_names'):
        load_config(
            str(tiny.config), [f'init_from={saved["zarr"]}', f'init_names={ {"a": entry} }']
        )


def test_names_without_a_checkpoint_are_refused(tiny):
    with pytest.raises(
        ConfigError, match='init_names names arrays of a checkpoint: init_from must'
    ):
        load_config(str(tiny.config), ['init_names={"a": "b"}'])


def test_names_for_a_run_of_ours_are_refused(tiny, straight):
    with pytest.raises(ConfigError, match='config.init_ignore is for a checkpoint that another'):
        load_config(str(tiny.config), [f'init_from={straight}', 'init_ignore=["a"]'])


def test_a_checkpoint_needs_a_config_with_a_model(saved):
    with pytest.raises(ConfigError, match='config.model is required: .* not the shape of'):
        load_config(PRETRAINED, [f'init_from={saved["standard"]}'])


def test_mistakes_exit_with_their_codes_and_write_nothing(
    tiny, copied, monkeypatch, capsys, tmp_path
):
    shutil.copy(copied['zarr'] / '_METADATA', tmp_path / '_METADATA')
    without_marks(copied['v1'])
    (copied['standard'] / '_METADATA').unlink()
    cases = {
        copied['standard']: (65, 'copied only in part'),
        's3://': (78, 'want s3://bucket/prefix'),
    }
    monkeypatch.chdir(tmp_path)
    for name, (code, words) in cases.items():
        arguments = tiny.arguments(tmp_path / 'run', f'--config.init_from={name}')
        assert main.main(arguments) == code
        [message] = capsys.readouterr().err.split('error: ')[1:]
        assert words in message and message.count('\n') == 1
    monkeypatch.setitem(sys.modules, 'botocore', None)
    monkeypatch.setitem(sys.modules, 'botocore.config', None)
    assert main.main(tiny.arguments(tmp_path / 'run', '--config.init_from=s3://bucket/x')) == 66
    assert "pip install 'jaxfm[s3]'" in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()

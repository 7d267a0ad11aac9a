"""Finds the tree of arrays that stock Orbax saved in a place, and reads its description. No jax.

A place is a saved tree, a step that holds one or several of them as items, or the root of a
CheckpointManager, which holds steps. All that stock Orbax writes has these files:

    _CHECKPOINT_METADATA   of a step: when it was begun and committed
    commit_success.txt     of a step or an item: all of it has been written
    _METADATA              of a tree: names and types of its leaves, zarr 2 or 3, OCDBT or not
    manifest.ocdbt         of a tree in an OCDBT database; without one, each array is a directory
"""

import dataclasses
import json
import logging
import re
from pathlib import Path

from jaxfm.errors import ConfigError, DataError, MissingInputError, listed
from jaxfm.storage import open_storage
from jaxfm.storage.base import S3
from jaxfm.storage.files import check_object, explain_damage

log = logging.getLogger('jaxfm')

_STEP, _TREE, _SUCCESS = '_CHECKPOINT_METADATA', '_METADATA', 'commit_success.txt'
_DATABASE = 'manifest.ocdbt'
_UNFINISHED = '.orbax-checkpoint-tmp'
_OUR_COMMIT = 'commit.json'
_NUMBERED = re.compile(r'(?:.*\D)?(\d+)')  # 12, 00000012, checkpoint_12
# What a directory of Orbax's has, however much of it has been copied.
_SIGNS = [
    *(f'{above}{name}' for name in (_TREE, _DATABASE) for above in ('', '*/', '*/*/')),
    *(f'{above}{_STEP}' for above in ('', '*/')),
    *(f'*/{name}' for name in ('.zarray', 'zarr.json')),
    f'*{_UNFINISHED}*',
]
_ARRAYS = ('jax.Array', 'np.ndarray', 'scalar')  # types of leaves that are stored as arrays
_AGAIN = 'save or copy it again, or name another step'


@dataclasses.dataclass(frozen=True)
class Tree:
    """A finished tree of arrays.

    Attributes:
        place: its path or s3:// URL.
        arrays: {name: name of its zarr array}; the keys of a name are joined by slashes.
        left_out: names of what is beside the parameters.
        files: {file: its size in bytes}, for all files of the tree.
        kvstore: the spec of TensorStore's key-value store for its directory.
    """

    place: str
    arrays: dict[str, str]
    left_out: list[str]
    files: dict[str, int]
    kvstore: dict
    is_zarr3: bool
    is_database: bool
    keeps_zeros: bool  # False: chunks that are all zeros may not have been written


def is_foreign(name: str) -> bool:
    """Whether a path or URL is a place of Orbax's, finished or not; of s3:// only these are read.

    Call it only for what is not the work directory of a run.
    """
    if name.startswith(S3):
        return True
    path = Path(name).expanduser()
    if not path.is_dir() or any(next(path.glob(f'*.{it}'), 0) for it in ('safetensors', 'gguf')):
        return False
    return _UNFINISHED in path.name or any(next(path.glob(sign), None) for sign in _SIGNS)


def find_tree(name: str) -> str:
    """The place of the tree in a place: of a manager's newest step, if there are several.

    Raises:
        MissingInputError: there is nothing of Orbax's.
        DataError: it is not finished, was copied in part, or holds several trees.
        PermissionDeniedError, UnavailableError: the storage cannot be read.
    """
    root = _normalize(name)
    _refuse_unfinished(root)
    files = open_storage(root).list()
    if not files:
        raise MissingInputError(f'there is nothing at {root}')
    if _TREE in files:
        return root
    step = '' if _STEP in files or _DATABASE in files else _newest_step(files, root)
    if f'{step}{_TREE}' in files:
        return f'{root}/{step}'.rstrip('/')
    return f'{root}/{step}{_choose_item(files, step, root)}'


def open_tree(place: str) -> Tree:
    """The tree at a place that `find_tree` returned; reads only its description.

    Raises what `find_tree` raises.
    """
    storage = open_storage(place)
    files = {name: stored.size for name, stored in storage.list().items()}
    _check_finished(place, storage, files)
    with explain_damage(f'{place}/{_TREE} is damaged'):
        about = check_object(json.loads(storage.read(_TREE)), f'{place}/{_TREE} is damaged')
        leaves = _list_arrays(about)
    is_database = about.get('use_ocdbt', _DATABASE in files)
    if is_database and _DATABASE not in files:
        raise DataError(f'{place} has no {_DATABASE}: it was copied only in part; {_AGAIN}')
    arrays, left_out = _select_params({'/'.join(keys): '.'.join(keys) for keys in leaves})
    if not arrays:
        raise DataError(f'{place} holds no arrays')
    return Tree(
        place=place,
        arrays=arrays,
        left_out=left_out,
        files=files,
        kvstore=_fix_root(storage.kvstore('')),
        is_zarr3=bool(about.get('use_zarr3', False)),
        is_database=is_database,
        keeps_zeros=bool(about.get('store_array_data_equal_to_fill_value', False)),
    )


def _normalize(name: str) -> str:
    if not name.startswith(S3):
        return str(Path(name).expanduser().absolute())
    if not name.removeprefix(S3).strip('/'):
        raise ConfigError(f'config.init_from = {name!r}: want s3://bucket/prefix')
    return name.rstrip('/')


def _newest_step(files, root: str) -> str:
    """'12/' if 12 is the newest step below the root; '' if there are none."""
    names = {name.partition('/')[0] for name in files if '/' in name}
    steps = {int(match[1]): name for name in names if (match := _NUMBERED.fullmatch(name))}
    steps = {number: name for number, name in steps.items() if _UNFINISHED not in name}
    if not steps:
        return ''
    newest = steps[max(steps)]
    if f'{newest}/{_OUR_COMMIT}' in files:
        raise DataError(
            f'{root} holds the checkpoints of a run of jaxfm: name the work directory of the run'
        )
    if len(steps) > 1:
        numbers = [str(number) for number in sorted(steps)]
        log.info('%s: step %s is the newest of %s', root, numbers[-1], listed(numbers))
    return f'{newest}/'


def _choose_item(files, step: str, root: str) -> str:
    """The item of a step that holds the parameters."""
    below = [name.removeprefix(step) for name in files if name.startswith(step)]
    items = sorted(name.partition('/')[0] for name in below if re.fullmatch(f'[^/]+/{_TREE}', name))
    if 'params' in items:
        return 'params'
    place = f'{root}/{step}'.rstrip('/')
    if len(items) > 1:
        raise DataError(f'{place} has several trees; name one of them: {place}/{", ".join(items)}')
    if items:
        return items[0]
    unfinished = {name.partition('/')[0] for name in files if _UNFINISHED in name}
    if unfinished and not step:
        _refuse_unfinished(f'{root}/{min(unfinished)}')
    raise DataError(
        f'{place} has no {_TREE}: it was not saved to its end, or copied only in part; {_AGAIN}'
    )


def _refuse_unfinished(place: str) -> None:
    if _UNFINISHED in place:
        raise DataError(f'{place} was not saved to its end; {_AGAIN}')


def _check_finished(place: str, storage, files) -> None:
    """Raises DataError unless the tree, or the step that it is an item of, was committed."""
    if _SUCCESS in files:
        return
    above, _, _ = place.rpartition('/')
    storages = [storage] if _STEP in files or above in ('', 's3:/') else [open_storage(above)]
    for step in storages:
        try:
            with explain_damage(f'{step.root}/{_STEP} is damaged'):
                about = check_object(json.loads(step.read(_STEP)), f'{_STEP} is damaged')
        except FileNotFoundError:
            continue
        if about.get('commit_timestamp_nsecs'):
            return
    raise DataError(
        f'{place} was not saved to its end, or copied only in part: neither {_SUCCESS} nor {_STEP} '
        f'says that it is whole; {_AGAIN}'
    )


def _list_arrays(about: dict) -> list[list[str]]:
    """The keys of every leaf that is stored as an array. Raises ValueError."""
    try:
        leaves = [
            (leaf['key_metadata'], leaf['value_metadata'])
            for leaf in about['tree_metadata'].values()
        ]
        return [
            [str(key['key']) for key in keys]
            for keys, value in leaves
            if value['value_type'] in _ARRAYS and not value.get('skip_deserialize')
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'it describes no tree: {error!r}') from error


def _select_params(arrays: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Leaves out what is beside a top-level `params`, that prefix, and NNX's suffix `value`."""
    inside = {name: zarr for name, zarr in arrays.items() if name.startswith('params/')}
    left_out = sorted(arrays.keys() - inside.keys()) if inside else []
    chosen = {name.removeprefix('params/'): zarr for name, zarr in (inside or arrays).items()}
    if all(name.endswith('/value') for name in chosen):
        chosen = {name.removesuffix('/value'): zarr for name, zarr in chosen.items()}
    return chosen, left_out


def _fix_root(spec: dict) -> dict:
    """Storages append a slash to the prefix, which here is the storage's root itself."""
    path = spec['path'].rstrip('/')
    return spec | {'path': f'{path}/' if path else ''}

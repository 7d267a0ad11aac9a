"""Finds what `init_from` names: a run of ours, a directory, a .gguf file or a hub model. No jax.

Checkpoints of other JAX projects are recognised here and read by `pretrained.orbax`.
"""

import difflib
import re
from pathlib import Path

from jaxfm.errors import DataError, MissingInputError, listed
from jaxfm.models.families.base import read_config
from jaxfm.pretrained.huggingface import directory
from jaxfm.pretrained.orbax.directory import is_foreign
from jaxfm.pretrained.source import Pretrained

_HUB_ID = re.compile(r'[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?')


def is_run(path: Path) -> bool:
    """Whether a directory is the work directory of a run, judged by its config.json."""
    if not (path / directory.CONFIG).is_file():
        return False
    config = directory.read_json(path / directory.CONFIG)
    return isinstance(config.get('model'), dict) and 'model_type' not in config


def is_without_config(name: str) -> bool:
    """Whether `init_from` names weights only: a checkpoint that stock Orbax saved elsewhere."""
    return not is_run(Path(name).expanduser()) and is_foreign(name)


def open_pretrained(name: str) -> Pretrained:
    """The model at a path, or on the hub under this id.

    Not for runs of ours (see `is_run`), nor for weights alone (see `is_without_config`).

    Raises:
        MissingInputError: nothing has this name; the message suggests the nearest that exists.
        DataError: the model is damaged, or in a format that is not supported.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return _open_file(path)
    if path.is_dir():
        ggufs = sorted(path.glob('*.gguf'))
        # A directory of .gguf files may have a config.json, too.
        is_gguf = ggufs and not any(path.glob('*.safetensors'))
        if (path / directory.CONFIG).is_file() and not is_gguf:
            return directory.open_directory(path)
        if len(ggufs) == 1:
            return _open_file(ggufs[0])
        if ggufs:
            names = ', '.join(file.name for file in ggufs)
            raise DataError(f'{path} has several models; name one of the files: {names}')
        raise MissingInputError(
            f'{path} has no model: neither config.json nor a .gguf file, nor an Orbax checkpoint'
        )
    is_of_runs = path.parts[:1] == ('runs',)  # the default place of runs, not a hub organisation
    if _HUB_ID.fullmatch(name) and not path.parent.is_dir() and not is_of_runs:
        from jaxfm.pretrained.huggingface.hub import download

        return directory.open_directory(download(name))
    raise MissingInputError(
        f'there is no {path}: train it first, or name another model' + _nearest(path)
    )


def _open_file(path: Path) -> Pretrained:
    if path.suffix == '.gguf':
        from jaxfm.pretrained.gguf.model import open_gguf  # imported late: only .gguf files need it

        return open_gguf(path)
    if path.suffix == '.safetensors':
        raise DataError(f'{path} has only weights: name its directory, which has the config.json')
    raise DataError(f'{path} is not a model: name a directory or a .gguf file')


def _nearest(path: Path) -> str:
    """The end of a message: the nearest name among the models next to `path`, else all of them."""
    if not path.parent.is_dir():
        return ''
    models = [
        entry.name
        for entry in path.parent.iterdir()
        if entry.suffix == '.gguf' or (entry / directory.CONFIG).is_file()
    ]
    near = difflib.get_close_matches(path.name, models, 1)
    if near:
        return f'; did you mean {path.parent / near[0]}?'
    return f'; available: {listed(sorted(models))}' if models else ''


def values_of(pretrained: Pretrained) -> dict:
    """The config values that a run takes from a model, {group: values}."""
    try:
        model = read_config(pretrained.hf_config)
    except DataError as error:
        raise DataError(f'{pretrained.path}: {error}') from None
    values = {'model': model, 'export': {'dtype': _dtype(pretrained)}}
    ends = pretrained.generation.get('eos_token_id')
    ends = pretrained.hf_config.get('eos_token_id') if ends is None else ends
    ends = ends if isinstance(ends, list) else [ends]
    values['sampling'] = {'stop_ids': sorted({end for end in ends if isinstance(end, int)})}
    if pretrained.tokenizer:
        values['tokenizer'] = {'name': 'file', 'path': pretrained.tokenizer}
    return values


def _dtype(pretrained: Pretrained) -> str:
    """The dtype of exports: bfloat16 or float16 if all weights have it, else float32."""
    names = {str(dtype) for dtype in pretrained.tensors.dtypes.values()}
    if len(names) == 1:
        name = names.pop()
        return name if name in ('bfloat16', 'float16') else 'float32'
    return 'float32'

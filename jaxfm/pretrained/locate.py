"""What `init_from` names: a run of ours, a directory, a .gguf file, a model on the hub. No jax."""

import difflib
import re
from pathlib import Path

from jaxfm.errors import DataError, MissingInputError, listed
from jaxfm.models.families.base import read_config
from jaxfm.pretrained.huggingface import directory
from jaxfm.pretrained.source import Pretrained

_HUB_ID = re.compile(r'[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?')


def is_run(path: Path) -> bool:
    """Whether a directory is the work directory of a run: its config.json has our groups."""
    if not (path / directory.CONFIG).is_file():
        return False
    config = directory.read_json(path / directory.CONFIG)
    return isinstance(config.get('model'), dict) and 'model_type' not in config


def open_pretrained(name: str) -> Pretrained:
    """The model that a path or an id of the hub names, if it is none of our runs.

    Raises:
        MissingInputError: there is nothing of this name, with the nearest one that there is.
        DataError: it is damaged, or of a kind that we do not read.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return _open_file(path)
    if path.is_dir():
        ggufs = sorted(path.glob('*.gguf'))
        # A config.json lies beside .gguf files, too.
        is_gguf = ggufs and not any(path.glob('*.safetensors'))
        if (path / directory.CONFIG).is_file() and not is_gguf:
            return directory.open_directory(path)
        if len(ggufs) == 1:
            return _open_file(ggufs[0])
        if ggufs:
            names = ', '.join(file.name for file in ggufs)
            raise DataError(f'{path} has several models, name the file of one: {names}')
        raise MissingInputError(f'{path} holds no model: no config.json and no .gguf file')
    is_of_runs = path.parts[:1] == ('runs',)  # where runs are unless told otherwise
    if _HUB_ID.fullmatch(name) and not path.parent.is_dir() and not is_of_runs:
        from jaxfm.pretrained.huggingface.hub import download

        return directory.open_directory(download(name))
    raise MissingInputError(
        f'there is no {path}: train it first, or name another model' + _nearest(path)
    )


def _open_file(path: Path) -> Pretrained:
    if path.suffix == '.gguf':
        from jaxfm.pretrained.gguf.model import open_gguf  # its library is needed for nothing else

        return open_gguf(path)
    if path.suffix == '.safetensors':
        raise DataError(f'{path} has weights alone: name its directory, which has the config.json')
    raise DataError(f'{path} is no model by its name: name a directory or a .gguf file')


def _nearest(path: Path) -> str:
    """What has nearly this name beside it: runs, directories with a model, .gguf files."""
    if not path.parent.is_dir():
        return ''
    models = [
        entry.name
        for entry in path.parent.iterdir()
        if entry.suffix == '.gguf' or (entry / directory.CONFIG).is_file()
    ]
    near = difflib.get_close_matches(path.name, models, 1)
    if near:
        return f'; do you mean {path.parent / near[0]}?'
    return f'; there is {listed(sorted(models))}' if models else ''


def values_of(pretrained: Pretrained) -> dict:
    """What the config of a run takes over from a model: {group: values}."""
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
    """The widest of the weights, so that an export has every bit of them."""
    names = {str(dtype) for dtype in pretrained.tensors.dtypes.values()}
    if len(names) == 1:
        name = names.pop()
        return name if name in ('bfloat16', 'float16') else 'float32'
    return 'float32'

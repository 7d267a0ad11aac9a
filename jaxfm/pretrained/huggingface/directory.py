"""Reads a model in Hugging Face's layout: a directory with config.json and .safetensors files.

Nothing in it is ever executed: pickled weights and custom model code are refused.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxfm.errors import DataError, MissingInputError, PermissionDeniedError, listed
from jaxfm.pretrained.source import Pretrained
from jaxfm.storage.files import check_object, explain_damage, explain_errors

CONFIG, GENERATION = 'config.json', 'generation_config.json'
TOKENIZER = 'tokenizer_config.json'
WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'

DTYPES = {
    'F64': np.dtype(np.float64),
    'F32': np.dtype(np.float32),
    'F16': np.dtype(np.float16),
    'BF16': np.dtype(ml_dtypes.bfloat16),
}
# A directory has a tokenizer if it has one of these.
_TOKENIZERS = ('tokenizer.json', 'tokenizer.model', 'vocab.json')
_PICKLES = ('*.bin', '*.pt', '*.pth', '*.ckpt', '*.pkl')


def open_directory(path: Path) -> Pretrained:
    """The model in a directory; of its weights, only the headers are read.

    Raises:
        MissingInputError: config.json or the weights are missing.
        DataError: a file is damaged, or the index does not match the files.
    """
    config = read_json(path / CONFIG)
    has_tokenizer = any((path / name).is_file() for name in _TOKENIZERS)
    generation = path / GENERATION
    return Pretrained(
        path=path,
        hf_config=config,
        tensors=SafetensorsFiles(_weight_files(path, config)),
        tokenizer=str(path) if has_tokenizer else '',
        generation=read_json(generation) if generation.is_file() else {},
    )


class SafetensorsFiles:
    """The tensors of one or more files, read on demand (`source.Tensors`).

    Args:
        files: {path: names of the tensors that it must have, or None to take all}.
    """

    def __init__(self, files: dict[Path, set[str] | None]):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self._views: dict[str, np.ndarray] = {}
        for path, names in files.items():
            self._open(path, names)

    def _open(self, path: Path, names: set[str] | None) -> None:
        try:
            file = safe_open(path, framework='np')  # checks the header and the file's size
        except FileNotFoundError:
            raise MissingInputError(f'{path} is missing') from None
        except PermissionError:
            raise PermissionDeniedError(f'{path} may not be read') from None
        except (SafetensorError, OSError) as error:
            raise DataError(f'{path} is damaged: {error}') from None
        missing = sorted((names or set()) - set(file.keys()))
        if missing:
            raise DataError(f'{path} lacks tensors that {INDEX} lists: {listed(missing)}')
        names = set(file.keys()) if names is None else names
        for name in sorted(names):
            part = file.get_slice(name)
            if part.get_dtype() not in DTYPES:
                known = ', '.join(DTYPES)
                raise DataError(f'{path}: {name} is {part.get_dtype()}; supported: {known}')
            self.shapes[name] = tuple(part.get_shape())
            self.dtypes[name] = DTYPES[part.get_dtype()]
        self._views |= _map_tensors(path, names, self.shapes, self.dtypes)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A slice of a tensor: a view of the memory-mapped file, read only when it is used."""
        return self._views[name][index]


def _map_tensors(path: Path, names: set[str], shapes: dict, dtypes: dict) -> dict[str, np.ndarray]:
    """Views of the tensors of a checked file; the safetensors library would copy them."""
    content = np.memmap(path, mode='r')
    start = 8 + int.from_bytes(content[:8].tobytes(), 'little')
    header = json.loads(content[8:start].tobytes())
    views = {}
    for name in names:
        first, last = (start + offset for offset in header[name]['data_offsets'])
        views[name] = content[first:last].view(dtypes[name]).reshape(shapes[name])
    return views


def _weight_files(path: Path, config: dict) -> dict[Path, set[str] | None]:
    if (path / INDEX).is_file():
        return _list_indexed_files(path)
    if (path / WEIGHTS).is_file():
        return {path / WEIGHTS: None}
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise DataError(
            f'{path} has its weights in {listed(pickles)}, which is never loaded: reading a pickle '
            'runs any code in it; save the model as safetensors'
        )
    if config.get('auto_map'):
        raise DataError(f'{path} needs its own model code (auto_map), which is never run')
    raise MissingInputError(f'{path} has no weights: neither {WEIGHTS} nor {INDEX}')


def _list_indexed_files(path: Path) -> dict[Path, set[str]]:
    """{file: names of its tensors} of an index; refuses files outside the directory."""
    weight_map = read_json(path / INDEX).get('weight_map')
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f'{path / INDEX} is damaged: it has no weight_map')
    files = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise DataError(f'{path / INDEX}: {name} is in {file!r}, which is not a file name')
        files.setdefault(path / file, set()).add(name)
    missing = sorted(file.name for file in files if not file.is_file())
    if missing:
        raise DataError(f'{path / INDEX} lists missing files: {listed(missing)}')
    return files


def read_json(path: Path) -> dict:
    """The JSON object in a file.

    Raises:
        MissingInputError: the file is missing.
        PermissionDeniedError: the file is not readable.
        DataError: it is not a JSON object.
    """
    reading = explain_errors(
        f'{path} cannot be read',
        MissingInputError,
        denied=f'{path} may not be read',
        missing=f'{path} is missing',
    )
    with reading, explain_damage(f'{path} is damaged'):
        value = json.loads(path.read_text('utf-8'))
    return check_object(value, f'{path} is damaged')

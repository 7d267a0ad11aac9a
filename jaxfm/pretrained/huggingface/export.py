"""Exports a model as a directory in Hugging Face's layout: weights, configs, tokenizer, template.

The directory is written under a temporary name and renamed at the end, so that a directory with the
final name is always complete.
"""

import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from jaxfm.distributed import agree
from jaxfm.models import TransformerConfig, lora
from jaxfm.models.families.base import find_family, write_config
from jaxfm.pretrained import ExportConfig
from jaxfm.pretrained.huggingface.directory import (
    CONFIG,
    DTYPES,
    GENERATION,
    INDEX,
    TOKENIZER,
    WEIGHTS,
    read_json,
)
from jaxfm.pretrained.layout import as_tensor, make_layout, take_from
from jaxfm.pretrained.pipeline import run_ahead
from jaxfm.storage.files import explain_write

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Exporter:
    """Writes the weights of one model, with adapters merged.

    The constructor checks that a family can express the model.

    Args:
      axes, shapes: {path of a parameter: logical axes or ShapeDtypeStruct}.
      stop_ids: the token ids that end a text, for eos_token_id.

    Raises:
      ConfigError: no family can express the model.
    """

    def __init__(
        self,
        config: ExportConfig,
        model: TransformerConfig,
        axes: Mapping[str, tuple[str, ...]],
        shapes: Mapping[str, jax.ShapeDtypeStruct],
        tokenizer,
        stop_ids: frozenset[int],
    ):
        axes = {path: names for path, names in axes.items() if 'lora' not in names}
        self._config, self._model = config, model
        self._axes, self._tokenizer, self._stop_ids = axes, tokenizer, stop_ids
        self._hf_config = write_config(model)
        family = find_family(self._hf_config['model_type'])
        sizes = {path: leaf.shape for path, leaf in shapes.items()}
        self._layout = make_layout(family, model, axes, sizes)
        name = model.param_dtype if config.dtype == 'auto' else config.dtype
        self._dtype = np.dtype(getattr(ml_dtypes, name, None) or name)

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights as written."""
        return sum(map(self._size, self._layout.shapes))

    def _size(self, name: str) -> int:
        return int(np.prod(self._layout.shapes[name])) * self._dtype.itemsize

    def write(self, params: Mapping[str, jax.Array], directory: Path) -> None:
        """Writes the model, replacing the directory if it exists. All processes must call this.

        Raises:
          StorageError, PermissionDeniedError: it cannot be written; no partial files remain.
        """
        directory = directory.absolute()
        partial = directory.with_name(directory.name + '.partial')
        on_primary = functools.partial(_on_primary, directory)
        try:
            on_primary(lambda: _make_anew(partial))
            self._write_weights(params, partial, on_primary)
            on_primary(lambda: self._finish(partial, directory))
        finally:
            if agree.is_primary():
                shutil.rmtree(partial, ignore_errors=True)

    def _finish(self, partial: Path, directory: Path) -> None:
        """Adds configs and tokenizer, then renames the directory to its final name."""
        self._write_configs(partial)
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)

    def _write_weights(self, params, partial: Path, on_primary: Callable) -> None:
        self._merged = '', None
        files, weight_map = self._files(), {}
        for number, names in enumerate(files, start=1):
            several = f'model-{number:05}-of-{len(files):05}.safetensors'
            file = several if len(files) > 1 else WEIGHTS
            weight_map |= dict.fromkeys(names, file)
            self._write_file(params, partial / file, names, on_primary)
        if len(files) > 1:
            index = {'metadata': {'total_size': self.num_bytes}, 'weight_map': weight_map}
            on_primary(lambda: _write_json(partial / INDEX, index))

    def _write_file(self, params, path: Path, names: list[str], on_primary: Callable) -> None:
        """Writes one file of weights.

        Gathering a tensor is a collective: every process must take part until the last one, even
        if writing fails.
        """
        shapes = {name: self._layout.shapes[name] for name in names}
        tensors = run_ahead(self._as_tensor, ((name, self._take(params, name)) for name in names))

        def write():
            try:
                write_safetensors(path, shapes, self._dtype, tensors)
            except OSError:
                _use_up(tensors)
                raise

        if not agree.is_primary():
            _use_up(tensors)
        on_primary(write)

    def _files(self) -> list[list[str]]:
        """The tensor names of each file; only a single tensor may exceed `shard_gigabytes`."""
        most, files, size = self._config.shard_gigabytes * 1e9, [[]], 0
        for name in self._layout.shapes:
            if files[-1] and size + self._size(name) > most:
                files.append([])
                size = 0
            files[-1].append(name)
            size += self._size(name)
        return files

    def tensor(self, params: Mapping[str, jax.Array], name: str) -> np.ndarray:
        """One tensor in the layout of a file."""
        return self._as_tensor((name, self._take(params, name)))

    def _take(self, params, name: str) -> list[jax.Array]:
        """The parts of a tensor, replicated on every device."""
        return [
            take_from(
                self._parameter(params, part.path),
                part.repeat,
                part.way,
                self._axes[part.path],
                self._dtype,
            )
            for part in self._layout.parts_of(name)
        ]

    def _parameter(self, params, path: str) -> jax.Array:
        """A parameter with its adapter merged; caches the last one, which serves many layers."""
        if not self._model.lora:
            return params[path]
        if self._merged[0] != path:
            self._merged = path, lora.merge_parameter(params, path, self._model.lora)
        return self._merged[1]

    def _as_tensor(self, item: tuple[str, list[jax.Array]]) -> np.ndarray:
        name, taken = item
        parts = self._layout.parts_of(name)
        rows = [as_tensor(np.asarray(x), part) for x, part in zip(taken, parts)]
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def _write_configs(self, directory: Path) -> None:
        ids = {'bos_token_id': self._tokenizer.bos_id, 'eos_token_id': sorted(self._stop_ids)}
        dtype = {'torch_dtype': self._dtype.name}
        # config.json gets a single eos id; generation_config.json may have several. An explicit
        # null stops transformers from using a family's default pad id.
        first = {'eos_token_id': self._tokenizer.eos_id, 'pad_token_id': None}
        _write_json(directory / CONFIG, self._hf_config | ids | first | dtype)
        _write_json(directory / GENERATION, ids)
        self._tokenizer.save(directory)
        _put_bos_in_front(directory / 'tokenizer.json', self._tokenizer)
        said = read_json(directory / TOKENIZER) | _reader(directory, self._tokenizer)
        _write_json(directory / TOKENIZER, said)


def _reader(directory: Path, tokenizer) -> dict:
    """tokenizer_config.json keys that make transformers load the vocabulary unchanged."""
    if not (directory / 'tokenizer.model').exists():
        return {'tokenizer_class': 'PreTrainedTokenizerFast'}
    # A SentencePiece model does not record whether texts begin with bos.
    return {'tokenizer_class': 'LlamaTokenizer', 'add_bos_token': tokenizer.bos_id is not None}


def _make_anew(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _use_up(tensors: Iterator) -> None:
    for _ in tensors:
        pass


def _on_primary(directory: Path, write: Callable[[], None]) -> None:
    """Calls `write` on the primary process; if it fails, every process raises the error.

    Raises:
      StorageError, PermissionDeniedError: the directory cannot be written.
    """

    def write_or_explain():
        with explain_write(directory):
            write()

    agree.from_primary(write_or_explain)


def _put_bos_in_front(path: Path, tokenizer) -> None:
    """Makes tokenizer.json add bos to the front of texts if our tokenizer does."""
    if tokenizer.bos_id is None or not path.is_file():
        return
    said = read_json(path)
    bos = next(text for text, i in tokenizer.special_tokens.items() if i == tokenizer.bos_id)
    if json.dumps(bos) in json.dumps(said.get('post_processor')):
        return
    ids = {bos: {'id': bos, 'ids': [tokenizer.bos_id], 'tokens': [bos]}}
    first, texts = {'SpecialToken': {'id': bos, 'type_id': 0}}, ('A', 'B')
    pair = [{'Sequence': {'id': name, 'type_id': kind}} for kind, name in enumerate(texts)]
    template = {
        'type': 'TemplateProcessing',
        'single': [first, pair[0]],
        'pair': [first, *pair],
        'special_tokens': ids,
    }
    # After the existing post-processor, in which byte-level tokenizers correct offsets.
    before = [said['post_processor']] if said.get('post_processor') else []
    said['post_processor'] = {'type': 'Sequence', 'processors': [*before, template]}
    path.write_text(json.dumps(said, ensure_ascii=False), 'utf-8')


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    tensors: Iterator[np.ndarray],
) -> None:
    """Writes one file, tensor by tensor; the library needs all of them in memory at once.

    The format: the length of the header in eight bytes, a JSON header, the tensors.
    """
    header, end = {'__metadata__': {'format': 'pt'}}, 0
    for name, shape in shapes.items():
        start, end = end, end + int(np.prod(shape)) * dtype.itemsize
        header[name] = {
            'dtype': _NAMES[dtype],
            'shape': list(shape),
            'data_offsets': [start, end],
        }
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)  # aligns the tensors
    with path.open('wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        for tensor in tensors:
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + '\n', 'utf-8')

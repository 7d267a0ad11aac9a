"""A llama.cpp `.gguf` file as a Hugging Face model.

This undoes what llama.cpp's converter does to weights: it renames them, permutes the rows of q and
k for interleaved RoPE, and adds 1 to Gemma's norms.
"""

import dataclasses
import re
from pathlib import Path

import numpy as np

from jaxfm.errors import DataError, listed
from jaxfm.pretrained.gguf import container
from jaxfm.pretrained.gguf.architectures import ARCHITECTURES, MATRICES, Architecture
from jaxfm.pretrained.gguf.config import hf_config, token_ids
from jaxfm.pretrained.source import Pretrained

_OUTSIDE = {
    'token_embd': 'model.embed_tokens',
    'output_norm': 'model.norm',
    'output': 'lm_head',
}
# Factors that stretch RoPE wavelengths: read as part of the config, not as weights.
_ROPE_FACTORS = ('rope_freqs', 'rope_factors_long', 'rope_factors_short')


@dataclasses.dataclass(frozen=True)
class Weight:
    """A tensor of the file, and the converter's changes that `read` undoes.

    Attributes:
        heads: number of heads whose rows are interleaved; 0 if rows are in Hugging Face's order.
        offset: the value that the converter added.
    """

    stored: container.Tensor
    heads: int = 0
    offset: float = 0.0

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        if self.heads:
            rows = np.arange(self.stored.shape[0]).reshape(self.heads, -1, 2)
            rows = rows.swapaxes(1, 2).ravel()
            index = (rows[index[0] if index else slice(None)], *index[1:])
        values = self.stored.read(index)
        return values - self.offset if self.offset else values


class GgufTensors:
    """The weights of a file; reading some rows dequantises only those rows."""

    def __init__(self, weights: dict[str, Weight]):
        self._weights = weights
        self.shapes = {name: weight.stored.shape for name, weight in weights.items()}
        self.dtypes = {name: weight.stored.dtype for name, weight in weights.items()}

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A slice of a tensor: float32 if it is quantised, else in the file's dtype."""
        return self._weights[name].read(index)


def open_gguf(path) -> Pretrained:
    """The model in a file; its weights are memory-mapped, not read.

    Raises:
        MissingInputError, PermissionDeniedError: the file does not exist or is not readable.
        DataError: the file is bad (see `container.read`), its architecture is not supported, or
            keys or tensors are missing or unexpected.
    """
    path = Path(path).expanduser()
    metadata, stored = container.read(path)
    name = metadata.get('general.architecture')
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise DataError(
            f'{path} has the architecture {name!r}, which is not supported; supported: '
            f'{", ".join(ARCHITECTURES)}'
        )
    architecture = ARCHITECTURES[name]
    try:
        config = hf_config(architecture, name, metadata, stored)
        weights = _weights(architecture, config, stored)
        tokens = token_ids(metadata)
    except DataError as error:
        raise DataError(f'{path} {error}') from error
    has_tokenizer = 'tokenizer.ggml.tokens' in metadata
    tokenizer = str(path) if has_tokenizer else ''
    return Pretrained(path, config | tokens, GgufTensors(weights), tokenizer, tokens)


def _weights(
    architecture: Architecture, config: dict, stored: dict[str, container.Tensor]
) -> dict[str, Weight]:
    """The weights by Hugging Face name; raises DataError if any is missing or unexpected."""
    names = _names(architecture, config['num_hidden_layers'])
    optional = {name for name in names if name.endswith('.bias')} | {'output.weight'}
    factors = {f'{name}.weight' for name in _ROPE_FACTORS}  # already read by hf_config
    for what, found in (
        ('lacks the tensors', [name for name in names if name not in stored.keys() | optional]),
        ('has unknown tensors', [name for name in stored if name not in names.keys() | factors]),
    ):
        if found:
            raise DataError(f'{what} {listed(found)}')
    weights = {}
    for name in filter(stored.__contains__, names):
        heads = _interleaved_heads(name, config) if architecture.is_interleaved else 0
        if heads and stored[name].shape[0] != heads * config['head_dim']:
            raise DataError(
                f'has {name} of shape {list(stored[name].shape)}, which does not fit '
                f'{heads} heads of {config["head_dim"]}'
            )
        offset = architecture.norm_offset if name.endswith('norm.weight') else 0.0
        weights[names[name]] = Weight(stored[name], heads, offset)
    return weights


def _names(architecture: Architecture, layers: int) -> dict[str, str]:
    """{GGUF name: Hugging Face name} of all tensors that a file may have; biases are optional."""
    names = {f'{theirs}.weight': f'{ours}.weight' for theirs, ours in _OUTSIDE.items()}
    for i in range(layers):
        for theirs, ours in architecture.layer.items():
            for part in ('weight', 'bias') if theirs in MATRICES else ('weight',):
                names[f'blk.{i}.{theirs}.{part}'] = f'model.layers.{i}.{ours}.{part}'
    return names


def _interleaved_heads(name: str, config: dict) -> int:
    found = re.search(r'\.attn_([qk])\.', name)
    if not found:
        return 0
    return config['num_attention_heads' if found[1] == 'q' else 'num_key_value_heads']

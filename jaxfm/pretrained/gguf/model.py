"""A `.gguf` file of llama.cpp as a Hugging Face model.

What llama.cpp's converter does to weights is undone here: names, the rows of q and k that it lays
out for another form of RoPE, and the one that it adds to the norms of Gemma.
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
# Factors by which the wavelengths of RoPE are stretched: part of the config, not of the weights.
_ROPE_FACTORS = ('rope_freqs', 'rope_factors_long', 'rope_factors_short')


@dataclasses.dataclass(frozen=True)
class Weight:
    """A tensor of the file, and what was done to it.

    Attributes:
        heads: the rows of so many heads are interleaved; 0, they are as Hugging Face has them.
        offset: was added to it.
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
    """The weights of a file, dequantised when they are read; of rows alone, only those rows."""

    def __init__(self, weights: dict[str, Weight]):
        self._weights = weights
        self.shapes = {name: weight.stored.shape for name, weight in weights.items()}
        self.dtypes = {name: weight.stored.dtype for name, weight in weights.items()}

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A part of a tensor; for quantised ones float32, for others what the file has."""
        return self._weights[name].read(index)


def open_gguf(path) -> Pretrained:
    """The model in a file; its weights are mapped, not read.

    Raises:
        MissingInputError, PermissionDeniedError: the file is not there, or closed to us.
        DataError: the file is bad (see `container.read`), of an architecture that is not read, or
            lacks or has too many keys or tensors.
    """
    path = Path(path).expanduser()
    metadata, stored = container.read(path)
    name = metadata.get('general.architecture')
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise DataError(
            f'{path} has the architecture {name!r}; read are {", ".join(ARCHITECTURES)}'
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
    """The weights by their Hugging Face names; DataError unless they are just what should be."""
    names = _names(architecture, config['num_hidden_layers'])
    optional = {name for name in names if name.endswith('.bias')} | {'output.weight'}
    factors = {f'{name}.weight' for name in _ROPE_FACTORS}  # read already
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
                f'has {name} of shape {list(stored[name].shape)}, '
                f'for {heads} heads of {config["head_dim"]}'
            )
        offset = architecture.norm_offset if name.endswith('norm.weight') else 0.0
        weights[names[name]] = Weight(stored[name], heads, offset)
    return weights


def _names(architecture: Architecture, layers: int) -> dict[str, str]:
    """All names that a file may have, with those of Hugging Face; biases may be absent."""
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

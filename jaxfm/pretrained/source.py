"""What every reader of a public format returns: a pretrained model, not yet loaded."""

import dataclasses
from pathlib import Path
from typing import Protocol

import numpy as np


class Tensors(Protocol):
    """Weights under their Hugging Face names, in Hugging Face's layout."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A slice of a tensor, by default all of it; only the slice is read into memory."""


@dataclasses.dataclass
class Pretrained:
    """A model whose weights have not been read yet.

    Attributes:
        hf_config: the content of config.json, or its equivalent in another format.
        tokenizer: the value for `tokenizer.path` in a config; '' if the model has no tokenizer.
        generation: the content of generation_config.json, or its equivalent.
    """

    path: Path
    hf_config: dict
    tensors: Tensors
    tokenizer: str
    generation: dict

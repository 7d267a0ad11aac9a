"""A model from outside, whatever format it is stored in."""

import dataclasses
from pathlib import Path
from typing import Protocol

import numpy as np


class Tensors(Protocol):
    """Weights by their Hugging Face names, in the layout of Hugging Face."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A part of a tensor, all of it by default; only that part is read and held."""


@dataclasses.dataclass
class Pretrained:
    """A model as it was found: nothing of its weights is read yet.

    Attributes:
        hf_config: what config.json says, or would say.
        tokenizer: the path to give to the tokenizer config, '' where there is none.
        generation: what generation_config.json says, or would say.
    """

    path: Path
    hf_config: dict
    tensors: Tensors
    tokenizer: str
    generation: dict

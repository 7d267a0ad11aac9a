"""Loads the model of a directory on its own mesh, as a run loads it."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from jaxfm import sharding, state
from jaxfm.models import TransformerConfig
from jaxfm.models.transformer import Transformer
from jaxfm.pretrained.load import load_params
from jaxfm.pretrained.locate import open_pretrained, values_of

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclasses.dataclass
class Loading:
    """mesh: {axis: size}; axes that are not given have size 1."""

    path: Path
    mesh: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        sizes = dict.fromkeys(sharding.MESH_AXES, 1) | self.mesh
        count = int(np.prod(list(sizes.values())))
        self.mesh = sharding.make_mesh(sizes, jax.devices()[:count])
        self.pretrained = open_pretrained(str(self.path))
        self.config = TransformerConfig.model_validate(values_of(self.pretrained)['model'])
        self.split()

    def split(self):
        """Anew, for another config."""
        self.parts = state.split(lambda key: Transformer(self.config, nnx.Rngs(key)))

    def load(self) -> dict[str, jax.Array]:
        with jax.set_mesh(self.mesh):
            return load_params(self.pretrained, self.config, self.parts.axes, self.parts.shapes)

    def places(self) -> dict:
        """{path: sharding} of every parameter in a state."""
        with jax.set_mesh(self.mesh):
            return state.stored_shardings(self.parts)


class Counted:
    """Tensors that count what is read from them.

    Attributes:
        elements, matrices: how many elements were read, in all and of matrices only.
        largest: {name: elements of the largest slice that was read}.
        size: elements of all tensors.
    """

    def __init__(self, tensors):
        self.shapes, self.dtypes, self._tensors = tensors.shapes, tensors.dtypes, tensors
        self.elements = self.matrices = 0
        self.largest = {}
        self.size = int(sum(np.prod(shape) for shape in tensors.shapes.values()))

    def read(self, name, index=()):
        value = self._tensors.read(name, index)
        self.elements += value.size
        self.matrices += value.size if value.ndim == 2 else 0
        self.largest[name] = max(self.largest.get(name, 0), value.size)
        return value

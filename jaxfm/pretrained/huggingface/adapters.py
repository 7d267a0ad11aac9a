"""Loads and exports LoRA adapters: a directory in PEFT's layout to sharded arrays, and back."""

from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from jaxfm import sharding
from jaxfm.models import TransformerConfig
from jaxfm.models.families.base import find_family, write_config
from jaxfm.pretrained.huggingface import peft
from jaxfm.pretrained.huggingface.export import Exporter
from jaxfm.pretrained.layout import make_layout


def load_adapters(
    config: TransformerConfig,
    axes: Mapping[str, tuple[str, ...]],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
    """{path: array} of the adapters in `config.lora.path`. Needs a current mesh.

    Args:
      axes, shapes: {path: logical axes or ShapeDtypeStruct} of every parameter of the model.

    Raises:
      DataError: the adapters do not fit the model, or are damaged.
    """
    family = find_family(config.family or write_config(config)['model_type'])
    base = {path: names for path, names in axes.items() if 'lora' not in names}
    sizes = {path: leaf.shape for path, leaf in shapes.items()}
    layout = make_layout(family, config, base, sizes)
    wanted = {path: sizes[path] for path in axes.keys() - base.keys()}
    arrays = peft.read(config.lora.path, config.lora, layout, wanted)
    return {path: _put(array, axes[path]) for path, array in arrays.items()}


def _put(array: np.ndarray, axes: tuple[str, ...]) -> jax.Array:
    place = sharding.stored_sharding(axes)
    return jax.make_array_from_callback(array.shape, place, lambda index: array[index])


class AdapterExporter(Exporter):
    """Writes only the adapters of a model, in PEFT's layout.

    Args:
      base: the base model's name or path, for `base_model_name_or_path`.
    """

    def __init__(self, config, model, axes, shapes, *arguments, base: str):
        super().__init__(config, model, axes, shapes, *arguments)
        self._base = base
        self._adapters = {path: shapes[path] for path in axes if 'lora' in axes[path]}

    @property
    def num_bytes(self) -> int:
        """Bytes of all adapters as written, in float32."""
        return 4 * sum(leaf.size for leaf in self._adapters.values())

    def _write_weights(self, params, partial: Path, on_primary: Callable) -> None:
        adapters = {path: params[path] for path in self._adapters}
        whole = jax.device_get(jax.jit(lambda x: jax.tree.map(sharding.replicate, x))(adapters))
        lora, layout = self._model.lora, self._layout
        on_primary(lambda: peft.write(partial, whole, lora, layout, self._base))

    def _write_configs(self, directory: Path) -> None:
        """Does nothing: `_write_weights` has written adapter_config.json with the weights."""

"""Weight names and layouts: from the tensors of a file to the parameters of a model, and back.

A file has one tensor per layer and matrices as [outputs, inputs]. A parameter stacks the layers of
a segment and has matrices as [inputs, outputs], with heads and head dimension as separate axes.
`Family.weights` maps tensor names to parameters; this module applies it in both directions. It
reads no files. The "ways" of a parameter are gate and up, its slices along the gate_up axis.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm import sharding
from jaxfm.models import TransformerConfig
from jaxfm.models.families.base import Family


@dataclasses.dataclass(frozen=True)
class Part:
    """A block of rows of a tensor in a file, and the slice of a parameter that it fills."""

    tensor: str
    start: int  # rows [start, start + shape[0]) of the tensor
    shape: tuple[int, ...]  # of the block, as in the file: [outputs, inputs], or [size]
    axes: tuple[str, ...]  # the logical axis by which each dimension of `shape` is sharded
    path: str  # of the parameter
    repeat: int | None = None  # index in the parameter's stack of layers
    way: int | None = None  # index along its gate_up axis

    @property
    def is_turned(self) -> bool:
        """Whether the parameter stores it transposed: all matrices except embedding tables."""
        return len(self.shape) == 2 and 'vocab' not in self.axes


@dataclasses.dataclass(frozen=True)
class Layout:
    """Every tensor that the files of a model must have, and the parameters they fill.

    shapes: {tensor: shape}. parts: {path of a parameter: its parts}, in order.
    """

    shapes: dict[str, tuple[int, ...]]
    parts: dict[str, list[Part]]

    def parts_of(self, tensor: str) -> list[Part]:
        """The parts of a tensor, ordered by row."""
        return self._by_tensor[tensor]

    @functools.cached_property
    def _by_tensor(self) -> dict[str, list[Part]]:
        found = {}
        for part in (part for parts in self.parts.values() for part in parts):
            found.setdefault(part.tensor, []).append(part)
        return {name: sorted(parts, key=lambda part: part.start) for name, parts in found.items()}


def make_layout(
    family: Family,
    config: TransformerConfig,
    axes: Mapping[str, tuple[str, ...]],
    shapes: Mapping[str, tuple[int, ...]],
) -> Layout:
    """The layout of a model in the files of a family.

    Args:
      axes, shapes: {path of a parameter: logical axes or shape}, including the layers axis.

    Raises:
      ValueError: the family has no name for some parameter.
    """
    tensors, parts = {}, {}
    for name, prefix, repeat, targets in _tensors(family, config):
        start, rows = 0, []
        for target in targets:
            path, way = _split_way(prefix + target, axes)
            if path in axes:
                part = _part(name, start, path, repeat, way, axes[path], shapes[path], config)
                rows.append(part)
                start += part.shape[0]
        if len(rows) == len(targets):  # else it is optional (bias, head, norm) and absent here
            tensors[name] = (start, *rows[0].shape[1:])
            for part in rows:
                parts.setdefault(part.path, []).append(part)
    uncovered = sorted(axes.keys() - parts.keys())
    if uncovered:
        raise ValueError(f'{family.model_type} has no weight names for {", ".join(uncovered)}')
    return Layout(tensors, parts)


def _tensors(family: Family, config: TransformerConfig):
    """(name, path prefix, repeat, targets) of every tensor that the family may have."""
    for template, target in family.weights.items():
        targets = (target,) if isinstance(target, str) else target
        if '{}' not in template:
            yield template, '', None, targets
            continue
        layer = 0
        for number, segment in enumerate(config.trunk):
            for repeat in range(segment.repeats):
                for place in range(len(segment.pattern)):
                    prefix = f'trunk/{number}/{place}/'
                    yield template.format(layer), prefix, repeat, targets
                    layer += 1


def _split_way(target: str, axes) -> tuple[str, int | None]:
    path, _, last = target.rpartition('/')
    return (path, int(last)) if last.isdigit() and path in axes else (target, None)


def _part(name, start, path, repeat, way, names, shape, config) -> Part:
    kept = [(n, size) for n, size in zip(names, shape) if n not in ('layers', 'gate_up')]
    names, sizes = [n for n, _ in kept], [size for _, size in kept]
    if 'vocab' in names:
        shape, axes = (config.vocab_size, sizes[1]), tuple(names)
    elif 'embed' not in names:
        shape, axes = (math.prod(sizes),), (names[0],)
    elif names[0] == 'embed':
        shape, axes = (math.prod(sizes[1:]), sizes[0]), (names[1], 'embed')
    else:
        shape, axes = (sizes[-1], math.prod(sizes[:-1])), ('embed', names[0])
    return Part(name, start, shape, axes, path, repeat, way)


@functools.partial(jax.jit, static_argnames=('shape', 'dtype', 'axes'))
def make_stack(shape, dtype, axes):
    """A zero parameter with the sharding of a stored weight, to be filled by `put_into`."""
    return jnp.zeros(shape, dtype, out_sharding=sharding.stored_weight(axes))


@functools.partial(jax.jit, static_argnames=('axes', 'shape', 'dtype'))
def as_parameter(value, axes, shape, dtype):
    """A parameter from its only part."""
    return jnp.reshape(value.astype(dtype), shape, out_sharding=sharding.stored_weight(axes))


@functools.partial(jax.jit, static_argnames=('axes',), donate_argnums=0)
def put_into(stack, value, repeat, way, axes):
    """Replaces a part of a stacked parameter, which is donated: one layer, one way, or both.

    Args:
      repeat, way: None for a part with all layers, or all ways.
      axes: of the stack.
    """
    chosen = {'layers': repeat, 'gate_up': way}
    chosen = {name: index for name, index in chosen.items() if index is not None}
    shape = tuple(1 if name in chosen else n for name, n in zip(axes, stack.shape))
    starts = [chosen.get(name, 0) for name in axes]
    value = jnp.reshape(value.astype(stack.dtype), shape, out_sharding=sharding.stored_weight(axes))
    return jax.lax.dynamic_update_slice(stack, value, starts)


@functools.partial(jax.jit, static_argnames=('axes', 'dtype'))
def take_from(parameter, repeat, way, axes, dtype):
    """One layer (and way) of a parameter, replicated on every device.

    Args:
      axes: of the parameter.
    """
    for name, index in (('layers', repeat), ('gate_up', way)):
        if name in axes:
            at = axes.index(name)
            parameter = jax.lax.dynamic_index_in_dim(parameter, index, at, keepdims=False)
            axes = axes[:at] + axes[at + 1 :]
    return sharding.replicate(parameter.astype(dtype))


def as_tensor(value: np.ndarray, part: Part) -> np.ndarray:
    """Converts a result of `take_from` to the layout of a file."""
    if part.is_turned:
        return transpose(value.reshape(part.shape[::-1]))
    return value[: part.shape[0]] if 'vocab' in part.axes else value.reshape(part.shape)


def transpose(matrix: np.ndarray, rows: int = 64) -> np.ndarray:
    """A contiguous copy of matrix.T.

    Copies `rows` rows at a time, so that they stay in the CPU cache: one copy of the whole takes
    four times as long.
    """
    # View as integers of the same size: numpy copies foreign dtypes element by element.
    bits = matrix.view(f'u{matrix.itemsize}')
    turned = allocate_aligned(bits.shape[::-1], bits.dtype)
    for start in range(0, len(bits), rows):
        turned[:, start : start + rows] = bits[start : start + rows].T
    return turned.view(matrix.dtype)


def allocate_aligned(shape: tuple[int, ...], dtype) -> np.ndarray:
    """An uninitialised array, aligned to 64 bytes so that JAX on CPU adopts it without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)

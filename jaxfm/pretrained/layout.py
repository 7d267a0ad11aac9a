"""Weight names and layouts: from the tensors of a file to the parameters of a model, and back.

A file has one tensor a layer and matrices as [outputs, inputs]; a parameter stacks the layers of a
segment and has matrices as [inputs, outputs] with heads and their dimensions apart. The table of a
family (`Family.weights`) says which tensor is which parameter; here it is applied, in both
directions. Nothing here reads a file.
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
    """Rows of a tensor in a file, and the part of a parameter that they are."""

    tensor: str
    start: int  # rows [start, start + shape[0]) of the tensor
    shape: tuple[int, ...]  # of these rows, as in the file: [outputs, inputs], or [size]
    axes: tuple[str, ...]  # the logical axis along which each of these dimensions is sharded
    path: str
    repeat: int | None = None  # index in the stack of layers
    way: int | None = None  # index along gate_up

    @property
    def is_turned(self) -> bool:
        """Whether the parameter has it transposed: a matrix that is no table of tokens."""
        return len(self.shape) == 2 and 'vocab' not in self.axes


@dataclasses.dataclass(frozen=True)
class Layout:
    """Every tensor that a file of a model must have, and where it goes.

    shapes: {tensor: shape}. parts: {path of a parameter: its parts}; each in order.
    """

    shapes: dict[str, tuple[int, ...]]
    parts: dict[str, list[Part]]

    def parts_of(self, tensor: str) -> list[Part]:
        """The parts of a tensor, by row."""
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
      axes, shapes: {path of a parameter: logical axes, shape}, stacked layers included.
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
        if len(rows) == len(targets):  # biases, a head and norms that this model has not
            tensors[name] = (start, *rows[0].shape[1:])
            for part in rows:
                parts.setdefault(part.path, []).append(part)
    uncovered = sorted(axes.keys() - parts.keys())
    if uncovered:
        raise ValueError(f'the names of {family.model_type} have none for {", ".join(uncovered)}')
    return Layout(tensors, parts)


def _tensors(family: Family, config: TransformerConfig):
    """(name, prefix of the paths, repeat, targets) of every tensor that the family may have."""
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
    """A parameter to be filled by `put_into`, sharded as it is stored."""
    return jnp.zeros(shape, dtype, out_sharding=sharding.stored_weight(axes))


@functools.partial(jax.jit, static_argnames=('axes', 'shape', 'dtype'))
def as_parameter(value, axes, shape, dtype):
    """A parameter that is not stacked, of its only part."""
    return jnp.reshape(value.astype(dtype), shape, out_sharding=sharding.stored_weight(axes))


@functools.partial(jax.jit, static_argnames=('axes',), donate_argnums=0)
def put_into(stack, value, repeat, way, axes):
    """A stacked parameter, which is donated, with one layer (and way) replaced.

    Args:
      axes: of the stack. way: None where it has no gate_up axis.
    """
    shape = tuple(1 if name in ('layers', 'gate_up') else n for name, n in zip(axes, stack.shape))
    starts = [{'layers': repeat, 'gate_up': way}.get(name, 0) for name in axes]
    value = jnp.reshape(value.astype(stack.dtype), shape, out_sharding=sharding.stored_weight(axes))
    return jax.lax.dynamic_update_slice(stack, value, starts)


@functools.partial(jax.jit, static_argnames=('axes', 'dtype'))
def take_from(parameter, repeat, way, axes, dtype):
    """One layer (and way) of a parameter, whole on every device.

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
    """What `take_from` gives, as it lies in a file."""
    if part.is_turned:
        return transpose(value.reshape(part.shape[::-1]))
    return value[: part.shape[0]] if 'vocab' in part.axes else value.reshape(part.shape)


def transpose(matrix: np.ndarray, rows: int = 64) -> np.ndarray:
    """matrix.T as an array of its own.

    Made of so many rows at a time, which stay in the cache: at once it takes four times as long.
    """
    # Integers of the same size: numpy copies foreign dtypes element by element.
    bits = matrix.view(f'u{matrix.itemsize}')
    turned = allocate_aligned(bits.shape[::-1], bits.dtype)
    for start in range(0, len(bits), rows):
        turned[:, start : start + rows] = bits[start : start + rows].T
    return turned.view(matrix.dtype)


def allocate_aligned(shape: tuple[int, ...], dtype) -> np.ndarray:
    """An array to be filled, which JAX on CPU takes over without copying it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)

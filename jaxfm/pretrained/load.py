"""Streams the weights of a pretrained model into arrays with the sharding of stored weights.

Host memory holds only a few tensors at a time, and of each only this process's shards: the next
tensors are prefetched while one is put into its stack on the devices.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence

import jax

from jaxfm import sharding
from jaxfm.errors import DataError, listed
from jaxfm.models import TransformerConfig
from jaxfm.models.families.base import find_family
from jaxfm.pretrained.layout import (
    Layout,
    Part,
    allocate_aligned,
    as_parameter,
    make_layout,
    make_stack,
    put_into,
    transpose,
)
from jaxfm.pretrained.pipeline import run_ahead
from jaxfm.pretrained.source import Pretrained, Tensors

# Tensors of older files that are ignored: a second copy of a tied output projection, and buffers
# that can be computed.
_REDUNDANT = ('lm_head.weight', '.rotary_emb.inv_freq', '.self_attn.masked_bias')


def load_params(
    pretrained: Pretrained,
    config: TransformerConfig,
    axes: Mapping[str, tuple[str, ...]],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
    """{path: array} of every parameter. Needs a current mesh; raises what `check_layout` raises."""
    layout = check_layout(pretrained, config, axes, shapes)
    parts = list(itertools.chain(*layout.parts.values()))
    places = {part: sharding.stored_sharding(_turn(part, part.axes)) for part in parts}
    tensors = pretrained.tensors

    def read(part):  # runs in a thread, which does not inherit the current mesh
        return _read(tensors, part, shapes[part.path], places[part])

    return fill_params(parts, read, axes, shapes)


def fill_params(
    parts: Sequence,
    read: Callable[..., jax.Array],
    axes: Mapping[str, tuple[str, ...]],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
    """{path: array} of the parameters that the parts fill.

    Args:
      parts: each with `path`, `repeat` and `way`, as in `layout.Part`.
      read: called in threads; returns a part in the parameter's orientation.
    """
    params = {}
    for part, tensor in zip(parts, run_ahead(read, parts)):
        path = part.path
        params[path] = _put(params.get(path), tensor, part, axes[path], shapes[path])
        # Dispatch is asynchronous: without a wait, any number of tensors could pile up in memory.
        params[path].block_until_ready()
    return params


def check_layout(
    pretrained: Pretrained,
    config: TransformerConfig,
    axes: Mapping[str, tuple[str, ...]],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
) -> Layout:
    """The layout of a model, checked against the tensors it has; reads no weights.

    Raises:
      DataError: tensors are missing, unexpected or of another shape than the config implies.
    """
    sizes = {path: leaf.shape for path, leaf in shapes.items()}
    layout = make_layout(find_family(config.family), config, axes, sizes)
    there = pretrained.tensors.shapes
    extra = [n for n in there.keys() - layout.shapes.keys() if not n.endswith(_REDUNDANT)]
    wrong = [
        f'{name} is {list(there[name])}, not {list(shape)}'
        for name, shape in layout.shapes.items()
        if name in there and there[name] != shape
    ]
    problems = {
        'missing': sorted(layout.shapes.keys() - there.keys()),
        'unexpected': sorted(extra),
        'wrong shape': wrong,
    }
    lines = [f'{what}: {listed(names)}' for what, names in problems.items() if names]
    if lines:
        raise DataError(
            f'{pretrained.path}: the weights do not match its config; ' + '; '.join(lines)
        )
    return layout


def _turn(part: Part, pair: tuple) -> tuple:
    """Reorders one value per dimension from the axis order of the file to the parameter's."""
    return pair[::-1] if part.is_turned else pair


def _put(stack: jax.Array | None, value: jax.Array, part, axes, leaf) -> jax.Array:
    """The parameter with one more part filled in; `stack` is None before its first part."""
    if part.repeat is None and part.way is None:
        return as_parameter(value, axes, leaf.shape, leaf.dtype)
    if stack is None:
        stack = make_stack(leaf.shape, leaf.dtype, axes)
    return put_into(stack, value, part.repeat, part.way, axes)


def _read(tensors: Tensors, part: Part, leaf, place) -> jax.Array:
    """The part in the parameter's orientation; each process reads only its own shards."""
    shape = part.shape
    if 'vocab' in part.axes:  # padded to model.vocab_multiple
        shape = (leaf.shape[0], shape[1])

    @functools.cache  # JAX calls it again for every replica
    def read(index):
        rows, *columns = (slice(*i.indices(n)[:2]) for i, n in zip(_turn(part, index), shape))
        count = max(0, min(rows.stop, part.shape[0]) - rows.start)  # the rest is padding
        here = slice(part.start + rows.start, part.start + rows.start + count)
        if part.is_turned:
            return transpose(tensors.read(part.tensor, (here, *columns)))
        # Always copy: on CPU the array could otherwise alias the memory-mapped file.
        size = tuple(i.stop - i.start for i in (rows, *columns))
        values = allocate_aligned(size, tensors.dtypes[part.tensor])
        values[:count] = tensors.read(part.tensor, (here, *columns)) if count else 0
        values[count:] = 0
        return values

    return jax.make_array_from_callback(_turn(part, shape), place, read)

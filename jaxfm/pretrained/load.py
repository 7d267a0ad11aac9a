"""The weights of a model from outside, streamed into arrays that are sharded as they are stored.

A few tensors of the file are in the host's memory at a time, of each only what this process holds:
the next ones are read while one is turned and put into its stack on the devices.
"""

import functools
import itertools
from collections.abc import Mapping

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

# What old files have beside the weights: the output projection once more where it is tied, and
# what can be computed.
_REDUNDANT = ('lm_head.weight', '.rotary_emb.inv_freq', '.self_attn.masked_bias')


def load_params(
    pretrained: Pretrained,
    config: TransformerConfig,
    axes: Mapping[str, tuple[str, ...]],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
    """{path: array} of every parameter; needs the mesh to be set. Raises as `check_layout`."""
    layout = check_layout(pretrained, config, axes, shapes)
    parts = list(itertools.chain(*layout.parts.values()))
    places = {part: sharding.stored_sharding(_turn(part, part.axes)) for part in parts}
    tensors = pretrained.tensors

    def read(part):  # in a thread, which does not know the mesh
        return _read(tensors, part, shapes[part.path], places[part])

    params = {}
    for part, tensor in zip(parts, run_ahead(read, parts)):
        path = part.path
        params[path] = _put(params.get(path), tensor, part, axes[path], shapes[path])
        # JAX would take any number of tensors before it is done with the first of them.
        params[path].block_until_ready()
    return params


def check_layout(
    pretrained: Pretrained,
    config: TransformerConfig,
    axes: Mapping[str, tuple[str, ...]],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
) -> Layout:
    """Where the tensors of a model go; no weight is read.

    Raises:
      DataError: they are not those of its config: missing, superfluous or of another shape.
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
        'not of this model': sorted(extra),
        'misshapen': wrong,
    }
    lines = [f'{what}: {listed(names)}' for what, names in problems.items() if names]
    if lines:
        raise DataError(
            f'{pretrained.path}: the weights are not those of its config; ' + '; '.join(lines)
        )
    return layout


def _turn(part: Part, pair: tuple) -> tuple:
    """Something of each dimension of a part, in the order of the parameter."""
    return pair[::-1] if part.is_turned else pair


def _put(stack: jax.Array | None, value: jax.Array, part: Part, axes, leaf) -> jax.Array:
    """The parameter with one more of its parts; None is one that has none yet."""
    if not {'layers', 'gate_up'} & set(axes):
        return as_parameter(value, axes, leaf.shape, leaf.dtype)
    if stack is None:
        stack = make_stack(leaf.shape, leaf.dtype, axes)
    return put_into(stack, value, part.repeat, part.way, axes)


def _read(tensors: Tensors, part: Part, leaf, place) -> jax.Array:
    """The part, turned as the parameter has it; each process has read its own shards of it."""
    shape = part.shape
    if 'vocab' in part.axes:  # rows up to a multiple, for tokens that do not exist
        shape = (leaf.shape[0], shape[1])

    @functools.cache  # JAX asks once more for every replica
    def read(index):
        rows, *columns = (slice(*i.indices(n)[:2]) for i, n in zip(_turn(part, index), shape))
        count = max(0, min(rows.stop, part.shape[0]) - rows.start)  # the others are padding
        here = slice(part.start + rows.start, part.start + rows.start + count)
        if part.is_turned:
            return transpose(tensors.read(part.tensor, (here, *columns)))
        # A copy in any case: on CPU an array may else go on living in the file.
        size = tuple(i.stop - i.start for i in (rows, *columns))
        values = allocate_aligned(size, tensors.dtypes[part.tensor])
        values[:count] = tensors.read(part.tensor, (here, *columns)) if count else 0
        values[count:] = 0
        return values

    return jax.make_array_from_callback(_turn(part, shape), place, read)

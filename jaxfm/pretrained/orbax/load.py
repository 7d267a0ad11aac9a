"""Starts a model from a tree that stock Orbax saved: checks it against the model, then loads it.

Host memory holds this process's shards of a few stored arrays at a time, as in `pretrained.load`.
"""

import dataclasses
import difflib
import fnmatch
import functools
import logging
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm import sharding
from jaxfm.errors import DataError, listed
from jaxfm.models import TransformerConfig
from jaxfm.pretrained.layout import allocate_aligned
from jaxfm.pretrained.load import fill_params
from jaxfm.pretrained.orbax.directory import open_tree
from jaxfm.pretrained.orbax.table import Part, make_parts
from jaxfm.pretrained.orbax.tensors import OrbaxTensors

log = logging.getLogger('jaxfm')


class Foreign:
    """A saved tree with its table of names; `check` it against a model, then `load` it.

    Args:
        place: of the tree, as `find_tree` returned it.
        names: {key of a parameter: entry} as in `config.init_names`.
        ignored: patterns of stored names that are no parameters.

    Raises what `open_tree` and `OrbaxTensors` raise.
    """

    def __init__(self, place: str, names: Mapping[str, str], ignored: Sequence[str]):
        tree, self._names, self.path = open_tree(place), names, place
        dropped = {n for n in tree.arrays for p in ignored if fnmatch.fnmatchcase(n, p)}
        arrays = {name: zarr for name, zarr in tree.arrays.items() if name not in dropped}
        self._left_out = [*tree.left_out, *sorted(dropped)]
        self._tensors = OrbaxTensors(dataclasses.replace(tree, arrays=arrays))

    def check(
        self,
        config: TransformerConfig,
        axes: Mapping[str, tuple[str, ...]],
        shapes: Mapping[str, jax.ShapeDtypeStruct],
    ) -> list[Part]:
        """The parts of all parameters, checked against what is stored; reads no weights.

        Raises:
            ConfigError: the table does not fit the model.
            DataError: arrays are missing, unexpected or of another shape, or lack chunks.
        """
        parts = make_parts(self._names, config, axes, shapes)
        lines = [f'{what}: {listed(them)}' for what, them in self._problems(parts, axes) if them]
        if lines:
            more = '' if self._names else '; config.init_names can map our names to theirs'
            raise DataError(
                f'{self.path}: the checkpoint does not fit the model of this config; '
                + '; '.join(lines)
                + more
            )
        self._tensors.check_chunks(sorted({part.name for part in parts}))
        return parts

    def load(
        self,
        config: TransformerConfig,
        axes: Mapping[str, tuple[str, ...]],
        shapes: Mapping[str, jax.ShapeDtypeStruct],
    ) -> dict[str, jax.Array]:
        """{path: array} of every parameter. Needs a current mesh; raises what `check` raises."""
        parts = self.check(config, axes, shapes)
        places = {part: sharding.stored_sharding(part.axes) for part in parts}
        self._report(parts, shapes)

        def read(part):  # runs in a thread, which does not inherit the current mesh
            return _read(self._tensors, part, places[part])

        return fill_params(parts, read, axes, shapes)

    def _problems(self, parts: list[Part], axes) -> list[tuple[str, list[str]]]:
        there, dtypes = self._tensors.shapes, self._tensors.dtypes
        wanted = {part.name: part for part in parts}
        filled = {part.path for part in parts}
        halves = {path: {part.way for part in parts if part.path == path} for path in filled}
        unnamed = [path for path in axes if path not in filled]
        unnamed += [
            f'{path} has only one half' for path in halves if len(halves[path] & {0, 1}) == 1
        ]
        extra = sorted(there.keys() - wanted.keys())
        missing = [f'{name}{_near(name, extra)}' for name in sorted(wanted.keys() - there.keys())]
        found = [part for part in parts if part.name in there]
        wrong = [
            _wrong(part, there[part.name]) for part in found if not part.fits(there[part.name])
        ]
        odd = sorted({part.name for part in found if not _is_float(dtypes[part.name])})
        return [
            ('not in config.init_names', unnamed),
            ('missing', missing),
            ('unexpected', extra),
            ('wrong shape', wrong),
            ('not floating point', [f'{name} is {dtypes[name]}' for name in odd]),
        ]

    def _report(self, parts: list[Part], shapes) -> None:
        names = {part.name: part for part in parts}
        dtypes = sorted({str(self._tensors.dtypes[name]) for name in names})
        kept = sorted({str(shapes[part.path].dtype) for part in parts})
        log.info(
            '%s: %d arrays of %s, kept as %s',
            *(self.path, len(names), ', '.join(dtypes), ', '.join(kept)),
        )
        split = [n for n, part in names.items() if part.is_merged(self._tensors.shapes[n])]
        if split:
            log.info('reshaped, heads and head_dim are stored as one axis: %s', listed(split))
        if self._left_out:
            log.info('left out: %s', listed(self._left_out))


def _near(name: str, extra: list[str]) -> str:
    near = difflib.get_close_matches(name, extra, 1)
    return f' (there is {near[0]})' if near else ''


def _wrong(part: Part, shape: tuple[int, ...]) -> str:
    entry = f' for {part.key}' if part.key else ''
    axes = f' [{", ".join(part.stored)}]'
    vocab = f', with model.vocab_size {part.rows}' if 'vocab' in part.stored else ''
    return f'{part.name} is {list(shape)}, not {list(part.stored_shape)}{axes}{entry}{vocab}'


def _is_float(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _read(tensors: OrbaxTensors, part: Part, place) -> jax.Array:
    """The part in the parameter's orientation; each process reads only its own shards."""
    stored = tensors.shapes[part.name]

    @functools.cache  # JAX calls it again for every replica
    def read(index):
        wanted = {
            axis: slice(*one.indices(size)[:2])
            for axis, one, size in zip(part.axes, index, part.shape)
        }
        size = tuple(one.stop - one.start for one in wanted.values())
        if 'vocab' not in wanted:
            return _read_stored(tensors, part, wanted).reshape(size)
        rows, there = wanted['vocab'], stored[part.stored.index('vocab')]
        count = max(0, min(rows.stop, there) - rows.start)  # the rest is padding
        values = allocate_aligned(size, tensors.dtypes[part.name])
        at = part.axes.index('vocab')
        head, tail = ((slice(None),) * at + (one,) for one in (slice(0, count), slice(count, None)))
        if count:
            wanted['vocab'] = slice(rows.start, rows.start + count)
            values[head] = _read_stored(tensors, part, wanted)
        values[tail] = 0
        return values

    return jax.make_array_from_callback(part.shape, place, read)


def _read_stored(tensors: OrbaxTensors, part: Part, wanted: dict[str, slice]) -> np.ndarray:
    """A slice of a stored array, its axes in our order, heads and head_dim as they are stored."""
    if 'layers' in wanted:
        numbers = range(part.num_layers)[part.layers][wanted['layers']]
        wanted['layers'] = slice(numbers.start, numbers.stop, numbers.step)
    index, stored = tuple(wanted[axis] for axis in part.stored), part.stored
    axes = part.axes
    if part.is_merged(tensors.shapes[part.name]):
        width = part.sizes['head_dim']  # never split over devices
        index = part.merge(index, lambda one, _: slice(one.start * width, one.stop * width))
        stored = part.merge(stored, lambda one, _: one)
        axes = tuple(axis for axis in axes if axis != 'head_dim')
    return tensors.read(part.name, index, tuple(stored.index(axis) for axis in axes))

"""The table from our parameters to the arrays of a saved tree; pure arithmetic on names and shapes.

A key of the table is the path of a parameter, 'trunk/0/0/attention/q', or with 'layers' for the
blocks of every segment, 'layers/attention/q'. A projection with a gate may have one array for each
half: 'layers/mlp/gate_up/0' is the gate, 'layers/mlp/gate_up/1' the other. The value is parsed by
`parse_entry`. Without a table, the arrays must have our own names, shapes and order of axes.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping

import jax

from jaxfm.errors import ConfigError
from jaxfm.models import TransformerConfig
from jaxfm.pretrained.orbax import LAYER, Entry, parse_entry

_HEADS = ('heads', 'kv_heads')


@dataclasses.dataclass(frozen=True)
class Part:
    """A stored array, and the parameter that it is, or the slice of one that it fills.

    Attributes:
        key: of its entry in the table; '' without a table.
        axes: logical axes of the slice. stored: the same axes in the order in which it is stored.
        sizes: {axis: size} of the parameter.
        rows: the size that the vocab axis has without padding.
        repeat, way: index in the parameter's stack of layers, and along its gate_up axis.
        layers: which of the stored layers, if it has more than the parameter.
    """

    path: str
    key: str
    name: str
    axes: tuple[str, ...]
    stored: tuple[str, ...]
    sizes: dict[str, int] = dataclasses.field(hash=False)
    rows: int
    repeat: int | None = None
    way: int | None = None
    layers: slice = slice(None)
    num_layers: int = 0  # stored layers, if it has that axis

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the slice of the parameter; vocab is padded."""
        return tuple(self.sizes[axis] for axis in self.axes)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape that the stored array should have, unless `fits` accepts another."""
        sizes = self.sizes | {'vocab': self.rows, 'layers': self.num_layers}
        return tuple(sizes[axis] for axis in self.stored)

    @property
    def merged_at(self) -> int | None:
        """The place among the stored axes of heads before head_dim, which may be one axis."""
        pairs = enumerate(zip(self.stored, self.stored[1:]))
        found = [at for at, (one, two) in pairs if one in _HEADS and two == 'head_dim']
        return found[0] if found else None

    def merge(self, values: tuple, join=lambda one, two: one * two) -> tuple:
        """One value per stored axis -> the same with heads and head_dim joined into one."""
        at = self.merged_at
        return (*values[:at], join(*values[at : at + 2]), *values[at + 2 :])

    def is_merged(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape has its heads and head_dim in one axis."""
        return self.merged_at is not None and len(shape) < len(self.stored)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape can be read: heads merged or not, vocab padded or not."""
        if 'vocab' in self.stored:
            padded = tuple(self.sizes[axis] for axis in self.stored)
            return shape in (self.stored_shape, padded)
        wanted = self.stored_shape
        return shape == (self.merge(wanted) if self.is_merged(shape) else wanted)


def make_parts(
    names: Mapping[str, str],
    config: TransformerConfig,
    axes: Mapping[str, tuple[str, ...]],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
) -> list[Part]:
    """The parts of all parameters that the table names; of all of them, if it is empty.

    Args:
        axes, shapes: {path of a parameter: logical axes or shape}, including the layers axis.

    Raises:
        ConfigError: an entry names no parameter, or other axes than it has.
    """
    parts, used = [], set()
    for path in axes:
        about = (path, config, axes[path], shapes[path].shape)
        if not names:
            parts += _expand(*about, '', None, Entry(path))
        for key, way in _find_keys(path, axes[path], names):
            used.add(key)
            parts += _expand(*about, key, way, parse_entry(names[key]))
    for key in names:
        if key not in used:
            raise ConfigError(
                f'config.init_names: the model has no parameter {key}' + _hint(key, axes)
            )
    return parts


def name_of(path: str) -> str:
    """The shortest key for a parameter."""
    return '/'.join(('layers', *path.split('/')[3:])) if path.startswith('trunk/') else path


def _hint(key: str, axes) -> str:
    known = {name: path for path in axes for name in (path, name_of(path))}
    near = difflib.get_close_matches(key, known, 1)
    return f'; did you mean {near[0]}?' if near else f'; it has {", ".join(map(name_of, axes))}'


def _find_keys(path: str, axes, names) -> list[tuple[str, int | None]]:
    """The keys of a parameter in the table, and their ways; a path goes before 'layers'."""
    for key in (path, name_of(path)):
        if key in names:
            return [(key, None)]
        ways = [(f'{key}/{way}', way) for way in (0, 1) if 'gate_up' in axes]
        if any(one in names for one, _ in ways):
            return [(one, way) for one, way in ways if one in names]
    return []


def _expand(path, config, axes, shape, key, way, entry: Entry) -> Iterator[Part]:
    """The parts of one entry: one, or one per layer."""
    by_layer = LAYER in entry.name
    if by_layer and 'layers' not in axes:
        raise ConfigError(f'config.init_names: {key} is not in a layer, so it has no {LAYER}')
    dropped = {'layers': by_layer, 'gate_up': way is not None}
    own = tuple(axis for axis in axes if not dropped.get(axis))
    if entry.axes and sorted(entry.axes) != sorted(own):
        raise ConfigError(
            f'config.init_names: {key} has the axes [{", ".join(own)}], in any order, '
            f'not [{", ".join(entry.axes)}]'
        )
    sizes, rows = dict(zip(axes, shape)), config.vocab_size
    layers, repeats = _layers_of(path, config, key), sizes.get('layers', 0)
    common = (path, key), (own, entry.axes or own, sizes, rows)
    if by_layer:
        for repeat, layer in enumerate(layers):
            name = entry.name.replace(LAYER, str(layer))
            yield Part(*common[0], name, *common[1], repeat=repeat, way=way)
        return
    chosen, stored = slice(None), repeats
    if 'layers' in own and key.startswith('layers/'):
        chosen, stored = slice(layers.start, layers.stop, layers.step), config.num_layers
    yield Part(*common[0], entry.name, *common[1], way=way, layers=chosen, num_layers=stored)


def _layers_of(path: str, config, key: str) -> range:
    """The numbers, in the whole model, of the layers in a parameter's stack."""
    if not path.startswith('trunk/'):
        return range(0)
    number, place = map(int, path.split('/')[1:3])
    before = sum(len(one.pattern) * one.repeats for one in config.trunk[:number])
    segment = config.trunk[number]
    first, step = before + place, len(segment.pattern)
    return range(first, first + step * segment.repeats, step)

"""Where arrays live: the mesh, the tables from logical to mesh axes, the moves between them.

A model names the dimensions of its weights and activations; only this file knows the mesh. Three
tables, because a weight lives in two places: sharded over `fsdp` as it is *stored*, whole in
`embed` while it is *used*; activations follow the batch. The mesh is Explicit: shardings are part
of array types, so an ambiguous product is an error at trace time instead of a silent all-gather.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxfm.errors import ConfigError

# In the order of the links they need: replica crosses the slow network, tensor the fastest one.
MESH_AXES = ('replica', 'fsdp', 'expert', 'context', 'tensor')

STORED = {
    'vocab': 'tensor',
    'embed': 'fsdp',
    'heads': 'tensor',
    'kv_heads': 'tensor',
    'mlp': 'tensor',
    'head_dim': None,
    'gate_up': None,
    'lora': None,
    'norm': None,
    'layers': None,
}
USED = {**STORED, 'embed': None}
ACTIVATIONS = {
    'batch': ('replica', 'fsdp', 'expert'),
    'position': 'context',
    'key_position': None,  # every query needs all keys: they are gathered over context
    'embed': None,
    'heads': 'tensor',
    'kv_heads': 'tensor',
    'group': None,
    'head_dim': None,
    'mlp': 'tensor',
    'gate_up': None,
    'lora': None,
    'vocab': 'tensor',
    'layers': None,
    'microbatch': None,
    'chunk': None,
}
LARGE_PARAMETER = 1 << 20  # elements; a smaller one may stay replicated


def mesh_shape(sizes: dict[str, int], num_devices: int) -> dict[str, int]:
    """Fills the one axis given as -1 so that the product is the number of devices."""
    known = math.prod(n for n in sizes.values() if n != -1)
    free = [axis for axis in MESH_AXES if sizes[axis] == -1]
    shown = ' x '.join(f'{axis} {sizes[axis]}' for axis in MESH_AXES if sizes[axis] != 1) or '1'
    if free and num_devices % known == 0:
        return {**sizes, free[0]: num_devices // known}
    if free or known != num_devices:
        relation = 'does not divide' if free else 'is not'
        raise ConfigError(
            f'config.mesh: {shown} = {known} {relation} the {num_devices} devices here'
        )
    return dict(sizes)


def make_mesh(sizes: dict[str, int], devices=None) -> jax.sharding.Mesh:
    """The Explicit mesh of all five axes (size 1 when unused). `sizes` may hold one -1."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(sizes, len(devices))
    return jax.make_mesh(
        tuple(shape[axis] for axis in MESH_AXES),
        MESH_AXES,
        axis_types=(AxisType.Explicit,) * len(MESH_AXES),
        devices=devices,
    )


def _spec(table, names) -> P:
    return P(*(None if name is None else table[name] for name in names))


def stored_spec(axes) -> P:
    """The sharding of a weight at rest, from its logical axes."""
    return _spec(STORED, axes)


def stored_weight(axes) -> P | None:
    """`stored_spec` for `out_sharding=`; None where no mesh is set (one device)."""
    return None if jax.sharding.get_abstract_mesh().empty else stored_spec(axes)


def stored_sharding(axes):
    """The same as a sharding, on the mesh that is set or on one device."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(mesh, stored_spec(axes))


def used_spec(axes) -> P:
    """The sharding of a weight inside a block."""
    return _spec(USED, axes)


def activation(*names) -> P | None:
    """The sharding of an activation for `out_sharding=`; None where no mesh is set (one device)."""
    return None if jax.sharding.get_abstract_mesh().empty else _spec(ACTIVATIONS, names)


def place(x, *names):
    """An activation moved to the sharding of its logical axes; free where it is there already."""
    spec = activation(*names)
    return x if spec is None else jax.reshard(x, spec)


def replicate(x):
    """An array moved whole to every device."""
    return place(x, *(None,) * x.ndim)


def place_stored(weight, axes):
    """A weight (or its gradient, or moment) moved to where it is stored."""
    if jax.sharding.get_abstract_mesh().empty:
        return weight
    return jax.reshard(weight, stored_spec(axes))


def place_matrices(weight, axes):
    """A weight with every matrix whole on a device; stacks of layers spread over `fsdp` if even."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return weight
    even = axes[0] == 'layers' and weight.shape[0] % mesh.shape['fsdp'] == 0
    return jax.reshard(weight, P('fsdp' if even else None, *(None,) * (weight.ndim - 1)))


def place_stored_matrices(weight, axes):
    """The way back from `place_matrices`, by way of whole copies.

    In one move XLA cannot go from split layers to split dimensions and replicates with a warning.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return weight
    return place_stored(jax.reshard(weight, P(*(None,) * weight.ndim)), axes)


def per_shard(function, in_names, out_names):
    """`function` on each device's own shards; what it needs of others it asks for (`split_axes`).

    The way out where the type system asks for collectives that are not needed (per-row scatters),
    and the way in for kernels, which know nothing of other devices.

    Args:
      in_names: the logical axes of each argument.
      out_names: those of the result, or a list of them for several results.
    """
    if isinstance(out_names, list):
        out_specs = tuple(_spec(ACTIVATIONS, names) for names in out_names)
    else:
        out_specs = _spec(ACTIVATIONS, out_names)
    in_specs = tuple(_spec(ACTIVATIONS, names) for names in in_names)
    return on_shards(function, in_specs, out_specs)


def on_shards(function, in_specs, out_specs):
    """`per_shard` for arrays of any axes, by how they are split (`spec_of`)."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def spec_of(array) -> P:
    """How an array is split, an entry a dimension."""
    spec = jax.typeof(array).sharding.spec
    return P(*spec, *(None,) * (array.ndim - len(spec)))


def mesh_axes(entries) -> tuple[str, ...]:
    """The mesh axes in entries of a spec, one after another."""
    groups = (entry if isinstance(entry, tuple) else (entry,) for entry in entries)
    return tuple(axis for group in groups for axis in group if axis is not None)


def split_axes(*names) -> tuple[str, ...]:
    """The mesh axes that activations with these logical axes are split over; () without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return ()
    return mesh_axes(ACTIVATIONS[name] for name in names)


def axis_size(table, name: str, mesh=None) -> int:
    """How many ways a logical axis is split on a mesh (default: the mesh that is set)."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return math.prod(mesh.shape[axis] for axis in mesh_axes([table[name]]) if axis in mesh.shape)


def batch_shards(mesh=None) -> int:
    """How many ways the rows of a batch are split."""
    return axis_size(ACTIVATIONS, 'batch', mesh)


def whole_rows(count: int, mesh) -> int:
    """`count` rows, rounded up so that every device has as many."""
    shards = batch_shards(mesh)
    return -(-count // shards) * shards


def is_gathered(mesh=None) -> bool:
    """Whether a weight in use differs from the weight at rest."""
    return axis_size(STORED, 'embed', mesh) > 1


def gather(params: nnx.State, compute_dtype, reduce_dtype=None) -> nnx.State:
    """Weights as used: cast to the compute dtype first, then brought together over `fsdp`.

    That order makes the collectives carry the compute dtype: all-gathers forward and, through the
    transpose, reduce-scatters of the gradients in `reduce_dtype` (default the compute dtype). The
    dtype of a weight in use is that of its gradient: products cast it to that of their inputs.
    Vectors (norms, biases) stay as stored: they are small and are applied in float32.
    """

    def bring(param):
        if len(param.axes) < 2:
            return param
        return param.replace(_gather(param[...], param.axes, compute_dtype, reduce_dtype))

    return jax.tree.map(bring, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _cast_and_gather(weight, axes, compute_dtype):
    weight = weight.astype(compute_dtype)
    return jax.reshard(weight, used_spec(axes)) if is_gathered() else weight


def _bring(weight, axes, compute_dtype, reduce_dtype):
    # The sum over devices is made where the gradient is, in its dtype. XLA drops this cast and the
    # one before a product.
    return _cast_and_gather(weight, axes, compute_dtype).astype(reduce_dtype or compute_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(weight, axes, compute_dtype, reduce_dtype):
    return _bring(weight, axes, compute_dtype, reduce_dtype)


def _gather_forward(weight, axes, compute_dtype, reduce_dtype):
    # Not by way of _gather: a remat policy would see custom_vjp_call instead of the moves, and save
    # the gathered weight. The empty array carries the stored dtype to the backward pass.
    used = _bring(weight, axes, compute_dtype, reduce_dtype)
    return used, jnp.zeros((0,), weight.dtype)


def _gather_backward(axes, compute_dtype, reduce_dtype, stored, gradient):
    if is_gathered():
        gradient = jax.reshard(gradient, stored_spec(axes))
    return (gradient.astype(stored.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


def check_weights(shapes: dict, axes: dict, mesh) -> None:
    """Raises ConfigError unless every stored dimension divides its mesh axis.

    It names each weight, with the arithmetic.

    Args:
      shapes: {path: shape}, stacked layers included.
      axes: {path: logical axes}, one a dimension.
    """
    problems = []
    for path, shape in shapes.items():
        for size, name in zip(shape, axes[path], strict=True):
            ways = axis_size(STORED, name, mesh)
            if size % ways:
                problems.append(f'{path}: {name} {size} / {STORED[name]} {ways} = {size / ways:g}')
    if problems:
        raise ConfigError('config.mesh does not fit the model:\n  ' + '\n  '.join(problems))


def check_replication(arrays: dict[str, jax.ShapeDtypeStruct], mesh) -> None:
    """Raises ConfigError, naming each array, if large ones are whole on every device by accident.

    Args:
      arrays: {path: shape with sharding}: weights and moments.
    """
    can_split = math.prod(mesh.shape[axis] for axis in set(STORED.values()) - {None})
    problems = [
        f'{path}: {leaf.size:,} elements would be replicated on all {mesh.size} devices'
        for path, leaf in arrays.items()
        if leaf.size >= LARGE_PARAMETER and leaf.sharding.shard_shape(leaf.shape) == leaf.shape
    ]
    if can_split > 1 and problems:
        axes = ', '.join(sorted(set(STORED.values()) - {None}))
        raise ConfigError(
            f'config.mesh splits {axes}, but not these large arrays:\n  ' + '\n  '.join(problems)
        )


def local_rows(mesh, batch_size: int) -> np.ndarray:
    """Which rows of a global batch this process must make, ascending."""
    sharding = NamedSharding(mesh, _spec(ACTIVATIONS, ('batch',)))
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def batch_sharding(mesh) -> NamedSharding:
    """Where an array [B, T] of a batch is."""
    return NamedSharding(mesh, _spec(ACTIVATIONS, ('batch', 'position')))


def put(batch: dict[str, np.ndarray], mesh, batch_size: int) -> dict[str, jax.Array]:
    """Local rows of [B, T] host arrays -> global arrays sharded as activations."""
    place = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(place, rows, (batch_size,) + rows.shape[1:])
        for name, rows in batch.items()
    }


def distribute(arrays, mesh):
    """Host arrays [B, ...], whole on every process -> global arrays, rows split as a batch."""

    def make(array):
        place = NamedSharding(mesh, _spec(ACTIVATIONS, ('batch',)))
        return jax.make_array_from_callback(array.shape, place, lambda index: array[index])

    return jax.tree.map(make, arrays)

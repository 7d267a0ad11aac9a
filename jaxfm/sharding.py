"""Sharding: the mesh, the tables that map logical axes to mesh axes, and reshards between them.

A model gives its weights and activations logical axes; only this file maps them to mesh axes.
There are three tables. A weight has two shardings: its `embed` dimension is split over `fsdp` while
it is *stored*, and gathered while it is *used*. Activations are sharded like the batch. The mesh is
Explicit: shardings are part of array types, so an ambiguous product is an error at trace time
instead of a silent all-gather.
"""

import contextlib
import contextvars
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxfm.errors import ConfigError

# Ordered by the links they use: replica crosses the slow network, tensor needs the fastest links.
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
    'key_position': None,  # every query needs all keys, so they are gathered over context
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
    """Replaces an axis size of -1 so that the product of all sizes is the number of devices.

    Raises:
      ConfigError: the sizes do not fit the number of devices.
    """
    known = math.prod(n for n in sizes.values() if n != -1)
    free = [axis for axis in MESH_AXES if sizes[axis] == -1]
    shown = ' x '.join(f'{axis} {sizes[axis]}' for axis in MESH_AXES if sizes[axis] != 1) or '1'
    if free and num_devices % known == 0:
        return {**sizes, free[0]: num_devices // known}
    if free or known != num_devices:
        wrong = 'which must divide' if free else 'which must equal'
        raise ConfigError(
            f'config.mesh: {shown} = {known}, {wrong} the number of devices, {num_devices}'
        )
    return dict(sizes)


def make_mesh(sizes: dict[str, int], devices=None) -> jax.sharding.Mesh:
    """The Explicit mesh with all five axes; unused ones have size 1. One size may be -1."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(sizes, len(devices))
    return jax.make_mesh(
        tuple(shape[axis] for axis in MESH_AXES),
        MESH_AXES,
        axis_types=(AxisType.Explicit,) * len(MESH_AXES),
        devices=devices,
    )


_whole = contextvars.ContextVar('whole_positions', default=False)


@contextlib.contextmanager
def whole_positions():
    """Traces programs in which no device has only a part of the positions of a row.

    The sampler needs it: a row of one token cannot be split over `context`, whose devices then all
    compute the same.
    """
    token = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(token)


def _axes_of(table, name: str):
    """The mesh axes (None, one, or several) of a logical axis."""
    return None if name == 'position' and _whole.get() else table[name]


def _spec(table, names) -> P:
    return P(*(None if name is None else _axes_of(table, name) for name in names))


def stored_spec(axes) -> P:
    """The spec of a stored weight, from its logical axes."""
    return _spec(STORED, axes)


def stored_weight(axes) -> P | None:
    """`stored_spec` for `out_sharding=`; None if no mesh is set (one device)."""
    return None if jax.sharding.get_abstract_mesh().empty else stored_spec(axes)


def stored_sharding(axes):
    """`stored_spec` as a sharding on the mesh that is set, or on one device if there is none."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(mesh, stored_spec(axes))


def used_spec(axes) -> P:
    """The spec of a weight in use, from its logical axes."""
    return _spec(USED, axes)


def activation(*names) -> P | None:
    """The spec of an activation, for `out_sharding=`; None if no mesh is set (one device)."""
    return None if jax.sharding.get_abstract_mesh().empty else _spec(ACTIVATIONS, names)


def place(x, *names):
    """Reshards an activation by its logical axes; free if it has that sharding already."""
    spec = activation(*names)
    return x if spec is None else jax.reshard(x, spec)


def replicate(x):
    """Replicates an array on every device."""
    return place(x, *(None,) * x.ndim)


def place_stored(weight, axes):
    """Reshards a weight, or its gradient or moment, to its stored sharding."""
    if jax.sharding.get_abstract_mesh().empty:
        return weight
    return jax.reshard(weight, stored_spec(axes))


def place_matrices(weight, axes):
    """Reshards a weight so that each matrix is whole on a device.

    A stack of layers is split over `fsdp` if the number of layers is divisible by it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return weight
    even = axes[0] == 'layers' and weight.shape[0] % mesh.shape['fsdp'] == 0
    return jax.reshard(weight, P('fsdp' if even else None, *(None,) * (weight.ndim - 1)))


def place_stored_matrices(weight, axes):
    """Reverts `place_matrices`, by way of replicated copies.

    XLA cannot reshard from split layers to split dimensions in one step: it would replicate anyway,
    with a warning.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return weight
    return place_stored(jax.reshard(weight, P(*(None,) * weight.ndim)), axes)


def per_shard(function, in_names, out_names):
    """Runs `function` on each device's own shards (`jax.shard_map`).

    Use it for kernels, which know nothing of other devices, and where the type system would ask for
    unnecessary collectives, as in per-row scatters. Inside, `split_axes` gives the mesh axes for
    the collectives that `function` does need.

    Args:
      in_names: the logical axes of each argument.
      out_names: the logical axes of the result, or a list of them for several results.
    """
    if isinstance(out_names, list):
        out_specs = tuple(_spec(ACTIVATIONS, names) for names in out_names)
    else:
        out_specs = _spec(ACTIVATIONS, out_names)
    in_specs = tuple(_spec(ACTIVATIONS, names) for names in in_names)
    return on_shards(function, in_specs, out_specs)


def on_shards(function, in_specs, out_specs):
    """`per_shard` with PartitionSpecs (see `spec_of`) instead of logical axes."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def spec_of(array) -> P:
    """The PartitionSpec of an array, with one entry per dimension."""
    spec = jax.typeof(array).sharding.spec
    return P(*spec, *(None,) * (array.ndim - len(spec)))


def mesh_axes(entries) -> tuple[str, ...]:
    """All mesh axes in the entries of a spec, flattened."""
    groups = (entry if isinstance(entry, tuple) else (entry,) for entry in entries)
    return tuple(axis for group in groups for axis in group if axis is not None)


def split_axes(*names) -> tuple[str, ...]:
    """The mesh axes over which activations with these axes are split; () if no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return ()
    return mesh_axes(_axes_of(ACTIVATIONS, name) for name in names)


def axis_size(table, name: str, mesh=None) -> int:
    """The number of shards along a logical axis, on `mesh` (default: the mesh that is set)."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    axes = mesh_axes([_axes_of(table, name)])
    return math.prod(mesh.shape[axis] for axis in axes if axis in mesh.shape)


def batch_shards(mesh=None) -> int:
    """The number of shards that the rows of a batch are split into."""
    return axis_size(ACTIVATIONS, 'batch', mesh)


def whole_rows(count: int, mesh) -> int:
    """`count` rounded up so that every device gets the same number of rows."""
    shards = batch_shards(mesh)
    return -(-count // shards) * shards


def is_gathered(mesh=None) -> bool:
    """Whether weights must be gathered for use, because `fsdp` splits them in storage."""
    return axis_size(STORED, 'embed', mesh) > 1


def gather(params: nnx.State, compute_dtype, reduce_dtype=None) -> nnx.State:
    """Casts weights to the compute dtype, then all-gathers them over `fsdp` for use.

    Casting first makes the forward all-gathers use the compute dtype. Their transposes, the
    reduce-scatters of the gradients, use `reduce_dtype` (default: the compute dtype). Returned
    matrices have `reduce_dtype`, so their gradients do, too; a product casts them to the dtype of
    its inputs. Vectors (norms, biases) stay as stored: they are small and are applied in float32.
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
    # The gradient has the dtype of the weight, so this cast sets the dtype of its sum over devices.
    # The forward pass is unaffected: a product casts back, and XLA removes both casts.
    return _cast_and_gather(weight, axes, compute_dtype).astype(reduce_dtype or compute_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(weight, axes, compute_dtype, reduce_dtype):
    return _bring(weight, axes, compute_dtype, reduce_dtype)


def _gather_forward(weight, axes, compute_dtype, reduce_dtype):
    # Do not call _gather here: a remat policy would see custom_vjp_call instead of the reshards and
    # save the gathered weight. The empty array carries the stored dtype to the backward pass.
    used = _bring(weight, axes, compute_dtype, reduce_dtype)
    return used, jnp.zeros((0,), weight.dtype)


def _gather_backward(axes, compute_dtype, reduce_dtype, stored, gradient):
    if is_gathered():
        gradient = jax.reshard(gradient, stored_spec(axes))
    return (gradient.astype(stored.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


def check_weights(shapes: dict, axes: dict, mesh) -> None:
    """Raises ConfigError unless every stored dimension is divisible by its mesh axis.

    The message names each weight that does not fit and shows the arithmetic.

    Args:
      shapes: {path: shape}, including the dimension of stacked layers.
      axes: {path: logical axes}, one per dimension.
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
    """Raises ConfigError, naming each array, if large ones are replicated by accident.

    Args:
      arrays: {path: shape with sharding} of weights and moments.
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
            f'config.mesh splits over {axes}, but would not split these large arrays:\n  '
            + '\n  '.join(problems)
        )


def local_rows(mesh, batch_size: int) -> np.ndarray:
    """The indices, in ascending order, of the rows of a global batch that this process builds."""
    sharding = NamedSharding(mesh, _spec(ACTIVATIONS, ('batch',)))
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def batch_sharding(mesh) -> NamedSharding:
    """The sharding of a batch array [B, T]."""
    return NamedSharding(mesh, _spec(ACTIVATIONS, ('batch', 'position')))


def put(batch: dict[str, np.ndarray], mesh, batch_size: int) -> dict[str, jax.Array]:
    """Host arrays with this process's rows of [B, T] -> global arrays, sharded as activations."""
    place = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(place, rows, (batch_size,) + rows.shape[1:])
        for name, rows in batch.items()
    }


def scalar(value: float) -> jax.Array:
    """A float32 scalar on every device of the mesh that is set."""
    place = NamedSharding(jax.sharding.get_mesh(), P())
    with jax.transfer_guard('allow'):  # inside the training loop, this one is intended
        return jax.make_array_from_callback((), place, lambda _: np.float32(value))


def distribute(arrays, mesh):
    """Host arrays [B, ...], complete on every process -> global arrays, rows split as a batch."""
    place = NamedSharding(mesh, _spec(ACTIVATIONS, ('batch',)))
    if jax.process_count() == 1:  # all at once is several times faster
        return jax.device_put(arrays, place)

    def make(array):
        return jax.make_array_from_callback(array.shape, place, lambda index: array[index])

    return jax.tree.map(make, arrays)

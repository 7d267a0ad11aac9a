"""The train state, and the pure function that advances it by one step.

The model is split once. `Parts` holds its structure; `TrainState` holds only arrays, keyed by the
path of the parameter ('trunk/0/0/attention/q'). Only `trainable` has gradients and optimizer state.
"""

import dataclasses
import fnmatch
import re

import jax
import jax.numpy as jnp
import optax
from flax import nnx, traverse_util
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxfm import sharding
from jaxfm.errors import ConfigError
from jaxfm.optim.rules import is_vector


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step reads and writes: a pytree of global arrays."""

    step: jax.Array  # int32 scalar: steps of this phase, including skipped ones
    rng: jax.Array  # the phase's random key; each step folds in its number
    trainable: dict[str, jax.Array]
    frozen: dict[str, jax.Array]
    buffers: dict[str, jax.Array]
    opt_state: optax.OptState
    counters: dict[str, jax.Array]  # int32 scalars: 'updates' (applied) and 'skipped'

    @property
    def params(self) -> dict[str, jax.Array]:
        """All arrays of the model. The next step donates them, so nobody may keep a reference."""
        return self.trainable | self.frozen | self.buffers

    def to_tree(self) -> dict[str, jax.Array]:
        """The arrays as a flat dict with readable names, as a checkpoint stores them."""
        leaves, _ = jax.tree_util.tree_flatten_with_path(self)
        return {_name(path): leaf for path, leaf in leaves}

    def with_tree(self, tree: dict[str, jax.Array]) -> 'TrainState':
        """A state with this structure and the arrays of `tree`. `self` may hold only shapes."""
        return jax.tree.unflatten(jax.tree.structure(self), [tree[name] for name in self.to_tree()])


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator='/')


@dataclasses.dataclass(frozen=True)
class Parts:
    """The structure of a model, without its arrays.

    `axes` gives the logical axes of every array, including the leading `layers` of stacked blocks.
    """

    graphdef: nnx.GraphDef
    axes: dict[str, tuple[str, ...]]
    shapes: dict[str, jax.ShapeDtypeStruct]
    trainable: frozenset[str]
    buffers: frozenset[str]

    @property
    def adapters(self) -> frozenset[str]:
        """The parameters that LoRA adds to a model."""
        return frozenset(path for path, axes in self.axes.items() if 'lora' in axes)

    @property
    def base_axes(self) -> dict[str, tuple[str, ...]]:
        """`axes` without the adapters: those of the model as it came from elsewhere."""
        return {path: axes for path, axes in self.axes.items() if path not in self.adapters}

    def merge(self, params: dict[str, jax.Array]) -> nnx.Module:
        """The model with these arrays; `params` must hold all of them."""
        nested = {_split_path(path): value for path, value in params.items()}
        return nnx.merge(self.graphdef, traverse_util.unflatten_dict(nested))


def _split_path(path: str) -> tuple:
    return tuple(int(part) if part.isdigit() else part for part in path.split('/'))


def _flatten(module: nnx.Module) -> dict[str, nnx.Variable]:
    _, state = nnx.split(module)
    return {'/'.join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def split(make_model, frozen: list[str] = (), where: str = 'config.optimizer.frozen') -> Parts:
    """The structure of the model that `make_model(key)` builds. Allocates no arrays.

    All parameters are trainable except the frozen ones; with LoRA, only the adapters are.

    Args:
      frozen: glob patterns for the paths of the parameters to freeze.
      where: the config key of the patterns, for the error message.

    Raises:
      ConfigError: a pattern matches no parameter.
    """
    abstract = nnx.eval_shape(lambda: make_model(jax.random.key(0)))
    graphdef, _ = nnx.split(abstract)
    leaves = _flatten(abstract)
    names = [path for path, leaf in leaves.items() if isinstance(leaf, nnx.Param)]
    unmatched = [pattern for pattern in frozen if not fnmatch.filter(names, pattern)]
    if unmatched:
        known = '\n  '.join(sorted(names))
        raise ConfigError(
            f'{where}: {", ".join(unmatched)} matches none of the parameters:\n  {known}'
        )
    adapters = {path for path in names if 'lora' in leaves[path].axes}
    held = {path for pattern in frozen for path in fnmatch.filter(names, pattern)}
    return Parts(
        graphdef=graphdef,
        axes={path: _axes(leaf) for path, leaf in leaves.items()},
        shapes={path: leaf.get_value() for path, leaf in leaves.items()},
        trainable=frozenset(adapters or names) - held,
        buffers=frozenset(leaves) - frozenset(names),
    )


def _axes(leaf: nnx.Variable) -> tuple[str, ...]:
    stacked = leaf.get_value().ndim - len(leaf.axes)
    return ('layers',) * stacked + tuple(leaf.axes)


def init_state(make_model, parts: Parts, optimizer, seed: int) -> TrainState:
    """A fresh state, created sharded: no device ever holds the whole model.

    The values depend only on the seed, not on the mesh.
    """
    # This runs once; at full optimization XLA's CPU compiler would take three times as long.
    init = jax.jit(
        lambda key: _make_state(make_model, parts, optimizer, key),
        compiler_options={'xla_backend_optimization_level': 1},
    )
    return init(jax.random.key(seed))


def fresh_params(make_model, parts: Parts, seed: int, paths) -> dict[str, jax.Array]:
    """The parameters `paths` of `init_state`, created sharded, without creating the others.

    For a model whose other parameters come from elsewhere.
    """

    def init(key):
        values = _make_params(make_model, parts, jax.random.split(key)[0])
        return {path: values[path] for path in paths}

    return jax.jit(init)(jax.random.key(seed))


def _make_state(make_model, parts: Parts, optimizer, key) -> TrainState:
    model_key, phase_key = jax.random.split(key)
    return _assemble(_make_params(make_model, parts, model_key), parts, optimizer, phase_key)


def _make_params(make_model, parts: Parts, key) -> dict[str, jax.Array]:
    values = {path: leaf[...] for path, leaf in _flatten(make_model(key)).items()}
    return {path: sharding.place_stored(value, parts.axes[path]) for path, value in values.items()}


def begin_phase(params: dict, parts: Parts, optimizer, seed: int) -> TrainState:
    """A state with these weights, which are donated; all else is as `init_state` creates it.

    The result is the same whether the weights come from an earlier run or from an earlier phase.
    """

    def assemble(params, key):
        return _assemble(params, parts, optimizer, jax.random.split(key)[1])

    return jax.jit(assemble, donate_argnums=0)(params, jax.random.key(seed))


def _assemble(values: dict, parts: Parts, optimizer, phase_key) -> TrainState:
    trainable = {path: values[path] for path in values if path in parts.trainable}
    buffers = {path: values[path] for path in values if path in parts.buffers}
    frozen = {path: v for path, v in values.items() if path not in trainable | buffers}
    zero = jnp.zeros((), jnp.int32)
    counters = {'updates': zero, 'skipped': zero}
    return TrainState(
        step=zero,
        rng=jax.random.key_data(phase_key),
        trainable=trainable,
        frozen=frozen,
        buffers=buffers,
        opt_state=optimizer.transform.init(trainable),
        counters=counters,
    )


def abstract_state(make_model, parts: Parts, optimizer, seed: int) -> TrainState:
    """Shapes, dtypes and shardings of `init_state`, to restore or lower with. Needs a set mesh."""
    mesh = jax.sharding.get_mesh()
    shapes = jax.eval_shape(lambda: _make_state(make_model, parts, optimizer, jax.random.key(seed)))

    def give_place(leaf):
        place = NamedSharding(mesh, leaf.sharding.spec if leaf.sharding else P())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return jax.tree.map(give_place, shapes)


def stored_shardings(parts: Parts) -> dict:
    """{path: sharding} of every array of a model, on the mesh that is set."""
    return {path: sharding.stored_sharding(axes) for path, axes in parts.axes.items()}


def abstract_params(parts: Parts) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of all arrays of a model. Needs a set mesh."""
    places = stored_shardings(parts)
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[path])
        for path, leaf in parts.shapes.items()
    }


def check_replication(state: TrainState, parts: Parts, mesh) -> None:
    """Raises ConfigError if a large weight or moment is replicated on every device by accident.

    Adapters and their moments may be replicated: an adapter is small compared with its matrix, and
    one of its two factors has no dimension to split.

    Args:
      state: holds arrays, or their shapes and shardings.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    adapters = parts.adapters
    # Weights and moments are dicts keyed by parameter path, which is thus the last key of a leaf.
    arrays = {
        _name(path): leaf for path, leaf in leaves if getattr(path[-1], 'key', None) not in adapters
    }
    sharding.check_replication(arrays, mesh)


def make_train_step(
    parts: Parts,
    objective,
    optimizer,
    *,
    accumulate: int = 1,
    clip_norm: float = 0.0,
    skip_empty: bool = False,
    teacher: Parts | None = None,
):
    """The jitted step: (state, batch, limit=None, teacher_params=None) -> (state, metrics).

    It donates the state, and nothing else.

    The loss is the sum over the objective's terms of coefficient * sum / weight. The weights are
    those of the whole batch, so `accumulate` microbatches give the same gradient as one batch. If
    the loss or the gradient is not finite, or the loss is above `limit`, the step is skipped: only
    `step` and `counters` advance.

    Args:
      objective: gives the sums and weights of the terms (`jaxfm.objectives`).
      optimizer: gives the optax transform and the learning-rate schedule (`jaxfm.optim`).
      accumulate: number of microbatches that the batch is split into.
      clip_norm: largest global norm of the gradient; 0 turns clipping off.
      skip_empty: do not compute microbatches without a target that counts.
      teacher: of another model, whose weights the step gets and hands to the objective unchanged.
    """

    def gradients(state, batch, weights, rng, teacher_params):
        def loss_fn(trainable):
            model = parts.merge(trainable | state.frozen | state.buffers)
            others = [teacher.merge(teacher_params)] if teacher else []
            sums, metrics, increments = objective(model, batch, rng, *others)
            terms = {
                name: coefficient * sums[name] / _nonzero(weights[name])
                for name, coefficient in objective.coefficients.items()
            }
            return sum(terms.values()), (terms, metrics, increments)

        (loss, extras), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.trainable)
        return grads, loss, *extras

    groups = _groups(parts)

    @jax.jit(donate_argnums=0)
    def train_step(state: TrainState, batch, limit=None, teacher_params=None):
        weights = objective.weights(batch)
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        if accumulate == 1:
            totals = gradients(state, batch, weights, rng, teacher_params)
        else:
            totals = _accumulate(
                lambda microbatch, index: gradients(
                    state, microbatch, weights, jax.random.fold_in(rng, index), teacher_params
                ),
                batch,
                accumulate,
                skip_empty,
            )
        grads, loss, terms, sums, increments = totals
        norm = optax.tree.norm(grads)
        applied = jnp.isfinite(loss) & jnp.isfinite(norm)
        if limit is not None:
            applied &= loss <= limit
        if clip_norm:
            shrink = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12))
            grads = jax.tree.map(lambda g: g * shrink, grads)
        learning_rate = optimizer.schedule(state.counters['updates'])
        new, updates = _apply(state, grads, increments, optimizer, learning_rate)
        new = jax.tree.map(lambda new, old: jnp.where(applied, new, old), new, state)
        tokens = jnp.sum(batch['loss_mask'])
        state = dataclasses.replace(
            new,
            step=state.step + 1,
            counters={
                'updates': state.counters['updates'] + applied,
                'skipped': state.counters['skipped'] + ~applied,
            },
        )
        metrics = {'loss': loss, 'grad_norm': norm, 'learning_rate': learning_rate}
        for name, metric in sums.items():
            metrics |= _read(name, metric)
        for group, paths in groups.items():
            moved = learning_rate * _norm(updates, paths)
            metrics[f'update_norm/{group}'] = jnp.where(applied, moved, 0.0)
            metrics[f'param_norm/{group}'] = _norm(new.trainable, paths)
        if len(terms) > 1:
            metrics |= {f'{name}_term': value for name, value in terms.items()}
        return state, metrics | {
            'skipped_steps': state.counters['skipped'],
            'target_tokens': tokens,
        }

    return train_step


def _groups(parts: Parts) -> dict[str, list[str]]:
    """{group: paths of its trainable parameters}, for the norms in the metrics.

    A group is a module of the model, such as attention, over all blocks. Norm scales and biases
    are a group of their own: they would hide among matrices.
    """
    groups: dict[str, list[str]] = {}
    for path in sorted(parts.trainable):
        names = re.sub(r'^.*/\d+/', '', path).split('/')  # trunk/0/1/attention/q -> attention
        group = 'vectors' if is_vector(parts.axes[path]) else names[0]
        groups.setdefault(group, []).append(path)
    return groups


def _norm(tree: dict[str, jax.Array], paths: list[str]):
    """The norm of these arrays together, in float32."""
    return optax.tree.norm([tree[path].astype(jnp.float32) for path in paths])


def _is_merged(metric) -> bool:
    """Whether a metric is no pair of sums, but says itself how it is merged and read."""
    return hasattr(metric, 'merge')


def _read(name: str, metric) -> dict[str, jax.Array]:
    if _is_merged(metric):
        return {f'{name}{suffix}': value for suffix, value in metric.read().items()}
    total, weight = metric
    return {name: total / _nonzero(weight)}


def _nonzero(weight):
    """Replaces 0 by 1: a batch with zero weight has sums of zero, so its means are 0, not NaN."""
    return jnp.where(weight > 0, weight, 1.0)


def _split_batch(batch, count: int):
    """Arrays [B, T] -> [count, B / count, T].

    Reshapes to (B / k, k) and swaps, so that every device keeps its own rows. Reshaping to
    (k, B / k) would move them all between devices.
    """

    def split_rows(rows):
        spec = sharding.activation('batch', 'microbatch', 'position')
        shape = (rows.shape[0] // count, count) + rows.shape[1:]
        return jnp.moveaxis(jnp.reshape(rows, shape, out_sharding=spec), 1, 0)

    return jax.tree.map(split_rows, batch)


def map_microbatches(function, batch, count: int):
    """`function(microbatch)`, [B / count, T], of all microbatches together: [B, T].

    Microbatches without a target that counts are not computed; they give 0.
    """
    if count == 1:
        return function(batch)

    def compute(microbatch):
        mask_BT = microbatch['loss_mask']
        return lax.cond(
            jnp.any(mask_BT > 0), function, lambda _: jnp.zeros_like(mask_BT), microbatch
        )

    parts = jnp.moveaxis(lax.map(compute, _split_batch(batch, count)), 0, 1)
    shape = batch['loss_mask'].shape
    return jnp.reshape(parts, shape, out_sharding=sharding.activation('batch', 'position'))


def _accumulate(gradients, batch, count: int, skip_empty: bool):
    """Sums `gradients(microbatch, index)` over `count` microbatches."""
    batches = _split_batch(batch, count)
    first = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], batches), 0)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype, out_sharding=x.sharding and x.sharding.spec), first
    )

    def add(total, part):
        return total.merge(part) if _is_merged(total) else jnp.add(total, part)

    def body(totals, item):
        def more():
            return jax.tree.map(add, totals, gradients(*item), is_leaf=_is_merged)

        if not skip_empty:
            return more(), None
        return lax.cond(jnp.any(item[0]['loss_mask'] > 0), more, lambda: totals), None

    totals, _ = lax.scan(body, zeros, (batches, jnp.arange(count)))
    return totals


def _apply(state: TrainState, grads, increments, optimizer, learning_rate):
    """-> (the state with the update applied, the update before the learning rate)."""
    updates, opt_state = optimizer.transform.update(grads, state.opt_state, state.trainable)
    trainable = jax.tree.map(
        lambda param, update: (param - learning_rate * update).astype(param.dtype),
        state.trainable,
        updates,
    )
    buffers = {path: state.buffers[path] + increments.get(path, 0) for path in state.buffers}
    new = dataclasses.replace(state, trainable=trainable, opt_state=opt_state, buffers=buffers)
    return new, updates

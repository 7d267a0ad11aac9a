"""One model on every mesh: the same weights, gradients and losses, wherever the arrays live."""

import contextlib
import dataclasses
from collections.abc import Callable

import jax
import numpy as np
import pytest
from flax import nnx

from jaxfm import sharding
from jaxfm.checkpoint import CheckpointConfig
from jaxfm.checkpoint.checkpointer import Checkpointer
from jaxfm.models import LoraConfig, TransformerConfig
from jaxfm.models.transformer import Transformer
from jaxfm.objectives import NextTokenConfig
from jaxfm.objectives.next_token import NextToken
from jaxfm.optim import AdamWConfig, MuonConfig
from jaxfm.optim.adamw import AdamW
from jaxfm.optim.muon import Muon
from jaxfm.state import (
    Parts,
    TrainState,
    abstract_state,
    fresh_params,
    init_state,
    make_train_step,
    split,
)

MODEL = TransformerConfig.model_validate(
    dict(
        vocab_size=100,
        embed_dim=16,
        num_layers=2,
        block=dict(num_heads=8, num_kv_heads=8, head_dim=4, mlp_dim=32, qk_norm=True),
    )
)
ADAPTED = MODEL.model_copy(update={'lora': LoraConfig(rank=3, targets=['all'])})
ROWS, LENGTH, STEPS = 16, 16, 10
MESHES = {
    'fsdp 8': dict(fsdp=8),
    'fsdp 2 x tensor 4': dict(fsdp=2, tensor=4),
    'replica 2 x fsdp 2 x tensor 2': dict(replica=2, fsdp=2, tensor=2),
    'tensor 8': dict(tensor=8),
}


pytestmark = pytest.mark.usefixtures('quick_compilation')


def make_mesh(sizes):
    shape = dict.fromkeys(sharding.MESH_AXES, 1) | sizes
    count = int(np.prod(list(shape.values())))
    return sharding.make_mesh(shape, jax.devices()[:count])


def make_batches():
    """Packed rows with padding; most targets count."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        lengths = rng.integers(3, LENGTH - 3, ROWS)[:, None]
        place = np.broadcast_to(np.arange(LENGTH), (ROWS, LENGTH))
        segments = np.where(place < lengths, 1, 2)
        segments[-1, -4:] = 0
        yield {
            'tokens': rng.integers(0, 100, (ROWS, LENGTH), np.int32),
            'targets': rng.integers(0, 100, (ROWS, LENGTH), np.int32),
            'positions': np.where(place < lengths, place, place - lengths).astype(np.int32),
            'segment_ids': segments.astype(np.int32),
            'loss_mask': ((rng.random((ROWS, LENGTH)) < 0.7) & (segments > 0)).astype(np.float32),
        }


@dataclasses.dataclass
class Setup:
    """What a run on one mesh needs; inside `on` the mesh is set."""

    mesh: jax.sharding.Mesh
    make_model: Callable
    parts: Parts
    optimizer: AdamW

    @classmethod
    @contextlib.contextmanager
    def on(cls, sizes, muon=False, model=MODEL):
        mesh, make_model = make_mesh(sizes), maker(model)
        with jax.set_mesh(mesh):
            parts = split(make_model)
            axes = {path: parts.axes[path] for path in sorted(parts.trainable)}
            if muon:
                rule = Muon(MuonConfig(learning_rate=0.01), STEPS, axes)
            else:
                # The smallest gradients of adapters are rounding: with a small eps, as large steps.
                eps = 1e-4 if model.lora else 1e-8
                rule = AdamW(AdamWConfig(learning_rate=0.01, eps=eps), STEPS, axes)
            yield cls(mesh, make_model, parts, rule)

    def state(self) -> TrainState:
        return init_state(self.make_model, self.parts, self.optimizer, seed=0)

    def abstract(self) -> TrainState:
        return abstract_state(self.make_model, self.parts, self.optimizer, seed=0)

    def placed(self, tree) -> TrainState:
        """A state of host arrays on this mesh."""
        wanted = self.abstract()
        places = {name: leaf.sharding for name, leaf in wanted.to_tree().items()}
        return wanted.with_tree(jax.device_put(tree, places))

    def step(self, **options):
        objective = NextToken(NextTokenConfig(z_loss=1e-3))
        return make_train_step(self.parts, objective, self.optimizer, clip_norm=1.0, **options)


def maker(model):
    return lambda key: Transformer(model, nnx.Rngs(key))


@dataclasses.dataclass
class Result:
    """What one run leaves."""

    initial: dict[str, np.ndarray]
    moments: dict[str, np.ndarray]  # the first ones, after a step: a tenth of the clipped gradient
    losses: np.ndarray
    norms: list[dict[str, float]]  # of updates and parameters, by group
    final: TrainState


def run(sizes, muon=False, start=None, model=MODEL, **options) -> Result:
    """Ten steps from a fresh state, or from the host arrays `start`."""
    with Setup.on(sizes, muon, model) as setup:
        state = setup.state() if start is None else setup.placed(start)
        initial = jax.device_get(state.to_tree())
        step, losses, norms, moments = setup.step(**options), [], [], None
        for batch in make_batches():
            state, metrics = step(state, sharding.put(batch, setup.mesh, ROWS))
            losses.append(metrics['loss'].item())
            norms.append({n: float(v) for n, v in metrics.items() if '_norm/' in n})
            moments = moments or moments_of(state)
        return Result(initial, moments, np.array(losses), norms, state)


def moments_of(state) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in state.to_tree().items() if '/mu/' in name}


@pytest.fixture(scope='module')
def single() -> Result:
    return run({})


@pytest.fixture(scope='module', params=MESHES)
def sharded(request) -> Result:
    return run(MESHES[request.param])


def assert_same_run(result, reference):
    # The order of float32 sums differs. On some processors the seventh loss of fsdp 2 x tensor 4 is
    # 20 units in the last place off, 2.01e-6.
    np.testing.assert_allclose(result.losses, reference.losses, rtol=3e-6)
    assert len(set(reference.losses)) == STEPS
    for found, wanted in zip(result.norms, reference.norms, strict=True):
        assert found.keys() == wanted.keys()
        for name in wanted:
            assert found[name] == pytest.approx(wanted[name], rel=3e-4), name


def assert_same_gradients(result, reference):
    assert result.moments.keys() == reference.moments.keys() and reference.moments
    for name, wanted in reference.moments.items():
        difference = np.linalg.norm(result.moments[name] - wanted) / np.linalg.norm(wanted)
        assert difference < 5e-6, name


def test_initial_values_are_bit_equal_on_every_mesh(single, sharded):
    assert sharded.initial.keys() == single.initial.keys()
    for name, value in single.initial.items():
        np.testing.assert_array_equal(sharded.initial[name], value, name)


def test_gradients_of_the_first_step_agree(single, sharded):
    assert_same_gradients(sharded, single)


def test_losses_of_ten_steps_agree(single, sharded):
    assert_same_run(sharded, single)


def test_the_norms_are_those_of_the_groups_of_a_model(single):
    groups = {'attention', 'embedding', 'head', 'mlp', 'vectors'}
    kinds = 'train/update_norm', 'train/param_norm'
    assert {f'train/{name}' for name in single.norms[0]} == {
        f'{k}/{g}' for k in kinds for g in groups
    }
    squares = dict.fromkeys(groups, 0.0)
    for path, weight in single.final.trainable.items():
        names = [group for group in groups if f'/{group}/' in f'/{path}']
        group = 'vectors' if path.endswith('scale') else names[0]
        squares[group] += np.sum(np.square(np.asarray(weight, np.float64)))
    for group in groups:
        wanted = np.sqrt(squares[group])
        assert single.norms[-1][f'param_norm/{group}'] == pytest.approx(wanted, rel=1e-6), group


def test_the_abstract_state_is_the_state_in_shape_dtype_and_place(sharded, request):
    with Setup.on(MESHES[request.node.callspec.params['sharded']]) as setup:
        wanted = setup.abstract().to_tree()
    state = sharded.final.to_tree()
    assert state.keys() == wanted.keys()
    for name, leaf in wanted.items():
        assert leaf.shape == state[name].shape, name
        assert leaf.dtype == state[name].dtype, name
        assert leaf.sharding == state[name].sharding, name


def test_weights_and_moments_are_stored_in_shards(sharded):
    """On an Auto mesh `jax.jit(tx.init)` replicates the moments without a word."""
    state, axes = sharded.final.to_tree(), split(maker(MODEL)).axes
    for path, weight in sharded.final.trainable.items():
        assert weight.sharding.spec == sharding.stored_spec(axes[path]), path
    pairs = [
        (name, name.split(f'/{moment}/')[1])
        for moment in ('mu', 'nu')
        for name in state
        if f'/{moment}/' in name
    ]
    assert len(pairs) == 2 * len(sharded.final.trainable)
    for name, path in pairs:
        assert state[name].sharding == sharded.final.trainable[path].sharding, name


def test_a_state_restored_on_another_mesh_is_bit_equal(tmp_path, sharded, request):
    here = request.node.callspec.params['sharded']
    other = 'fsdp 2 x tensor 4' if here == 'fsdp 8' else 'fsdp 8'
    writer = Checkpointer(CheckpointConfig(), tmp_path)
    writer.save(STEPS, sharded.final.to_tree(), {'next_row': ROWS})
    writer.wait()
    with Setup.on(MESHES[other]) as setup:
        wanted = setup.abstract()
        tree, extra = writer.restore(STEPS, wanted.to_tree())
        restored = wanted.with_tree(tree).to_tree()
    writer.close()
    for name, leaf in sharded.final.to_tree().items():
        np.testing.assert_array_equal(restored[name], leaf, name)
        assert restored[name].sharding == wanted.to_tree()[name].sharding, name
    assert extra == {'next_row': ROWS}


def test_microbatches_on_a_mesh_equal_one_batch_on_one_device(single):
    result = run(dict(fsdp=2, tensor=2), start=single.initial, accumulate=4)
    assert_same_gradients(result, single)
    assert_same_run(result, single)


def test_muon_agrees_on_meshes_without_xla_moving_whole_arrays(capfd):
    """XLA says so when it cannot get from one sharding to another but by way of whole copies."""
    reference = run({}, muon=True)
    result = run(dict(replica=2, fsdp=2, tensor=2), muon=True, start=reference.initial)
    assert_same_run(result, reference)
    assert 'rematerialization' not in capfd.readouterr().err


@pytest.fixture(scope='module')
def adapted() -> Result:
    """A run of adapters that have moved already, on one device."""
    with Setup.on({}, model=ADAPTED) as setup:
        start = jax.device_get(setup.state().to_tree())
    random = np.random.default_rng(0)
    moved = {
        name: 0.1 * random.normal(size=value.shape).astype(np.float32)
        for name, value in start.items()
        if name.startswith('trainable/') and name.endswith('_lora/b')
    }
    assert len(moved) == 6
    return run({}, model=ADAPTED, start=start | moved)


@pytest.mark.parametrize('name', MESHES)
def test_adapters_train_alike_on_every_mesh(name, adapted):
    result = run(MESHES[name], model=ADAPTED, start=adapted.initial)
    assert len(result.moments) == 12
    assert_same_gradients(result, adapted)
    assert_same_run(result, adapted)


@pytest.mark.parametrize('name', MESHES)
def test_fresh_adapters_are_bit_equal_on_every_mesh_and_stored_in_shards(name, adapted):
    with Setup.on(MESHES[name], model=ADAPTED) as setup:
        parts = setup.parts
        fresh = fresh_params(setup.make_model, parts, 0, parts.adapters)
        assert fresh.keys() == parts.adapters
    for path, value in fresh.items():
        assert value.sharding.spec == sharding.stored_spec(parts.axes[path]), path
        if path.endswith('a'):
            np.testing.assert_array_equal(value, adapted.initial[f'trainable/{path}'], path)

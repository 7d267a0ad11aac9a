"""One model on every mesh: the same weights, gradients and losses, wherever the arrays live."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from jaxfm import optimizer, sharding
from jaxfm.checkpoint import CheckpointConfig
from jaxfm.checkpoint.checkpointer import Checkpointer
from jaxfm.config import AdamWConfig, MuonConfig
from jaxfm.models import TransformerConfig
from jaxfm.models.transformer import Transformer
from jaxfm.objectives import NextTokenConfig
from jaxfm.objectives.next_token import NextToken
from jaxfm.state import TrainState, abstract_state, init_state, make_train_step, split

MODEL = TransformerConfig.model_validate(
    dict(
        vocab_size=100,
        embed_dim=16,
        num_layers=2,
        block=dict(num_heads=8, num_kv_heads=8, head_dim=4, mlp_dim=32, qk_norm=True),
    )
)
ROWS, LENGTH, STEPS = 16, 16, 10
MESHES = {
    'fsdp 8': dict(fsdp=8),
    'fsdp 2 x tensor 4': dict(fsdp=2, tensor=4),
    'replica 2 x fsdp 2 x tensor 2': dict(replica=2, fsdp=2, tensor=2),
    'tensor 8': dict(tensor=8),
}


@pytest.fixture(scope='module', autouse=True)
def quick_compilation():
    """LLVM's expensive passes take two thirds of the time here and change no layout."""
    before = jax.config.read('jax_disable_most_optimizations')
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', before)


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
    optimizer: optimizer.AdamW

    @classmethod
    @contextlib.contextmanager
    def on(cls, sizes, muon=False):
        mesh = make_mesh(sizes)
        with jax.set_mesh(mesh):
            parts = split(make_model)
            axes = {path: parts.axes[path] for path in sorted(parts.trainable)}
            if muon:
                rule = optimizer.Muon(MuonConfig(learning_rate=0.01), STEPS, axes)
            else:
                rule = optimizer.AdamW(AdamWConfig(learning_rate=0.01), STEPS, axes)
            yield cls(mesh, rule)

    def states(self) -> tuple[TrainState, TrainState]:
        """A fresh state and what `abstract_state` says of it."""
        arguments = (make_model, split(make_model), self.optimizer, 0)
        return init_state(*arguments), abstract_state(*arguments)

    def step(self, **options):
        objective = NextToken(NextTokenConfig(z_loss=1e-3))
        return make_train_step(
            split(make_model), objective, self.optimizer, clip_norm=1.0, **options
        )


def make_model(key):
    return Transformer(MODEL, nnx.Rngs(key))


@dataclasses.dataclass
class Result:
    """What one run leaves, on the host."""

    abstract: dict
    initial: dict
    shardings: dict
    moments: dict  # the first moments of AdamW after one step: a tenth of the clipped gradient
    losses: np.ndarray


def run(sizes, muon=False, **options) -> Result:
    with Setup.on(sizes, muon) as setup:
        state, abstract = setup.states()
        initial = jax.device_get(state.to_tree())
        shardings = {name: leaf.sharding for name, leaf in state.to_tree().items()}
        step, losses, moments = setup.step(**options), [], None
        for batch in make_batches():
            state, metrics = step(state, sharding.put(batch, setup.mesh, ROWS))
            losses.append(metrics['loss'].item())
            moments = moments or {
                name: value
                for name, value in jax.device_get(state.to_tree()).items()
                if '/mu/' in name
            }
        return Result(abstract.to_tree(), initial, shardings, moments, np.array(losses))


@pytest.fixture(scope='module')
def single() -> Result:
    return run({})


@pytest.fixture(scope='module', params=MESHES)
def sharded(request) -> Result:
    return run(MESHES[request.param])


def assert_same_run(result, reference):
    np.testing.assert_allclose(result.losses, reference.losses, rtol=2e-6)
    assert len(set(reference.losses)) == STEPS


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


def test_the_abstract_state_is_the_state_in_shape_dtype_and_place(sharded):
    assert sharded.abstract.keys() == sharded.initial.keys()
    for name, leaf in sharded.abstract.items():
        assert leaf.shape == sharded.initial[name].shape, name
        assert leaf.dtype == sharded.initial[name].dtype, name
        assert leaf.sharding.is_equivalent_to(sharded.shardings[name], len(leaf.shape)), name


def test_moments_are_split_like_their_weights(sharded):
    """On an Auto mesh `jax.jit(tx.init)` replicates them without a word."""
    for name, place in sharded.shardings.items():
        if '/mu/' in name or '/nu/' in name:
            path = name.split('/mu/' if '/mu/' in name else '/nu/')[1]
            assert place == sharded.shardings[f'trainable/{path}'], name


def test_microbatches_on_a_mesh_equal_one_batch_on_one_device(single):
    result = run(dict(fsdp=2, tensor=2), accumulate=4)
    assert_same_gradients(result, single)
    assert_same_run(result, single)


def test_muon_agrees_on_meshes_without_xla_moving_whole_arrays(capfd):
    """Two layers fit fsdp 2, where each device takes one; on fsdp 8 all of them take all."""
    reference = run({}, muon=True)
    for sizes in (dict(replica=2, fsdp=2, tensor=2), dict(fsdp=8)):
        assert_same_run(run(sizes, muon=True), reference)
    assert 'rematerialization' not in capfd.readouterr().err


def test_a_state_restored_on_another_mesh_is_bit_equal(tmp_path, single):
    with Setup.on(dict(fsdp=8)) as setup:
        state, _ = setup.states()
        batch = sharding.put(next(make_batches()), setup.mesh, ROWS)
        state, _ = setup.step()(state, batch)
        saved = jax.device_get(state.to_tree())
        writer = Checkpointer(CheckpointConfig(), tmp_path)
        writer.save(1, state.to_tree(), {'next_row': ROWS})
        writer.close()
    with Setup.on(dict(fsdp=2, tensor=4)) as setup:
        _, wanted = setup.states()
        reader = Checkpointer(CheckpointConfig(), tmp_path, read_only=True)
        tree, extra = reader.restore(1, wanted.to_tree())
        reader.close()
        restored = wanted.with_tree(tree)
        for name, leaf in restored.to_tree().items():
            np.testing.assert_array_equal(leaf, saved[name], name)
            assert leaf.sharding == wanted.to_tree()[name].sharding, name
    assert extra == {'next_row': ROWS}
    moved = [name for name in saved if not np.array_equal(saved[name], single.initial[name])]
    assert any('/mu/' in name for name in moved) and any('trainable' in name for name in moved)

"""Distillation: losses and gradients of TRL, the teacher in a train step, what is equal."""

import functools

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from jaxfm import sharding
from jaxfm.models import LoraConfig, TransformerConfig
from jaxfm.models.transformer import Transformer
from jaxfm.objectives import OBJECTIVES, DistillationConfig, GKDConfig
from jaxfm.objectives.distillation import Distillation
from jaxfm.ops.logprobs import Unembedding
from jaxfm.state import begin_phase, make_train_step, split, stored_shardings
from tests.models.goldens import Golden

pytestmark = pytest.mark.usefixtures('quick_compilation')

GOLDEN = Golden('distillation')
REVERSE = DistillationConfig(teacher='x', beta=1.0)

# TRL


class Given:
    """A model with given hidden states and output projection."""

    def __init__(self, hidden, weight):
        self.hidden, self.weight = hidden, weight

    def __call__(self, tokens, positions, segment_ids):
        assert tokens.shape == positions.shape == segment_ids.shape
        return self.hidden, {}

    def unembed(self):
        return Unembedding(self.weight, self.weight.shape[0])


def batch_of(mask):
    ids = np.zeros(mask.shape, np.int32)
    names = ('tokens', 'targets', 'positions', 'segment_ids')
    return dict.fromkeys(names, ids) | {'loss_mask': np.float32(mask)}


def loss_of(objective, batch, student, teacher):
    sums, _, _ = objective(student, batch, None, teacher)
    weights = objective.weights(batch)
    assert sums.keys() == weights.keys() == objective.coefficients.keys()
    return sum(objective.coefficients[name] * sums[name] / weights[name] for name in sums)


@pytest.mark.parametrize('name', GOLDEN.about['cases'])
def test_loss_and_gradients_are_those_of_trl(name):
    arrays, case = GOLDEN.arrays, GOLDEN.about['cases'][name]
    objective = Distillation(DistillationConfig(teacher='x', **case['arguments']))
    teacher = Given(*(np.float32(arrays[f'teacher_{kind}']) for kind in ('hidden', 'weight')))

    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def loss(hidden, weight):
        return loss_of(objective, batch_of(arrays['mask']), Given(hidden, weight), teacher)

    given = (np.float32(arrays[f'student_{kind}']) for kind in ('hidden', 'weight'))
    value, gradients = jax.jit(loss)(*given)
    np.testing.assert_allclose(value, case['loss'], rtol=1e-5)
    for found, kind in zip(gradients, ('hidden', 'weight')):
        theirs = arrays[f'{kind}_gradient/{name}']
        np.testing.assert_allclose(found, theirs, rtol=1e-5, atol=1e-6)


# The train step

BLOCK = dict(num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=32)
SHAPE = dict(vocab_size=90, vocab_multiple=32, embed_dim=16, num_layers=1, block=BLOCK)
MODEL = TransformerConfig.model_validate(SHAPE)
LARGER = TransformerConfig.model_validate(
    SHAPE
    # More ids, of which no batch has one, and more padding.
    | dict(vocab_size=93, vocab_multiple=64, embed_dim=32, num_layers=2, logits_softcap=9.0)
    | dict(block=BLOCK | dict(num_kv_heads=4, head_dim=8, mlp_dim=64, qk_norm=True))
)
SHAPES = {
    'student': MODEL,
    'larger': LARGER,
    'adapted': MODEL.model_copy(update={'lora': LoraConfig(rank=2, targets=['all'])}),
}
ROWS, LENGTH = 8, 12
CONFIGS = {
    'forward': DistillationConfig(teacher='x', temperature=2.0),
    'top 5': DistillationConfig(teacher='x', top_k=5, hard=0.5),
    'reverse': REVERSE,
    'gkd': GKDConfig(teacher='x'),
}


class Descent:
    """Subtracts the gradient."""

    transform = optax.identity()

    def schedule(self, updates):
        return 1.0


@functools.cache
def parts_of(shape):
    return split(lambda key: Transformer(SHAPES[shape], nnx.Rngs(key)))


def weights_of(shape, seed):
    """Weights on the host; those of a norm are about 1."""
    random, found = np.random.default_rng(seed), {}
    for path, leaf in sorted(parts_of(shape).shapes.items()):
        values = np.float32(random.normal(size=leaf.shape))
        found[path] = 1 + 0.1 * values if 'norm' in path or 'pre_' in path else 0.3 * values
    return found


def make_batch():
    """Two documents a row, then padding; the first part of each is a prompt."""
    random = np.random.default_rng(0)
    ids = random.integers(0, 90, (ROWS, LENGTH + 1), dtype=np.int32)
    place = np.arange(LENGTH)
    segments = np.where(place < 6, 1, np.where(place < 11, 2, 0))
    positions = np.where(place < 6, place, place - 6)
    mask = (segments > 0) & (positions >= 2)
    tile = functools.partial(np.tile, reps=(ROWS, 1))
    batch = {'tokens': ids[:, :-1], 'targets': ids[:, 1:]}
    batch |= {'positions': tile(np.int32(positions)), 'segment_ids': tile(np.int32(segments))}
    mask = tile(np.float32(mask))
    mask[-1] = 0  # microbatches have different weights
    return batch | {'loss_mask': mask}


@functools.cache
def step_of(name, model, other, accumulate):
    config = CONFIGS[name]
    return make_train_step(
        parts_of(model),
        Distillation(config),
        Descent(),
        accumulate=accumulate,
        teacher=parts_of(other),
    )


def run_step(name, *, model='student', other='larger', seed=1, mesh=(), accumulate=1, move=0.0):
    """-> metrics of a step, {path: its gradient}, the teacher's weights after it."""
    sizes = dict.fromkeys(sharding.MESH_AXES, 1) | dict(mesh)
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    teacher = weights_of(other, seed)
    teacher['head/table'] += move * weights_of(other, 7)['head/table']
    with jax.set_mesh(made := sharding.make_mesh(sizes, devices)):
        places = [stored_shardings(parts_of(shape)) for shape in (model, other)]
        params = jax.device_put(weights_of(model, 0), places[0])
        state = begin_phase(params, parts_of(model), Descent(), 0)
        before = jax.device_get(state.trainable)
        weights = jax.device_put(teacher, places[1])
        step = step_of(name, model, other, accumulate)
        state, metrics = step(state, sharding.put(make_batch(), made, ROWS), None, weights)
        after = jax.device_get(state.trainable)
        gradients = {path: before[path] - after[path] for path in before}
        for path, value in weights.items():  # neither donated nor updated
            np.testing.assert_array_equal(value, teacher[path])
        assert state.params.keys() == before.keys() | state.frozen.keys()
        return jax.device_get(metrics), gradients


@functools.cache
def alone(name):
    return run_step(name)


@pytest.mark.parametrize('name', CONFIGS)
def test_a_perturbed_teacher_moves_loss_and_gradient(name):
    metrics, gradients = alone(name)
    moved, others = run_step(name, move=0.1)
    assert abs(moved['loss'] - metrics['loss']) > 1e-4
    for path, gradient in gradients.items():
        difference = np.linalg.norm(others[path] - gradient)
        assert difference > 1e-3 * np.linalg.norm(gradient), path


@pytest.mark.parametrize('name', ['top 5', 'gkd'])
def test_a_teacher_that_is_the_student_has_nothing_to_teach(name, monkeypatch):
    monkeypatch.setitem(CONFIGS, f'{name} alone', CONFIGS[name].model_copy(update=dict(hard=0.0)))
    metrics, gradients = run_step(f'{name} alone', other='student', seed=0)
    assert abs(metrics['loss']) < 1e-6
    for gradient in gradients.values():
        np.testing.assert_allclose(gradient, 0, atol=2e-6)


@pytest.mark.parametrize('name', CONFIGS)
def test_microbatches_and_devices_change_nothing(name):
    metrics, gradients = alone(name)
    others, other_gradients = run_step(name, accumulate=2, mesh=(('fsdp', 2), ('tensor', 2)))
    assert metrics.keys() == others.keys()
    for key, value in metrics.items():
        np.testing.assert_allclose(others[key], value, rtol=2e-6, atol=2e-6, err_msg=key)
    for path, gradient in gradients.items():
        np.testing.assert_allclose(other_gradients[path], gradient, atol=2e-6, err_msg=path)


def test_only_targets_that_count_are_compared():
    batch, objective = make_batch(), Distillation(REVERSE)
    student, teacher = weights_of('student', 0), weights_of('larger', 1)

    @jax.jit
    def loss(batch):
        models = parts_of('student').merge(student), parts_of('larger').merge(teacher)
        return loss_of(objective, batch, *models)

    expected = loss(batch)
    nowhere = batch['loss_mask'] == 0
    last = nowhere & (batch['segment_ids'] != np.roll(batch['segment_ids'], -1, axis=1))
    assert last.any()  # padding that nothing follows
    changed = dict(batch, tokens=np.where(last, (batch['tokens'] + 1) % 90, batch['tokens']))
    np.testing.assert_allclose(loss(changed), expected, rtol=1e-6)
    shifted = dict(batch, loss_mask=np.roll(batch['loss_mask'], 1, axis=1))
    assert abs(loss(shifted) - expected) > 1e-3


def test_the_teacher_is_an_argument_and_no_constant_of_the_program():
    losses = {float(run_step('reverse', seed=seed)[0]['loss']) for seed in (1, 2, 3)}
    assert len(losses) == 3
    assert step_of('reverse', 'student', 'larger', 1)._cache_size() == 1


def test_adapters_of_a_student_learn_and_its_weights_do_not():
    metrics, gradients = run_step('reverse', model='adapted')
    assert gradients and all('lora' in path for path in gradients)
    assert all(np.abs(gradient).max() > 1e-5 for gradient in gradients.values())
    assert metrics['loss'] > 0


def test_the_records_tell_how_much_of_the_teacher_is_compared():
    metrics, _ = alone('top 5')
    assert 5 / 93 < metrics['teacher_mass'] < 1
    terms = metrics['distillation_term'] + metrics['hard_term']
    assert metrics['loss'] == pytest.approx(terms, rel=1e-6)
    assert 'teacher_mass' not in alone('forward')[0]


def test_top_k_is_for_the_forward_divergence():
    with pytest.raises(ValueError, match='top_k 8 needs beta 0, not 1'):
        DistillationConfig(teacher='x', beta=1.0, top_k=8)


@pytest.mark.parametrize('name', ['distillation', 'gkd'])
def test_the_presets_are_registered(name):
    assert OBJECTIVES.load(name) is Distillation
    assert OBJECTIVES.find(name).schema(teacher='x').name == name
    assert OBJECTIVES.find(name).schema(teacher='x').beta == (0.5 if name == 'gkd' else 0.0)

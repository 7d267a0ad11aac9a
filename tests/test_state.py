"""The train state and its step: what moves, what stays, and that microbatches are one batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxfm import sharding
from jaxfm.errors import ConfigError
from jaxfm.models import TransformerConfig
from jaxfm.models.transformer import Transformer
from jaxfm.objectives import NextTokenConfig
from jaxfm.objectives.next_token import NextToken
from jaxfm.optim import AdamWConfig
from jaxfm.optim.adamw import AdamW
from jaxfm.state import (
    abstract_state,
    begin_phase,
    check_replication,
    init_state,
    make_train_step,
    split,
)

V, D, ROWS, LENGTH = 20, 6, 8, 5
BLOCK = dict(num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=16)
SEGMENTED = TransformerConfig.model_validate(
    dict(
        vocab_size=V,
        embed_dim=8,
        num_layers=2,
        block=BLOCK,
        segments=[dict(pattern=[BLOCK], repeats=1), dict(pattern=[BLOCK], repeats=1)],
    )
)


pytestmark = pytest.mark.usefixtures('quick_compilation')


class Count(nnx.Variable):
    """State that is not trained."""


class Tiny(nnx.Module):
    """Two matrices, a vector and a buffer, in any dtype."""

    def __init__(self, key, dtype=jnp.float32):
        table_key, out_key = jax.random.split(key)
        self.table = nnx.Param(jax.random.normal(table_key, (V, D), dtype), axes=('vocab', 'embed'))
        self.out = nnx.Param(jax.random.normal(out_key, (D, V), dtype), axes=('embed', 'mlp'))
        self.scale = nnx.Param(jnp.ones(D, dtype), axes=('norm',))
        self.seen = Count(jnp.zeros(V, dtype), axes=('vocab',))

    def logits(self, tokens):
        return jnp.tanh(self.table[tokens]) * self.scale[...][None, None] @ self.out[...]


class CountingLoss:
    """Cross-entropy and a second term of another weight; the buffer counts the tokens it saw."""

    coefficients = {'loss': 1.0, 'size': 0.1}

    def weights(self, batch):
        return {'loss': jnp.sum(batch['loss_mask']), 'size': jnp.sum(batch['segment_ids'] > 0)}

    def __call__(self, model, batch, rng):
        del rng
        logits, mask = model.logits(batch['tokens']), batch['loss_mask']
        logprobs = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(logprobs, batch['targets'][..., None], -1)[..., 0]
        real = (batch['segment_ids'] > 0).astype(logits.dtype)
        sums = {
            'loss': -jnp.sum(picked * mask),
            'size': jnp.sum(jnp.square(logits) * real[..., None]),
        }
        seen = jnp.zeros(V, logits.dtype).at[batch['tokens'].ravel()].add(mask.ravel())
        metrics = {'token_loss': (sums['loss'], jnp.sum(mask))}
        return sums, metrics, {'seen': seen}


class MeanOfMeans(CountingLoss):
    """What every trainer did once: each microbatch is divided by its own number of tokens."""

    def __call__(self, model, batch, rng):
        sums, metrics, increments = super().__call__(model, batch, rng)
        own, rows = self.weights(batch), batch['tokens'].shape[0]
        whole = 0.5 * ROWS * LENGTH * rows / ROWS
        return {k: v / jnp.maximum(own[k], 1) * whole for k, v in sums.items()}, metrics, increments


class Linear:
    """The gradient of every parameter is what the batch says, under 'gradient'."""

    coefficients = {'loss': 1.0}

    def weights(self, batch):
        return {'loss': jnp.ones(())}

    def __call__(self, model, batch, rng):
        loss = jnp.sum(model.table[...] * batch['table']) + jnp.sum(model.out[...] * batch['out'])
        return {'loss': loss + jnp.sum(model.scale[...])}, {}, {'seen': jnp.ones(V)}


class GradientKeeper:
    """An optimizer whose state is the last gradient, and which moves nothing."""

    transform = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda gradients, state, params: (jax.tree.map(jnp.zeros_like, params), gradients),
    )

    def schedule(self, updates):
        return 1.0


def make_batch(dtype=np.float32, seed=0):
    """Rows with different numbers of targets; the last two of eight have none."""
    rng = np.random.default_rng(seed)
    mask = rng.random((ROWS, LENGTH)) < np.linspace(1, 0.2, ROWS)[:, None]
    mask[-2:] = False
    return {
        'tokens': rng.integers(0, V, (ROWS, LENGTH), np.int32),
        'targets': rng.integers(0, V, (ROWS, LENGTH), np.int32),
        'positions': np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        'segment_ids': np.where(rng.random((ROWS, LENGTH)) < 0.9, 1, 0).astype(np.int32),
        'loss_mask': mask.astype(dtype),
    }


def adamw(parts, **options):
    config = AdamWConfig(**dict(learning_rate=0.1, schedule='linear', final_fraction=0) | options)
    return AdamW(config, 10, {path: parts.axes[path] for path in sorted(parts.trainable)})


@functools.cache
def tiny_start(dtype, keep_gradients, frozen):
    """(parts, optimizer, state) of Tiny; the step donates its state, so copy this one."""

    def make_model(key):
        return Tiny(key, dtype)

    parts = split(make_model, frozen)
    rule = GradientKeeper() if keep_gradients else adamw(parts)
    return parts, rule, init_state(make_model, parts, rule, 0)


def tiny_run(objective, dtype=jnp.float32, keep_gradients=False, frozen=(), **options):
    """-> (state, step) of Tiny."""
    parts, rule, state = tiny_start(dtype, keep_gradients, frozen)
    step = make_train_step(parts, objective, rule, **options)
    return jax.tree.map(jnp.array, state), step


def linear_batch(table=1.0, out=0.0):
    return make_batch() | {
        'table': np.full((V, D), table, np.float32),
        'out': np.full((D, V), out, np.float32),
    }


def relative_error(result, wanted):
    return np.linalg.norm(result - wanted) / np.linalg.norm(wanted)


# Accumulation


def accumulated(objective, count, dtype, batch):
    state, step = tiny_run(objective, dtype, keep_gradients=True, accumulate=count)
    state, metrics = step(state, batch)
    return jax.device_get((state.opt_state, metrics, state.buffers))


def assert_equals_one_batch(objective, batch, dtype, loss_tolerance, gradient_tolerance):
    gradients, metrics, buffers = accumulated(objective, 1, dtype, batch)
    for count in (2, 4):
        parts = accumulated(objective, count, dtype, batch)
        for name in ('loss', 'loss_term', 'size_term', 'token_loss', 'target_tokens'):
            np.testing.assert_allclose(parts[1][name], metrics[name], rtol=loss_tolerance)
        for path, wanted in gradients.items():
            assert relative_error(parts[0][path], wanted) < gradient_tolerance, path
        np.testing.assert_array_equal(parts[2]['seen'], buffers['seen'])


def test_microbatches_equal_one_batch():
    batch = make_batch()
    per_microbatch = batch['loss_mask'].reshape(-1, 4, LENGTH).sum((0, 2))  # as the step splits
    assert len(set(per_microbatch)) > 1
    assert_equals_one_batch(CountingLoss(), batch, jnp.float32, 1e-6, 5e-6)


def test_microbatches_equal_one_batch_in_float64():
    with jax.enable_x64(True):
        assert_equals_one_batch(CountingLoss(), make_batch(np.float64), jnp.float64, 1e-12, 1e-12)


def test_a_microbatch_without_targets_changes_nothing():
    """Rows 3 and 7 are the last of four microbatches."""
    batch = make_batch()
    batch['loss_mask'][3::4] = 0
    assert batch['loss_mask'].sum() > 0
    assert_equals_one_batch(CountingLoss(), batch, jnp.float32, 1e-6, 5e-6)


def test_a_mean_of_means_would_be_noticed():
    with pytest.raises(AssertionError):
        assert_equals_one_batch(MeanOfMeans(), make_batch(), jnp.float32, 1e-3, 1e-2)


def test_a_batch_without_any_target_is_a_step_of_gradient_zero():
    batch = make_batch()
    batch['loss_mask'][:] = 0
    gradients, metrics, _ = accumulated(NoSize(), 2, jnp.float32, batch)
    assert metrics['loss'] == 0 and metrics['grad_norm'] == 0
    assert all(np.all(gradient == 0) for gradient in gradients.values())


class NoSize(CountingLoss):
    coefficients = {'loss': 1.0}


# Steps that are not applied


def everything_but_counts(state):
    tree = jax.device_get(state.to_tree())
    return {k: v for k, v in tree.items() if k != 'step' and not k.startswith('counters/')}


@pytest.mark.parametrize('bad', [dict(table=np.nan), dict(table=np.inf), dict(out=-np.inf)])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(bad):
    state, step = tiny_run(Linear(), clip_norm=1.0)
    start = everything_but_counts(state)
    state, metrics = step(state, linear_batch())
    before = everything_but_counts(state)
    groups = {'table': 'table', 'out': 'out', 'scale': 'vectors'}
    for path, group in groups.items():
        now = before[f'trainable/{path}']
        moved = np.linalg.norm(now - start[f'trainable/{path}'])
        np.testing.assert_allclose(metrics[f'update_norm/{group}'], moved, rtol=1e-5)
        np.testing.assert_allclose(metrics[f'param_norm/{group}'], np.linalg.norm(now), rtol=1e-6)

    state, metrics = step(state, linear_batch(**bad))
    after = everything_but_counts(state)
    assert after.keys() == before.keys()
    for name in before:
        assert after[name].tobytes() == before[name].tobytes(), name
    assert state.step == 2
    assert state.counters['skipped'] == metrics['skipped_steps'] == 1
    assert state.counters['updates'] == 1
    assert not np.isfinite(metrics['grad_norm'])
    for path, group in groups.items():
        assert metrics[f'update_norm/{group}'] == 0
        norm = np.linalg.norm(before[f'trainable/{path}'])
        np.testing.assert_allclose(metrics[f'param_norm/{group}'], norm, rtol=1e-6)
    assert state.buffers['seen'].tolist() == [1.0] * V

    state, metrics = step(state, linear_batch())
    np.testing.assert_allclose(
        metrics['learning_rate'], 0.09
    )  # the second update's, not the third's
    assert (state.step, state.counters['updates'], state.counters['skipped']) == (3, 2, 1)
    assert all(np.all(np.isfinite(leaf)) for leaf in state.trainable.values())
    assert not np.array_equal(state.trainable['table'], before['trainable/table'])


def test_a_finite_loss_with_an_infinite_gradient_is_not_applied():
    class Cliff(Linear):
        def __call__(self, model, batch, rng):
            sums, metrics, increments = super().__call__(model, batch, rng)
            flat = model.table[...] - jax.lax.stop_gradient(model.table[...])
            return {'loss': sums['loss'] + jnp.sum(jnp.sqrt(flat))}, metrics, increments

    state, step = tiny_run(Cliff())
    before = everything_but_counts(state)
    state, metrics = step(state, linear_batch())
    assert np.isfinite(metrics['loss']) and state.counters['skipped'] == 1
    assert all(np.array_equal(v, before[k]) for k, v in everything_but_counts(state).items())


# Clipping


@pytest.mark.parametrize('clip_norm', [0.0, 0.5, 1e6])
def test_the_gradient_is_clipped_to_the_global_norm(clip_norm):
    state, step = tiny_run(Linear(), keep_gradients=True, clip_norm=clip_norm)
    state, metrics = step(state, linear_batch(table=3.0, out=-1.0))
    norm = np.sqrt(9.0 * V * D + V * D + D)
    np.testing.assert_allclose(metrics['grad_norm'], norm, rtol=1e-6)  # before clipping
    shrink = min(1, clip_norm / norm) if clip_norm else 1
    np.testing.assert_allclose(state.opt_state['table'], np.full((V, D), 3 * shrink), rtol=1e-6)
    np.testing.assert_allclose(state.opt_state['scale'], np.full(D, shrink), rtol=1e-6)


# Trainable, frozen, buffers


def make_transformer(key):
    return Transformer(SEGMENTED, nnx.Rngs(key))


def test_a_frozen_layer_stays_bitwise_and_has_no_moments():
    parts = split(make_transformer, ['trunk/0/*'])
    rule = adamw(parts)
    state = init_state(make_transformer, parts, rule, 0)
    before = jax.device_get(state.to_tree())
    assert {path.split('/')[1] for path in state.frozen} == {'0'}
    assert {path for path in state.trainable if path.startswith('trunk/0/')} == set()
    assert state.frozen.keys() | state.trainable.keys() == parts.shapes.keys()
    assert not [name for name in before if 'opt_state' in name and 'trunk/0/' in name]

    step = make_train_step(parts, NextToken(NextTokenConfig()), rule)
    for seed in range(2):
        state, _ = step(state, make_batch(seed=seed))
    after = jax.device_get(state.to_tree())
    for name in before:
        if name.startswith('frozen/'):
            assert after[name].tobytes() == before[name].tobytes(), name
        if name.startswith('trainable/'):
            assert not np.array_equal(after[name], before[name]), name


def test_a_phase_begins_as_a_run_with_the_same_weights_would():
    parts, other = split(make_transformer), split(make_transformer, ['trunk/0/*'])
    state = init_state(make_transformer, parts, adamw(parts), 0)
    step = make_train_step(parts, NextToken(NextTokenConfig()), adamw(parts))
    trained, _ = step(state, make_batch())
    weights = jax.device_get(jax.tree.map(jnp.copy, trained.params))  # a view would hold them
    fresh = jax.device_get(init_state(make_transformer, other, adamw(other), 5).to_tree())
    begun = jax.device_get(begin_phase(trained.params, other, adamw(other), 5).to_tree())
    assert all(leaf.is_deleted() for leaf in trained.params.values())  # they were donated
    assert begun.keys() == fresh.keys()
    for name, value in begun.items():
        kind, _, path = name.partition('/')
        wanted = weights[path] if kind in ('trainable', 'frozen', 'buffers') else fresh[name]
        assert value.tobytes() == wanted.tobytes(), name


def test_a_pattern_that_matches_nothing_names_the_parameters():
    with pytest.raises(ConfigError, match=r'trunk/7/\*') as caught:
        split(make_transformer, ['trunk/0/*', 'trunk/7/*'])
    assert 'trunk/1/0/attention/q' in str(caught.value)
    assert 'trunk/0/*,' not in str(caught.value)


def test_a_buffer_cannot_be_frozen_by_a_pattern_and_is_no_parameter():
    parts = split(Tiny, ['sc*'])
    assert parts.buffers == {'seen'} and parts.trainable == {'table', 'out'}
    with pytest.raises(ConfigError):
        split(Tiny, ['seen'])


def test_a_buffer_takes_the_increments_of_the_objective():
    state, step = tiny_run(CountingLoss())
    assert set(state.buffers) == {'seen'} and 'seen' not in state.trainable
    wanted = np.zeros(V)
    for seed in range(3):
        batch = make_batch(seed=seed)
        np.add.at(wanted, batch['tokens'], batch['loss_mask'])
        state, _ = step(state, batch)
    np.testing.assert_array_equal(state.buffers['seen'], wanted)


def test_the_model_of_all_parameters_computes_what_the_original_does():
    parts = split(Tiny, ['out'])
    state = init_state(Tiny, parts, adamw(parts), 0)
    assert set(state.params) == {'table', 'out', 'scale', 'seen'}
    original = Tiny(jax.random.split(jax.random.key(0))[0])
    tokens = make_batch()['tokens']
    result = parts.merge(state.params).logits(tokens)
    np.testing.assert_allclose(result, original.logits(tokens), rtol=1e-5, atol=1e-5)


def test_axes_of_stacked_blocks_begin_with_layers():
    parts = split(make_transformer)
    assert parts.axes['trunk/1/0/attention/q'] == ('layers', 'embed', 'heads', 'head_dim')
    assert parts.axes['embedding/table'] == ('vocab', 'embed')
    for path, leaf in parts.shapes.items():
        assert len(parts.axes[path]) == len(leaf.shape), path


# The state as a pytree


def wide_state(**block):
    """(state, parts, mesh) of a model with a wide adapter, as shapes on eight devices."""
    config = TransformerConfig.model_validate(
        dict(
            vocab_size=V,
            embed_dim=1024,
            num_layers=1,
            block=BLOCK | dict(num_heads=64, head_dim=64) | block,
            lora=dict(rank=256, targets=['attention/q']),
        )
    )

    def make(key):
        return Transformer(config, nnx.Rngs(key))

    parts = split(make)
    mesh = sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1) | dict(fsdp=8))
    with jax.set_mesh(mesh):
        return abstract_state(make, parts, adamw(parts), 0), parts, mesh


def test_half_an_adapter_and_its_moments_may_stay_whole():
    state, parts, mesh = wide_state()
    check_replication(state, parts, mesh)
    with pytest.raises(ConfigError) as told:  # were they not adapters
        sharding.check_replication(state.to_tree(), mesh)
    assert str(told.value).count('attention/q_lora/b: 1,048,576 elements') == 3


def test_what_is_no_adapter_may_not_stay_whole_beside_one():
    with pytest.raises(ConfigError, match='frozen/trunk/0/0/mlp/gate_up_bias: 2,097,152') as told:
        check_replication(*wide_state(mlp_dim=2**20, mlp_bias=True))
    assert 'lora' not in str(told.value)


def test_a_state_goes_to_a_flat_tree_and_back():
    state, step = tiny_run(CountingLoss(), frozen=('scale',))
    state, _ = step(state, make_batch())
    tree = state.to_tree()
    assert {'step', 'rng', 'trainable/table', 'frozen/scale', 'buffers/seen'} < tree.keys()
    assert 'counters/skipped' in tree
    back = jax.eval_shape(lambda: state).with_tree(dict(reversed(tree.items())))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True))


def test_the_step_takes_the_buffers_of_the_state_it_is_given():
    state, step = tiny_run(CountingLoss())
    new, _ = step(state, make_batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def test_the_seed_alone_decides_the_values():
    def values(seed):
        parts = split(Tiny)
        state = init_state(Tiny, parts, adamw(parts), seed)
        return jax.device_get(state.to_tree())

    first, again, other = values(1), values(1), values(2)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first['trainable/table'], other['trainable/table'])
    assert not np.array_equal(first['rng'], other['rng'])


def test_every_step_and_microbatch_has_its_own_key():
    class Noise(Linear):
        def __call__(self, model, batch, rng):
            sums, _, increments = super().__call__(model, batch, rng)
            draw = jax.random.uniform(rng)
            return sums, {'draw': (draw, 1.0), 'square': (draw**2, 1.0)}, increments

    state, step = tiny_run(Noise())
    state, first = step(state, linear_batch())
    state, second = step(state, linear_batch())
    assert first['draw'] != second['draw']

    class SumsOfNoise(CountingLoss):
        def __call__(self, model, batch, rng):
            sums, _, increments = super().__call__(model, batch, rng)
            draw = jax.random.uniform(rng)
            return sums, {'draw': (draw, 0.5), 'square': (draw**2, 0.5)}, increments

    state, step = tiny_run(SumsOfNoise(), accumulate=2)
    _, metrics = step(state, make_batch())
    # Two equal draws x, x would give sums 2x and 2x^2.
    assert abs(metrics['square'] - metrics['draw'] ** 2 / 2) > 1e-3


def test_a_loss_of_several_terms_tells_each():
    state, step = tiny_run(CountingLoss())
    _, metrics = step(state, make_batch())
    total = metrics['loss_term'] + metrics['size_term']
    np.testing.assert_allclose(metrics['loss'], total, rtol=1e-6)


def test_a_tiny_loss_falls():
    state, step = tiny_run(CountingLoss(), clip_norm=1.0)
    batch, losses = make_batch(), []
    for _ in range(10):
        state, metrics = step(state, batch)
        losses.append(metrics['loss'].item())
    assert losses[-1] < 0.7 * losses[0]

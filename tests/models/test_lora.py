"""Adapters: fresh ones change nothing, trained ones equal a change of their matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxfm import sharding, state
from jaxfm.models import TARGETS, LoraConfig
from jaxfm.models.lora import merge
from jaxfm.models.transformer import Transformer
from jaxfm.objectives import NextTokenConfig
from jaxfm.objectives.next_token import NextToken
from jaxfm.optim import AdamWConfig, MuonConfig
from jaxfm.optim.adamw import AdamW
from jaxfm.optim.muon import Muon
from jaxfm.plan.flops import frozen_matmul_params, model_flops_per_token
from jaxfm.plan.memory import bytes_total

ALL = LoraConfig(rank=3, alpha=6.0, targets=['all'])


def changed(group, **changes):
    return type(group)(**{**dict(group), **changes})


@pytest.fixture(scope='module')
def adapted(configs):
    """The llama model with adapters on every matrix."""
    return changed(configs['llama'], lora=ALL)


def parts_of(config, frozen=()):
    return state.split(lambda key: Transformer(config, nnx.Rngs(key)), frozen)


def adamw(parts, **options):
    axes = {path: parts.axes[path] for path in sorted(parts.trainable)}
    return AdamW(AdamWConfig(learning_rate=0.01, **options), 10, axes)


def init(config, parts, seed=0):
    return state.init_state(lambda k: Transformer(config, nnx.Rngs(k)), parts, adamw(parts), seed)


@pytest.fixture(scope='module')
def initial(adapted):
    """The initial train state; a step takes a copy."""
    return init(adapted, parts_of(adapted))


def training_batch(batch, seed=0):
    tokens, positions, segment_ids = batch
    targets = np.random.default_rng(seed).integers(0, 60, tokens.shape, np.int32)
    mask = np.ones(tokens.shape, np.float32)
    return dict(
        tokens=tokens,
        targets=targets,
        positions=positions,
        segment_ids=segment_ids,
        loss_mask=mask,
    )


# What the model computes


def test_fresh_adapters_change_nothing_bit_for_bit(build, configs, adapted, initial, batch):
    without, model = build(configs['llama']), build(adapted)
    model.params = without.params | initial.trainable
    for result, expected in zip(model(*batch)[:2], without(*batch)[:2], strict=True):
        np.testing.assert_array_equal(result, expected)


def test_adapters_do_not_change_the_initial_weights(configs, initial):
    without = init(configs['llama'], parts_of(configs['llama'])).params
    assert without.keys() == initial.frozen.keys()
    for path, value in without.items():
        np.testing.assert_array_equal(initial.frozen[path], value, path)


def test_a_is_drawn_as_peft_draws_it_and_b_is_zero(initial):
    params = jax.device_get(initial.trainable)
    assert len(params) == 2 * len(TARGETS)
    fan_in = {'attention/out': 32, 'mlp/down': 24}
    for path, value in params.items():
        target = path.split('/', 3)[3].partition('_lora/')[0]
        if path.endswith('b'):
            assert not value.any(), path
            continue
        bound = fan_in.get(target, 16) ** -0.5
        assert 0.8 * bound < np.abs(value).max() <= bound, path
        np.testing.assert_allclose(value.std(), bound / 3**0.5, rtol=0.2)
        assert np.abs(value[0] - value[1]).max() > bound / 10  # every layer has its own draw
    q, k = (params[f'trunk/0/0/attention/{name}_lora/a'] for name in 'qk')
    assert np.abs(q - k).max() > 0.1


def test_shapes_of_every_adapter(adapted):
    shapes = {
        path.removeprefix('trunk/0/0/'): leaf.shape
        for path, leaf in parts_of(adapted).shapes.items()
        if '_lora/' in path
    }
    assert shapes == {
        'attention/q_lora/a': (2, 16, 3),
        'attention/q_lora/b': (2, 3, 4, 8),
        'attention/k_lora/a': (2, 16, 3),
        'attention/k_lora/b': (2, 3, 2, 8),
        'attention/v_lora/a': (2, 16, 3),
        'attention/v_lora/b': (2, 3, 2, 8),
        'attention/out_lora/a': (2, 4, 8, 3),
        'attention/out_lora/b': (2, 3, 16),
        'mlp/gate_up_lora/a': (2, 16, 2, 3),
        'mlp/gate_up_lora/b': (2, 2, 3, 24),
        'mlp/down_lora/a': (2, 24, 3),
        'mlp/down_lora/b': (2, 3, 16),
    }


@pytest.mark.parametrize('name', ['llama', 'gemma', 'mixed'])
def test_merged_weights_compute_what_the_adapters_did(name, build, configs, batch):
    config = changed(configs[name], lora=ALL)
    model, plain = build(config), build(changed(config, lora=None))
    before = {path: value for path, value in plain.params.items()}
    plain.params = merge(model.params, config)
    assert plain.params.keys() == before.keys()
    hidden, logprobs, _ = model(*batch)
    np.testing.assert_allclose(plain(*batch)[0], hidden, rtol=1e-5, atol=5e-5)
    np.testing.assert_allclose(plain(*batch)[1], logprobs, rtol=1e-5, atol=5e-5)
    for path in before:
        is_adapted = '/'.join(path.split('/')[-2:]) in TARGETS
        moved = np.abs(plain.params[path] - model.params[path]).max()
        assert (moved > 1e-3) == is_adapted, path


def test_merging_on_a_mesh_leaves_the_weights_where_they_are_stored(adapted, build):
    model = build(adapted)
    expected = jax.device_get(merge(model.params, adapted))
    sizes = dict.fromkeys(sharding.MESH_AXES, 1) | dict(fsdp=4, tensor=2)
    mesh = sharding.make_mesh(sizes)
    specs = {path: sharding.stored_spec(axes) for path, axes in model.parts.axes.items()}
    places = {path: jax.NamedSharding(mesh, spec) for path, spec in specs.items()}
    with jax.set_mesh(mesh):
        params = jax.device_put(model.params, places)
        for path, value in merge(params, adapted).items():
            assert value.sharding.spec == specs[path], path
            np.testing.assert_allclose(value, expected[path], rtol=1e-6, atol=1e-6)


def test_a_bfloat16_model_has_float32_adapters_and_merges_to_bfloat16(adapted, build):
    config = changed(adapted, param_dtype='bfloat16', compute_dtype='bfloat16')
    model = build(config)
    for path, value in model.params.items():
        is_float32 = path.endswith('scale') or '_lora/' in path
        assert value.dtype == (jnp.float32 if is_float32 else jnp.bfloat16), path
    name = 'trunk/0/0/attention/q'
    merged = merge(model.params, config)[name]
    assert merged.dtype == jnp.bfloat16
    a, b = (np.asarray(model.params[f'{name}_lora/{half}'], np.float64) for half in 'ab')
    exact = np.asarray(model.params[name], np.float64) + 2.0 * np.einsum('ldr,lrnh->ldnh', a, b)
    np.testing.assert_array_equal(merged, jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16))


def test_only_the_targets_have_adapters(configs):
    lora = LoraConfig(rank=2, targets=['mlp/down', 'attention/out'])
    adapters = parts_of(changed(configs['gemma'], lora=lora)).adapters
    assert {path.split('/', 3)[3] for path in adapters} == {
        f'{target}_lora/{half}' for target in lora.targets for half in 'ab'
    }
    assert len(adapters) == 5 * 2 * 2  # positions of the patterns, targets, halves


# What is trained


def test_only_adapters_are_trained_and_have_moments(adapted, initial, batch):
    parts = parts_of(adapted)
    start = jax.tree.map(jnp.array, initial)
    assert start.trainable.keys() == parts.adapters
    before = jax.device_get(start.to_tree())
    step = state.make_train_step(parts, NextToken(NextTokenConfig()), adamw(parts))
    for seed in range(3):
        start, metrics = step(start, training_batch(batch, seed))
        assert metrics['grad_norm'] > 0
    after = jax.device_get(start.to_tree())
    moments = [name for name in after if '/mu/' in name or '/nu/' in name]
    assert len(moments) == 2 * len(parts.adapters)
    assert all('_lora/' in name for name in moments)
    for name, value in before.items():
        if name.startswith('frozen/'):
            assert after[name].tobytes() == value.tobytes(), name
        if name.startswith('trainable/'):
            assert not np.array_equal(after[name], value), name


def test_the_train_state_is_the_weights_and_three_times_the_adapters(adapted, initial):
    parts = parts_of(adapted)
    sizes = {path: leaf.size * leaf.dtype.itemsize for path, leaf in parts.shapes.items()}
    adapters = sum(sizes[path] for path in parts.adapters)
    expected = sum(sizes.values()) + 2 * adapters
    small = 64  # step, counters, key
    assert expected < bytes_total(initial) <= expected + small


def test_gradients_of_adapters_are_those_of_the_merged_weights(adapted, build, configs, batch):
    """dA = scale dW B^T, dB = scale A^T dW."""
    model, plain = build(adapted), build(configs['llama'])

    def gradients(parts, params):
        def loss(params):
            return jnp.sum(jnp.sin(parts.merge(params)(*batch)[0]))

        return jax.device_get(jax.jit(jax.grad(loss))(params))

    found = gradients(model.parts, model.params)
    whole = gradients(plain.parts, merge(model.params, adapted))
    sums = {
        'attention/q': 'ldnh,lrnh->ldr ldr,ldnh->lrnh',
        'attention/k': 'ldnh,lrnh->ldr ldr,ldnh->lrnh',
        'attention/v': 'ldnh,lrnh->ldr ldr,ldnh->lrnh',
        'attention/out': 'lnhd,lrd->lnhr lnhr,lnhd->lrd',
        'mlp/gate_up': 'ldcf,lcrf->ldcr ldcr,ldcf->lcrf',
        'mlp/down': 'lfd,lrd->lfr lfr,lfd->lrd',
    }
    assert sums.keys() == set(TARGETS)
    for target, products in sums.items():
        name = f'trunk/0/0/{target}'
        a, b = model.params[f'{name}_lora/a'], model.params[f'{name}_lora/b']
        of_a, of_b = products.split()
        pairs = {
            'a': np.einsum(of_a, whole[name], b),
            'b': np.einsum(of_b, a, whole[name]),
        }
        for half, expected in pairs.items():
            expected = 2.0 * expected
            error = np.abs(found[f'{name}_lora/{half}'] - expected).max()
            assert error < 2e-5 * np.abs(expected).max(), (name, half)


@pytest.mark.parametrize(
    'changes', [dict(scan=False), dict(remat='dots'), dict(remat='full', scan=False)], ids=str
)
def test_the_way_the_trunk_is_run_changes_no_gradient(changes, adapted, build, batch):
    params = build(adapted).params

    def gradients(config):
        parts = parts_of(config)

        def loss(adapters):
            return jnp.sum(jnp.sin(parts.merge(params | adapters)(*batch)[0]))

        adapters = {path: params[path] for path in parts.adapters}
        return jax.device_get(jax.jit(jax.grad(loss))(adapters))

    expected, found = gradients(adapted), gradients(changed(adapted, **changes))
    for path, value in expected.items():
        size = np.abs(value).max()
        assert size > 0, path
        np.testing.assert_allclose(found[path], value, rtol=0, atol=2e-5 * size, err_msg=path)


def test_patterns_freeze_adapters_as_they_freeze_weights(adapted):
    parts = parts_of(adapted, ['*/mlp/*', 'embedding/*'])
    assert parts.trainable == {path for path in parts.adapters if '/attention/' in path}


def test_adapters_decay_as_matrices_and_never_follow_muon(adapted):
    parts = parts_of(adapted)
    axes = {path: parts.axes[path] for path in parts.trainable}
    muon = Muon(MuonConfig(learning_rate=0.01, weight_decay=0.1), 10, axes)
    for rules in (adamw(parts, weight_decay=0.1).rules, muon.rules):
        assert set(rules.values()) == {'adamw, decay 0.1'}


def test_fresh_adapters_equal_those_of_a_new_run_and_depend_only_on_the_seed(adapted, initial):
    parts = parts_of(adapted)

    def fresh(seed):
        return state.fresh_params(
            lambda key: Transformer(adapted, nnx.Rngs(key)), parts, seed, parts.adapters
        )

    first, again, other = fresh(0), fresh(0), fresh(1)
    assert first.keys() == initial.trainable.keys()
    for path, value in first.items():
        np.testing.assert_array_equal(again[path], value)
        np.testing.assert_array_equal(value, initial.trainable[path])
        assert path.endswith('b') or np.abs(other[path] - value).max() > 0.1, path


# Cost


def compiled_flops(config, frozen=()):
    """FLOPs of one step's gradients as XLA counts them, for rows of 4096 positions in one chunk."""
    parts = parts_of(config, frozen)
    ids = jax.ShapeDtypeStruct((1, 64), jnp.int32)

    def loss(trainable, others, ids):
        model = parts.merge(trainable | others)
        hidden, _ = model(ids, ids, ids)
        weight_VD = model.unembed().weight_VD
        return jnp.sum(jnp.sin(hidden @ weight_VD.T))

    split = [
        {path: leaf for path, leaf in parts.shapes.items() if (path in parts.trainable) == chosen}
        for chosen in (True, False)
    ]
    lowered = jax.jit(jax.grad(loss)).lower(*split, ids)
    return lowered.compile().cost_analysis()['flops'] / 64, parts


@pytest.mark.parametrize('lora', [None, LoraConfig(rank=8, targets=['all'])], ids=str)
@pytest.mark.parametrize('frozen', [[], ['head/*', '*/mlp/*']], ids=str)
def test_flops_equal_those_of_the_compiled_gradients(lora, frozen, configs):
    """Gradients of frozen weights are neither counted nor computed."""
    block = changed(configs['llama'].block, num_heads=8, num_kv_heads=4, head_dim=16, mlp_dim=512)
    config = changed(
        configs['llama'], embed_dim=128, block=block, num_layers=3, scan=False, lora=lora
    )
    found, parts = compiled_flops(config, frozen)
    counted = model_flops_per_token(config, 64, causal=False, frozen=frozen_matmul_params(parts))
    assert found == pytest.approx(counted, rel=0.1)
    if lora:
        whole = model_flops_per_token(config, 64, causal=False)
        assert counted < 0.8 * whole

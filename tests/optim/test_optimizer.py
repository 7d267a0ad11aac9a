"""Optimizers against plain numpy, Muon matrix by matrix; schedules; which rule is whose."""

import jax
import numpy as np
import pytest

from jaxfm import sharding
from jaxfm.optim import AdamWConfig, MuonConfig, optimizer

AXES = {
    'embedding/table': ('vocab', 'embed'),
    'q': ('layers', 'embed', 'heads', 'head_dim'),
    'k': ('layers', 'embed', 'kv_heads', 'head_dim'),
    'out': ('layers', 'heads', 'head_dim', 'embed'),
    'gate_up': ('layers', 'embed', 'gate_up', 'mlp'),
    'down': ('layers', 'mlp', 'embed'),
    'q_bias': ('layers', 'heads', 'head_dim'),
    'up_bias': ('layers', 'gate_up', 'mlp'),
    'norm': ('layers', 'norm'),
    'final_norm': ('norm',),
    'head/table': ('vocab', 'embed'),
}
SIZES = dict(vocab=16, embed=8, heads=4, kv_heads=2, head_dim=4, gate_up=2, mlp=12, norm=8)
VECTORS = {'q_bias', 'up_bias', 'norm', 'final_norm'}
TABLES = {'embedding/table', 'head/table'}
MATRICES = AXES.keys() - VECTORS - TABLES


pytestmark = pytest.mark.usefixtures('quick_compilation')


def make_arrays(seed, layers=4):
    rng = np.random.default_rng(seed)
    sizes = SIZES | {'layers': layers}
    return {
        path: rng.normal(size=[sizes[name] for name in axes]).astype(np.float32)
        for path, axes in AXES.items()
    }


def run(rule, params, steps):
    """`steps` updates as the train step makes them; the gradients are make_arrays(step)."""

    @jax.jit
    def update(params, state, gradients, rate):
        updates, state = rule.transform.update(gradients, state, params)
        return {path: params[path] - rate * updates[path] for path in params}, state

    state = jax.jit(rule.transform.init)(params)
    for step in range(steps):
        gradients = make_arrays(step, layers=len(params['q']))
        if not jax.sharding.get_abstract_mesh().empty:
            gradients = place(gradients)
        params, state = update(params, state, gradients, np.float32(rule.schedule(step)))
    return jax.device_get(params), state


def place(arrays):
    mesh = jax.sharding.get_mesh()
    return {
        path: jax.device_put(
            array, jax.sharding.NamedSharding(mesh, sharding.stored_spec(AXES[path]))
        )
        for path, array in arrays.items()
    }


def adamw_in_numpy(config, params, rates):
    params = {path: array.astype(np.float64) for path, array in params.items()}
    first = {path: np.zeros_like(array) for path, array in params.items()}
    second = {path: np.zeros_like(array) for path, array in params.items()}
    for step, rate in enumerate(rates):
        for path, gradient in make_arrays(step, layers=len(params['q'])).items():
            first[path] = config.b1 * first[path] + (1 - config.b1) * gradient
            second[path] = config.b2 * second[path] + (1 - config.b2) * gradient.astype(float) ** 2
            mean = first[path] / (1 - config.b1 ** (step + 1))
            square = second[path] / (1 - config.b2 ** (step + 1))
            decay = 0 if path in VECTORS else config.weight_decay
            direction = mean / (np.sqrt(square) + config.eps) + decay * params[path]
            params[path] = params[path] - rate * direction
    return params


def test_adamw_equals_numpy_and_leaves_vectors_undecayed():
    config = AdamWConfig(learning_rate=0.1, warmup_steps=2, weight_decay=0.3, schedule='linear')
    params = make_arrays(seed=100)
    result, _ = run(optimizer.AdamW(config, 6, AXES), params, steps=5)
    # Half, whole, then down from 0.1 by 0.09 in four steps.
    rates = [0.05, 0.1, 0.1, 0.0775, 0.055]
    wanted = adamw_in_numpy(config, params, rates)
    for path in AXES:
        np.testing.assert_allclose(result[path], wanted[path], rtol=1e-5, atol=1e-5, err_msg=path)


def test_no_weight_decay_is_no_decay_anywhere():
    config = AdamWConfig(learning_rate=0.1, weight_decay=0.0, schedule='constant')
    params = make_arrays(seed=100)
    rule = optimizer.AdamW(config, 3, AXES)
    wanted = adamw_in_numpy(config, params, [0.1] * 3)
    result, _ = run(rule, params, steps=3)
    for path in AXES:
        np.testing.assert_allclose(result[path], wanted[path], rtol=1e-5, atol=1e-5, err_msg=path)
    assert set(rule.rules.values()) == {'adamw, no decay'}


def test_moments_are_stored_in_their_dtype():
    config = AdamWConfig(learning_rate=0.1, moment_dtype='bfloat16')
    state = optimizer.AdamW(config, 3, AXES).transform.init(make_arrays(0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state[0].mu)} == {'bfloat16'}


# Schedules


def rates(count, **options):
    config = AdamWConfig(**dict(learning_rate=0.8, final_fraction=0.25) | options)
    schedule = optimizer.make_schedule(config, count)
    return [float(schedule(step)) for step in range(count + 1)]


def test_warmup_rises_in_even_steps_from_the_first_update_to_the_peak():
    values = rates(8, warmup_steps=4, schedule='constant')
    np.testing.assert_allclose(values, [0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8], rtol=1e-6)


@pytest.mark.parametrize('warmup_steps', [0, 1])
def test_a_warmup_of_one_update_or_none_starts_at_the_peak(warmup_steps):
    assert rates(4, warmup_steps=warmup_steps)[0] == pytest.approx(0.8)


def test_cosine_falls_to_the_final_fraction_at_the_last_step():
    values = rates(10, warmup_steps=2)
    wanted = [0.2 + 0.3 * (1 + np.cos(np.pi * step / 8)) for step in range(9)]
    np.testing.assert_allclose(values[:2], [0.4, 0.8], rtol=1e-6)
    np.testing.assert_allclose(values[2:], wanted, rtol=1e-5)


def test_linear_falls_to_the_final_fraction_and_stays():
    values = rates(6, schedule='linear', decay_steps=3)
    np.testing.assert_allclose(values, [0.8, 0.6, 0.4, 0.2, 0.2, 0.2, 0.2], rtol=1e-5)


# Muon


def newton_schulz_in_numpy(matrix, steps):
    transposed = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if transposed else matrix).astype(np.float64)
    x = x / np.linalg.norm(x)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if transposed else x


def orthogonalized_in_numpy(array, path, steps):
    """Every matrix by itself, each [inputs, outputs] written out by hand."""
    result = np.empty(array.shape)
    for layer in range(len(array)):
        if path == 'gate_up':
            for side in (0, 1):
                matrix = array[layer, :, side]
                result[layer, :, side] = scaled_newton_schulz(matrix, steps)
        else:
            D = SIZES['embed']
            shape = (-1, D) if path in ('out', 'down') else (D, -1)
            matrix = scaled_newton_schulz(array[layer].reshape(shape), steps)
            result[layer] = matrix.reshape(array[layer].shape)
    return result


def scaled_newton_schulz(matrix, steps):
    inputs, outputs = matrix.shape
    return newton_schulz_in_numpy(matrix, steps) * np.sqrt(max(1, outputs / inputs))


def muon_in_numpy(config, params, rates):
    wanted = adamw_in_numpy(config, params, rates)
    for path in MATRICES:
        weight, momentum = params[path].astype(np.float64), 0
        for step, rate in enumerate(rates):
            gradient = make_arrays(step, layers=len(weight))[path].astype(np.float64)
            momentum = config.momentum * momentum + gradient
            looked_ahead = gradient + config.momentum * momentum
            direction = orthogonalized_in_numpy(looked_ahead, path, config.newton_schulz_steps)
            direction = direction + config.weight_decay * weight
            weight = weight - rate * config.muon_learning_rate / config.learning_rate * direction
        wanted[path] = weight
    return wanted


MUON = MuonConfig(learning_rate=0.01, muon_learning_rate=0.05, schedule='constant')
MESHES = {
    'fsdp 2 x tensor 2': dict(fsdp=2, tensor=2),  # layers are spread over fsdp
    'fsdp 8': dict(fsdp=8),  # too few layers: every device does all
}


def assert_muon(result, params):
    wanted = muon_in_numpy(MUON, params, [0.01] * 3)
    for path in AXES:
        np.testing.assert_allclose(result[path], wanted[path], rtol=1e-4, atol=1e-5, err_msg=path)


def test_muon_equals_numpy_for_every_matrix_of_every_layer():
    params = make_arrays(seed=100)
    result, _ = run(optimizer.Muon(MUON, 3, AXES), params, steps=3)
    assert_muon(result, params)


@pytest.mark.parametrize('sizes', MESHES.values(), ids=MESHES.keys())
def test_muon_equals_numpy_where_weights_are_sharded(sizes, capfd):
    shape = dict.fromkeys(sharding.MESH_AXES, 1) | sizes
    mesh = sharding.make_mesh(shape, jax.devices()[: np.prod(list(sizes.values()))])
    params = make_arrays(seed=100)
    with jax.set_mesh(mesh):
        placed = place(params)
        result, state = run(optimizer.Muon(MUON, 3, AXES), placed, steps=3)
    assert_muon(result, params)
    assert 'rematerialization' not in capfd.readouterr().err
    momentum = state.inner_states['muon'].inner_state[0].trace
    for path in MATRICES:
        assert momentum[path].sharding == placed[path].sharding, path


def test_each_matrix_is_whole_on_a_device_while_it_is_orthogonalized():
    """Sharded products would exchange every iteration of Newton-Schulz."""
    mesh = sharding.make_mesh(
        dict.fromkeys(sharding.MESH_AXES, 1) | dict(replica=2, fsdp=2, tensor=2)
    )
    with jax.set_mesh(mesh):
        for path, array in place(make_arrays(0)).items():
            if path in MATRICES:
                whole = jax.jit(sharding.place_matrices, static_argnums=1)(array, AXES[path])
                assert whole.sharding.spec[0] == 'fsdp' and set(whole.sharding.spec[1:]) <= {None}


def test_singular_values_come_near_one():
    matrix = np.random.default_rng(0).normal(size=(6, 20)).astype(np.float32)
    values = np.linalg.svd(optimizer.newton_schulz(matrix, steps=5), compute_uv=False)
    assert values.min() > 0.6 and values.max() < 1.25


# Rules


def test_every_parameter_has_a_rule_in_words():
    adamw = optimizer.AdamW(AdamWConfig(learning_rate=0.1), 3, AXES).rules
    assert {path for path in AXES if adamw[path] == 'adamw, no decay'} == VECTORS
    assert {path for path in AXES if adamw[path] == 'adamw, decay 0.1'} == AXES.keys() - VECTORS
    muon = optimizer.Muon(MuonConfig(learning_rate=0.1), 3, AXES).rules
    assert {path for path in AXES if muon[path] == 'muon, decay 0.1'} == MATRICES
    assert all(muon[path] == adamw[path] for path in VECTORS | TABLES)

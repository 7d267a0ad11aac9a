"""Muon against plain numpy, matrix by matrix, on one device and on meshes."""

import jax
import numpy as np
import pytest

from jaxfm import sharding
from jaxfm.optim import MuonConfig
from jaxfm.optim.muon import Muon, newton_schulz
from tests.optim.updates import AXES, MATRICES, SIZES, adamw_in_numpy, make_arrays, place, run

pytestmark = pytest.mark.usefixtures('quick_compilation')


def newton_schulz_in_numpy(matrix, steps):
    transposed = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if transposed else matrix).astype(np.float64)
    x = x / np.linalg.norm(x)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if transposed else x


def orthogonalized_in_numpy(array, path, steps):
    """Muon with every [inputs, outputs] matrix written out separately."""
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
    'fsdp 8': dict(fsdp=8),  # too few layers to spread: every device computes all
}


def assert_muon(result, params):
    wanted = muon_in_numpy(MUON, params, [0.01] * 3)
    for path in AXES:
        np.testing.assert_allclose(result[path], wanted[path], rtol=1e-4, atol=1e-5, err_msg=path)


def test_muon_equals_numpy_for_every_matrix_of_every_layer():
    params = make_arrays(seed=100)
    result, _ = run(Muon(MUON, 3, AXES), params, steps=3)
    assert_muon(result, params)


@pytest.mark.parametrize('sizes', MESHES.values(), ids=MESHES.keys())
def test_muon_equals_numpy_on_sharded_weights(sizes, capfd):
    shape = dict.fromkeys(sharding.MESH_AXES, 1) | sizes
    mesh = sharding.make_mesh(shape, jax.devices()[: np.prod(list(sizes.values()))])
    params = make_arrays(seed=100)
    with jax.set_mesh(mesh):
        placed = place(params)
        result, state = run(Muon(MUON, 3, AXES), placed, steps=3)
    assert_muon(result, params)
    assert 'rematerialization' not in capfd.readouterr().err
    momentum = state.inner_states['muon'].inner_state[0].trace
    for path in MATRICES:
        assert momentum[path].sharding == placed[path].sharding, path


def test_each_matrix_is_unsharded_while_it_is_orthogonalized():
    """With sharded products, every Newton-Schulz iteration would communicate."""
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
    values = np.linalg.svd(newton_schulz(matrix, steps=5), compute_uv=False)
    assert values.min() > 0.6 and values.max() < 1.25

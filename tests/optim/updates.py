"""Applies optimizer updates to a few parameters as the train step does; AdamW in plain numpy."""

import jax
import numpy as np

from jaxfm import sharding

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


def make_arrays(seed, layers=4):
    rng = np.random.default_rng(seed)
    sizes = SIZES | {'layers': layers}
    return {
        path: rng.normal(size=[sizes[name] for name in axes]).astype(np.float32)
        for path, axes in AXES.items()
    }


def run(rule, params, steps):
    """Applies `steps` updates as the train step does, with make_arrays(step) as gradients."""

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

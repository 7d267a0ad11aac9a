"""Kernels under the Explicit mesh, compiled for four GPUs: no unnecessary collectives."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm import sharding
from jaxfm.ops.attention import SAVED_NAMES, KeyValues, attention
from jaxfm.ops.norm import rms_norm
from pallas_kernels import attention as attention_kernels
from pallas_kernels import rms_norm as rms_norm_kernels
from pallas_kernels.attention import reference as attention_reference
from pallas_kernels.rms_norm import reference as norm_reference
from tools import deviceless

B, T, N, K, H, D = 4, 256, 8, 4, 64, 512
QUERIES = ('batch', 'position', 'heads', 'head_dim')
KEYS = ('batch', 'position', 'kv_heads', 'head_dim')
ROWS = ('batch', 'position')


def mesh_of_gpus():
    sizes = dict.fromkeys(sharding.MESH_AXES, 1) | {'fsdp': 2, 'tensor': 2}
    return jax.set_mesh(sharding.make_mesh(sizes, deviceless.devices(4)))


def abstract(shape, dtype, *names):
    place = jax.NamedSharding(jax.sharding.get_mesh(), sharding.activation(*names))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def collectives(function, *shapes) -> list[str]:
    """The collectives of the compiled program, by kind and result: "all-reduce f32[512]"."""
    text = deviceless.compile_lowered(jax.jit(function).lower(*shapes)).as_text()
    kinds = 'all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute'
    found = re.findall(rf'= (\S+?)(?:{{\S*}})? ({kinds})(?:-start)?\(', text)
    return [f'{kind} {shape}' for shape, kind in found]


def attend(q, k, v, positions, segments, dout):
    def out(q, k, v):
        keys = KeyValues(k, v, positions, segments)
        return attention(q, keys, positions, segments, scale=0.125, implementation='mosaic')

    value, pull = jax.vjp(out, q, k, v)
    return value, pull(dout)


def attention_shapes():
    q = abstract((B, T, N, H), jnp.bfloat16, *QUERIES)
    k = abstract((B, T, K, H), jnp.bfloat16, *KEYS)
    ids = abstract((B, T), jnp.int32, *ROWS)
    return q, k, k, ids, ids, q


def test_attention_needs_no_collective(gpu_compiler):
    with mesh_of_gpus():
        assert collectives(attend, *attention_shapes()) == []


@pytest.mark.parametrize(
    'shape, names, size',
    [((B, T, D), ('batch', 'position', 'embed'), D), ((B, T, N, H), QUERIES, H)],
)
def test_a_norm_reduces_only_the_gradient_of_its_scale(gpu_compiler, shape, names, size):
    def norm(x, scale, dy):
        value, pull = jax.vjp(
            lambda *arrays: rms_norm(*arrays, epsilon=1e-6, implementation='mosaic'), x, scale
        )
        return value, pull(dy)

    with mesh_of_gpus():
        x = abstract(shape, jnp.bfloat16, *names)
        scale = abstract((size,), jnp.float32, None)
        assert collectives(norm, x, scale, x) == [f'all-reduce f32[{size}]']


def kernels(jaxpr) -> int:
    """How many kernel calls a program has."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'mpmd_map':
            count += 1
            continue
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, 'jaxpr', inner)
            count += kernels(inner) if hasattr(inner, 'eqns') else 0
    return count


@pytest.mark.parametrize('names, times', [(SAVED_NAMES, 1), ((), 2)])
def test_a_policy_that_saves_attention_outputs_runs_attention_once(gpu_compiler, names, times):
    """Otherwise the forward kernel runs again in the backward pass."""
    policy = jax.checkpoint_policies.save_only_these_names(*names)

    def loss(q, k, v, positions, segments, dout):
        keys = KeyValues(k, v, positions, segments)
        options = dict(scale=0.125, implementation='mosaic')
        return jnp.sum(attention(q, keys, positions, segments, **options) * dout)

    with mesh_of_gpus():
        gradient = jax.grad(jax.checkpoint(loss, policy=policy))
        jaxpr = jax.make_jaxpr(gradient)(*attention_shapes())
    assert kernels(jaxpr.jaxpr) == times + 2  # the kernels of the backward pass


# The simulator runs only one kernel at a time, so references replace the kernels here.


@pytest.fixture
def references(monkeypatch):
    def backward(q, k, v, out, lse, dout, *ids, interpret, **options):
        def forward(q, k, v):
            return attention_reference.forward(q, k, v, *ids, **options)[0]

        return jax.vjp(forward, q, k, v)[1](dout)

    def without_interpret(function):
        return lambda *arrays, interpret, **options: function(*arrays, **options)

    monkeypatch.setattr(
        attention_kernels, 'forward', without_interpret(attention_reference.forward)
    )
    monkeypatch.setattr(attention_kernels, 'backward', backward)
    monkeypatch.setattr(rms_norm_kernels, 'forward', without_interpret(norm_reference.forward))
    monkeypatch.setattr(rms_norm_kernels, 'backward', without_interpret(norm_reference.backward))


SIZES = [dict(fsdp=2, context=2, tensor=2), dict(fsdp=8), dict(context=4, tensor=2)]


def on_mesh(sizes, function, arrays, names):
    """The unsharded results of `function` on eight CPU devices; without sizes, on one, by XLA."""
    if not sizes:
        return jax.device_get(function('xla', *arrays))
    sizes = dict.fromkeys(sharding.MESH_AXES, 1) | sizes
    with jax.set_mesh(sharding.make_mesh(sizes)):
        placed = [
            jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), sharding.activation(*n)))
            for x, n in zip(arrays, names)
        ]
        return jax.device_get(jax.jit(functools.partial(function, 'interpret'))(*placed))


@pytest.mark.parametrize('sizes', SIZES, ids=str)
def test_every_device_computes_its_part_of_attention(references, sizes):
    random = np.random.default_rng(0)
    shapes = (8, 16, 4, 64), (8, 16, 2, 64), (8, 16, 2, 64), (8, 16, 4, 64)
    q, k, v, dout = (jnp.asarray(random.normal(size=s), jnp.bfloat16) for s in shapes)
    positions = np.tile(np.r_[np.arange(7), np.arange(6), 0, 0, 0], (8, 1)).astype(np.int32)
    segments = np.tile(np.repeat([1, 2, 0], [7, 6, 3]), (8, 1)).astype(np.int32)

    def function(name, q, k, v, positions, segments, dout):
        def out(q, k, v):
            keys = KeyValues(k, v, positions, segments)
            options = dict(scale=0.125, window=5, implementation=name)
            return attention(q, keys, positions, segments, **options)

        value, pull = jax.vjp(out, q, k, v)
        return value, pull(dout)

    arrays = q, k, v, positions, segments, dout
    names = QUERIES, KEYS, KEYS, ROWS, ROWS, QUERIES
    alone, split = (on_mesh(s, function, arrays, names) for s in ({}, sizes))
    for ours, xla in zip(jax.tree.leaves(split), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(np.float64(ours), np.float64(xla), rtol=0.03, atol=0.03)


@pytest.mark.parametrize('sizes', SIZES, ids=str)
@pytest.mark.parametrize(
    'shape, names', [((8, 16, 64), ('batch', 'position', 'embed')), ((8, 16, 4, 64), QUERIES)]
)
def test_every_device_normalises_its_own_rows(references, sizes, shape, names):
    random = np.random.default_rng(0)
    x, dy = (jnp.asarray(random.normal(size=shape), jnp.float32) for _ in range(2))
    scale = jnp.asarray(random.normal(size=shape[-1:]), jnp.float32)

    def function(name, x, scale, dy):
        def norm(x, scale):
            return rms_norm(x, scale, epsilon=1e-6, implementation=name)

        value, pull = jax.vjp(norm, x, scale)
        return value, pull(dy)

    alone, split = (
        on_mesh(s, function, (x, scale, dy), (names, (None,), names)) for s in ({}, sizes)
    )
    for ours, xla in zip(jax.tree.leaves(split), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(ours, xla, rtol=1e-4, atol=1e-4)

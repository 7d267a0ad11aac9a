"""Kernels under the Explicit mesh, compiled for four GPUs: no collective that nobody needs."""

import re

import jax
import jax.numpy as jnp
import pytest

from jaxfm import sharding
from jaxfm.ops.attention import SAVED_NAMES, KeyValues, attention
from jaxfm.ops.norm import rms_norm
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
    """Of the compiled program: its kind and what it brings, "all-reduce f32[512]"."""
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
def test_a_norm_sums_the_gradient_of_its_scale_alone(gpu_compiler, shape, names, size):
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
    """How often a program runs one."""
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
def test_a_policy_that_keeps_what_attention_returns_runs_it_once(gpu_compiler, names, times):
    """Forward, and again in the backward pass unless its results are kept."""
    policy = jax.checkpoint_policies.save_only_these_names(*names)

    def loss(q, k, v, positions, segments, dout):
        keys = KeyValues(k, v, positions, segments)
        options = dict(scale=0.125, implementation='mosaic')
        return jnp.sum(attention(q, keys, positions, segments, **options) * dout)

    with mesh_of_gpus():
        gradient = jax.grad(jax.checkpoint(loss, policy=policy))
        jaxpr = jax.make_jaxpr(gradient)(*attention_shapes())
    assert kernels(jaxpr.jaxpr) == times + 2  # those of the backward pass

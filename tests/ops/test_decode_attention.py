"""Attention over pages equals attention over contiguous rows, on one device and on eight."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxfm import sharding
from jaxfm.ops import attention as plain
from jaxfm.ops.decode_attention import decode_attention
from pallas_kernels._compat import interpreted_races
from pallas_kernels.decode_attention.tiles import ROWS
from tools import deviceless

K, H, L, M = 2, 64, 32, 2
LENGTHS = np.array([0, 1, 33, 64], np.int32)
B = len(LENGTHS)
POOL = B * M + 2


def inputs(group=4, dtype=jnp.float32, seed=0):
    """(q, k_pages, v_pages, table, lengths), with pages in random order."""
    random = np.random.default_rng(seed)
    shapes = [(B, K * group, H), (POOL, L, K, H), (POOL, L, K, H)]
    matrices = [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]
    table = random.permutation(POOL)[: B * M].reshape(B, M).astype(np.int32)
    return *matrices, jnp.asarray(table), jnp.asarray(LENGTHS)


def attend(*arrays, **options):
    return jax.jit(functools.partial(decode_attention, **options))(*arrays)


def attend_to_rows(q_BNH, k_pages, v_pages, table, lengths, **options):
    """The same result by `attention`, over a cache with one row per sequence."""
    k_BSKH, v_BSKH = (pages[table].reshape(B, M * L, K, H) for pages in (k_pages, v_pages))
    positions_BS = jnp.broadcast_to(jnp.arange(M * L), (B, M * L))
    lengths_B1 = lengths[:, None]
    is_token_BS = (positions_BS < lengths_B1).astype(jnp.int32)
    keys = plain.KeyValues(k_BSKH, v_BSKH, positions_BS, is_token_BS)
    is_query_B1 = (lengths_B1 > 0).astype(jnp.int32)
    return plain.attention(q_BNH[:, None], keys, lengths_B1 - 1, is_query_B1, **options)[:, 0]


@pytest.mark.parametrize(
    'group, window, softcap',
    [(1, 0, 0.0), (4, 20, 0.0), (4, 0, 2.0), (8, 1, 0.0), (8, 20, 2.0)],
)
def test_pages_equal_rows(group, window, softcap):
    arrays, options = inputs(group), dict(scale=0.2, window=window, softcap=softcap)
    expected = jax.jit(functools.partial(attend_to_rows, **options))(*arrays)
    np.testing.assert_allclose(attend(*arrays, **options), expected, rtol=1e-5, atol=1e-6)


def test_pages_equal_rows_in_the_simulated_kernel():
    arrays, options = inputs(dtype=jnp.bfloat16), dict(scale=0.2, window=20, softcap=4.0)
    with interpreted_races() as races:
        found = jax.block_until_ready(attend(*arrays, implementation='interpret', **options))
        assert not races()
    exact = attend_to_rows(*(x.astype(jnp.float32) for x in arrays[:3]), *arrays[3:], **options)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=0.02, atol=0.02)


def test_what_lies_past_the_length_is_ignored():
    q, k_pages, v_pages, table, lengths = inputs()
    table, spoilt = np.array(table), np.ones((POOL, L), bool)
    for b, length in enumerate(LENGTHS):
        for j in range(length):
            spoilt[table[b, j // L], j % L] = False
        table[b, -(-length // L) :] = 1_000_000
    spoilt = spoilt[:, :, None, None]
    pages = (jnp.where(spoilt, jnp.nan, x) for x in (k_pages, v_pages))
    found = attend(q, *pages, jnp.asarray(table), lengths, scale=0.2)
    expected = attend(*inputs(), scale=0.2)
    np.testing.assert_array_equal(found, expected)


def test_the_order_of_pages_does_not_matter():
    q, k_pages, v_pages, table, lengths = inputs()
    order = np.random.default_rng(1).permutation(POOL)
    moved = np.argsort(order)[np.asarray(table)]
    found = attend(q, k_pages[order], v_pages[order], jnp.asarray(moved), lengths, scale=0.2)
    expected = attend(q, k_pages, v_pages, table, lengths, scale=0.2)
    np.testing.assert_array_equal(found, expected)


def specs():
    """The shardings of `inputs` on the current mesh."""
    pages = sharding.activation('batch', None, 'kv_heads', None)
    queries, table = sharding.activation('batch', 'heads', None), sharding.activation('batch', None)
    return queries, pages, pages, table, sharding.activation('batch')


def collectives(program: str) -> list[str]:
    return re.findall('all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute', program)


@pytest.mark.parametrize('sizes', [dict(fsdp=4, tensor=2), dict(tensor=2), dict(context=2, fsdp=2)])
def test_a_mesh_equals_one_device(sizes):
    q, k_pages, v_pages, table, lengths = inputs()
    options = dict(scale=0.2, window=30, softcap=5.0)
    expected = attend(q, k_pages, v_pages, table, lengths, **options)
    shape = dict.fromkeys(sharding.MESH_AXES, 1) | sizes
    mesh = sharding.make_mesh(shape, jax.devices()[: np.prod(list(sizes.values()))])
    with jax.set_mesh(mesh):
        # Each device holds the pages of its own sequences, in the order of their tables.
        pages = (x[np.asarray(table).reshape(-1)] for x in (k_pages, v_pages))
        rows = B // sharding.batch_shards(mesh)
        own_table = jnp.tile(jnp.arange(rows * M).reshape(rows, M), (B // rows, 1))
        arrays = [
            jax.device_put(np.asarray(x), NamedSharding(mesh, spec))
            for x, spec in zip((q, *pages, own_table, lengths), specs())
        ]
        compiled = jax.jit(functools.partial(decode_attention, **options)).lower(*arrays).compile()
        found = compiled(*arrays)
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-5, atol=1e-6)
    assert not collectives(compiled.as_text())


def test_the_kernel_needs_no_collective_on_four_gpus(gpu_compiler):
    shape = dict.fromkeys(sharding.MESH_AXES, 1) | dict(fsdp=2, tensor=2)
    mesh = sharding.make_mesh(shape, deviceless.devices(4))
    arrays = inputs(dtype=jnp.bfloat16)
    with jax.set_mesh(mesh):
        arrays = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
            for x, spec in zip(arrays, specs())
        ]
        op = functools.partial(decode_attention, scale=0.2, implementation='mosaic')
        program = deviceless.compile_lowered(jax.jit(op).lower(*arrays)).as_text()
    assert 'mosaic_gpu' in program
    assert not collectives(program)


HOPPER = jax.sharding.AbstractMesh(
    (),
    (),
    abstract_device=jax.sharding.AbstractDevice(
        device_kind='NVIDIA H200', num_cores=132, platform='gpu'
    ),
)


@pytest.mark.parametrize('name', ['mosaic', 'interpret'])
def test_a_kernel_that_cannot_take_the_arrays_is_an_error(name):
    words = "all bfloat16 or all float16, not float32; use 'xla'"
    with jax.sharding.use_abstract_mesh(HOPPER), pytest.raises(ValueError, match=words):
        attend(*inputs(), scale=1.0, implementation=name)


def test_the_kernel_refuses_more_query_heads_a_key_head_than_it_has_rows():
    pages = jnp.zeros((2, 8, 1, 64), jnp.bfloat16)
    q = jnp.zeros((1, 2 * ROWS, 64), jnp.bfloat16)
    arrays = q, pages, pages, jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)
    words = f'at most {ROWS} query heads, not {2 * ROWS}'
    with jax.sharding.use_abstract_mesh(HOPPER), pytest.raises(ValueError, match=words):
        decode_attention(*arrays, scale=1.0, implementation='mosaic')


def test_a_kernel_that_the_device_cannot_run_is_an_error():
    with pytest.raises(ValueError, match="cannot run as 'mosaic': it needs a Hopper GPU"):
        attend(*inputs(dtype=jnp.bfloat16), scale=1.0, implementation='mosaic')


def test_an_unknown_implementation_is_an_error():
    with pytest.raises(ValueError, match="'cudnn'"):
        attend(*inputs(), scale=1.0, implementation='cudnn')


def test_naming_the_implementation_changes_nothing():
    named = attend(*inputs(), scale=0.2, implementation='xla')
    np.testing.assert_array_equal(named, attend(*inputs(), scale=0.2))


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_pages_equal_rows_on_a_gpu(dtype):
    arrays, options = inputs(dtype=dtype), dict(scale=0.2, window=20, softcap=4.0)
    found = attend(*arrays, implementation='mosaic', **options)
    exact = attend_to_rows(*(x.astype(jnp.float32) for x in arrays[:3]), *arrays[3:], **options)
    np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=0.02, atol=0.02)

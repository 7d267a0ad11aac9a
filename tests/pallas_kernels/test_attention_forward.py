"""Flash attention, forward: numbers, races, machine code, and planted mistakes."""

import dataclasses
import functools
import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pallas_kernels import _tables
from pallas_kernels._compat import interpreted_races
from pallas_kernels.attention import candidates, choose_tiles, reference, schedule
from pallas_kernels.attention.tiles import HEAD_DIMS, ForwardTiles
from tests.pallas_kernels.attention_cases import Case, exact
from tests.pallas_kernels.mutants import mutant
from tools import deviceless

# The attribute of this name in the package is the function, not the module.
kernel = importlib.import_module('pallas_kernels.attention.forward')
DIRECTORY = _tables.DIRECTORY / 'attention'
# The smallest tiles, so that few tokens fill many tiles.
SMALL = ForwardTiles(rows=64, kv_tile=64, slots=2)

CASES = {
    'causal': Case(num_kv_heads=2),
    'documents': Case(lengths=(64, 70, 1, 1, 31), batch=2),
    'window below a tile': Case(window=30, lengths=(150, 40), head_dim=128),
    'eight heads a group': Case(60, 60, num_heads=8),
    'soft-cap, large logits': Case(softcap=20.0, magnitude=10.0, num_queries=100),
    'large logits': Case(magnitude=10.0, num_queries=100, lengths=(130, 70)),
    'permuted': Case(is_permuted=True, lengths=(90, 80), window=100, num_heads=1),
    'padding alone in some tiles': Case(num_queries=300, num_keys=300, lengths=(20,), num_heads=1),
    'last queries of a cache': Case(num_queries=7, num_keys=330, num_heads=1),
    'head_dim 256': Case(head_dim=256, num_queries=100, num_keys=130, num_heads=1),
    'float16': Case(dtype='float16', lengths=(100, 60), num_heads=1),
}
# Limits in addition to twice XLA's error, for outputs up to 4.
CAPS = {'bfloat16': 0.02, 'float16': 0.003}


def errors(case: Case, function) -> tuple[float, float]:
    """The largest errors of out and lse; infinite if rows that see no key differ."""
    arrays = case.arrays()
    out, lse = function(*arrays, **case.options)
    assert out.dtype == case.dtype and lse.dtype == jnp.float32
    out, lse = np.asarray(out, np.float64), np.asarray(lse, np.float64)
    right_out, right_lse = exact(arrays, **case.options)
    empty = np.isneginf(right_lse)
    if not np.array_equal(np.isneginf(lse), empty) or np.any(out[np.moveaxis(empty, 1, 2)]):
        return np.inf, np.inf
    return np.max(np.abs(out - right_out)), np.max(np.abs(lse[~empty] - right_lse[~empty]))


@functools.cache
def xla_errors(case: Case) -> tuple[float, float]:
    return errors(case, jax.jit(reference.forward, static_argnames=tuple(case.options)))


def within(case: Case, function, lse_cap: float = 1e-4) -> bool:
    out_error, lse_error = errors(case, function)
    # Also false for NaN, which compares false.
    return out_error <= min(2 * xla_errors(case)[0], CAPS[case.dtype]) and lse_error <= lse_cap


@pytest.mark.parametrize('name', CASES)
def test_reference_agrees_with_float64(name):
    out_error, lse_error = xla_errors(CASES[name])
    assert out_error < CAPS[CASES[name].dtype] and lse_error < 1e-4


def test_gradients_of_the_reference_are_those_of_its_function():
    case = Case(num_queries=9, num_keys=9, lengths=(5, 2), softcap=3.0, dtype='float32')
    q, k, v, *ids = case.arrays()

    def out(q, k, v):
        return reference.forward(q, k, v, *ids, **case.options)[0]

    check_grads(jax.jit(out), (q, k, v), order=1, modes=('rev',), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize('name', CASES)
def test_kernel_agrees_with_float64_in_the_interpreter(name, interpreter):
    assert within(CASES[name], partial(kernel.forward, tiles=SMALL, interpret=True))


def test_tiles_do_not_change_results_in_the_interpreter(interpreter):
    case = Case(num_queries=300, num_keys=300, num_heads=1, lengths=(170, 100))
    tiles = ForwardTiles(rows=128, kv_tile=128, slots=3)
    assert within(case, partial(kernel.forward, tiles=tiles, interpret=True))


def random_tokens(rng, B, size):
    """Positions and segment ids: random, or those of packed documents, sometimes permuted."""
    segments = rng.integers(0, rng.integers(1, 6), (B, size))
    positions = rng.integers(0, rng.integers(1, 2 * size + 2), (B, size))
    if rng.random() < 0.7:
        segments = np.sort(segments, axis=1)
        starts = np.diff(segments, axis=1, prepend=-1) != 0
        index = np.arange(size)[None]
        positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    if rng.random() < 0.2:
        order = rng.permutation(size)
        positions, segments = positions[:, order], segments[:, order]
    return positions.astype(np.int32), segments.astype(np.int32)


def schedule_is_right(module, number: int = 60) -> bool:
    """Whether exactly the tiles with only visible pairs are full, and no visible pair is lost."""
    rng = np.random.default_rng(0)
    T, S = 61, 93
    for _ in range(number):
        # One shape only, because every new shape is compiled.
        keys = random_tokens(rng, 2, S)
        start = rng.integers(0, S - T + 1)
        queries = [x[:, start : start + T] for x in keys]
        if rng.random() < 0.3:
            queries = random_tokens(rng, 2, T)
        window = int(rng.choice([0, 1, 2, 7]))
        mask = schedule.visible(
            *(x[:, :, None] for x in queries), *(x[:, None, :] for x in keys), window
        )
        mask = np.pad(mask, ((0, 0), (0, -T % 8), (0, -S % 16)))
        mask = mask.reshape(2, mask.shape[1] // 8, 8, mask.shape[2] // 16, 16)
        some, full = mask.any((2, 4)), mask.all((2, 4))
        sizes = dict(q_tile=8, kv_tile=16, window=window)
        transposed = [np.swapaxes(x, 1, 2) for x in (some, full)]
        rows = module.for_queries(*queries, *keys, **sizes)
        columns = module.for_keys(*queries, *keys, **sizes)
        if not (_covers(rows, some, full) and _covers(columns, *transposed)):
            return False
    return True


def _covers(plan, some, full) -> bool:
    tiles, num_full, num_visited, order = (np.asarray(x) for x in plan)
    work = np.take_along_axis(num_visited, order, axis=1)
    if np.any(np.diff(work, axis=1) > 0):
        return False
    for index in np.ndindex(num_full.shape):
        seen = tiles[index][: num_visited[index]]
        is_whole = set(seen[: num_full[index]]) == set(np.flatnonzero(full[index]))
        if not is_whole or len(set(seen)) < len(seen):
            return False
        if not set(np.flatnonzero(some[index])) <= set(seen):
            return False
    return True


def test_schedule_has_every_visible_pair_and_masks_no_full_tile():
    assert schedule_is_right(schedule)


def test_schedule_of_packed_documents_visits_nothing_in_vain():
    """For tokens in the order of training rows the schedule is exact, also with a window."""
    rng = np.random.default_rng(1)
    for window in (0, 40):
        lengths = rng.integers(1, 120, 12)
        segments = np.repeat(np.arange(12) + 1, lengths)[None].astype(np.int32)
        positions = np.concatenate([np.arange(x) for x in lengths])[None].astype(np.int32)
        size = segments.shape[1] // 16 * 16
        ids = (positions[:, :size], segments[:, :size])
        plan = schedule.for_queries(*ids, *ids, q_tile=16, kv_tile=16, window=window)
        mask = schedule.visible(
            *(x[:, :, None] for x in ids), *(x[:, None, :] for x in ids), window
        )
        some = mask.reshape(size // 16, 16, size // 16, 16).any((1, 3))
        assert np.array_equal(plan.num_visited_BX[0], some.sum(1))


def test_schedule_skips_padding_and_the_future():
    ids = (np.arange(64, dtype=np.int32)[None], np.repeat([1, 0], [40, 24])[None].astype(np.int32))
    plan = schedule.for_queries(*ids, *ids, q_tile=16, kv_tile=8)
    assert plan.num_visited_BX.tolist() == [[2, 4, 5, 0]]
    assert plan.num_full_BX.tolist() == [[0, 2, 0, 0]]
    assert plan.order_BX.tolist() == [[2, 1, 0, 3]]


def wrong_input(**change):
    case = dataclasses.replace(Case(num_queries=8, num_keys=8), **change)
    return kernel.forward(*case.arrays(), **case.options, interpret=True)


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (dict(dtype='float32'), 'not float32'),
        (dict(head_dim=96), 'head_dim must be one of'),
        (dict(num_heads=3, num_kv_heads=2), 'a multiple of'),
    ],
)
def test_what_the_kernel_cannot_do_is_said(change, words):
    with pytest.raises(ValueError, match=words):
        wrong_input(**change)


def shapes(head_dim: int, dtype: str, num_tokens: int = 1024):
    def tokens(*rest, dtype='int32'):
        return jax.ShapeDtypeStruct((2, num_tokens, *rest), dtype)

    q, k = tokens(8, head_dim, dtype=dtype), tokens(2, head_dim, dtype=dtype)
    return q, k, k, *(tokens() for _ in range(4))


def assert_fits(function, head_dim: int, dtype: str):
    codes = deviceless.compile_kernels(function, *shapes(head_dim, dtype))
    assert len(codes) == 1
    for code in codes:
        assert code.uses_tensor_cores
        assert not code.is_serialized
        assert code.spilled_bytes == 0
        assert code.registers <= 168  # for 384 threads; later, warpgroups redistribute them
        assert code.smem_bytes <= 227 * 1024


@pytest.mark.parametrize('head_dim', HEAD_DIMS)
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_kernel_compiles_without_spills(head_dim, dtype, gpu_compiler):
    """With the most expensive mask; bfloat16 without a soft-cap, float16 with one."""
    softcap = {'bfloat16': 0.0, 'float16': 50.0}[dtype]
    tiles = choose_tiles('forward', head_dim=head_dim, dtype=dtype)
    options = dict(scale=0.1, window=1000, softcap=softcap, tiles=tiles)
    assert_fits(partial(kernel.forward, **options), head_dim, dtype)


def measurable() -> list:
    """Tiles that a tuner may try or has chosen, except those tested above."""
    found = []
    for head_dim in HEAD_DIMS:
        default = choose_tiles('forward', head_dim=head_dim, dtype='bfloat16')
        tiles = candidates('forward', head_dim=head_dim, dtype='bfloat16')
        found += [(head_dim, 'bfloat16', x) for x in tiles if x != default]
    for entry in _tables.entries(DIRECTORY):
        if entry['part'] == 'forward':
            found.append((entry['head_dim'], entry['dtype'], ForwardTiles(**entry['tiles'])))
    return list(dict.fromkeys(found))


@pytest.mark.slow  # before a tuner tries them; what is chosen today is compiled above
@pytest.mark.parametrize(('head_dim', 'dtype', 'tiles'), measurable())
def test_all_tiles_that_may_be_chosen_compile_without_spills(head_dim, dtype, tiles, gpu_compiler):
    options = dict(scale=0.1, window=1000, softcap=50.0, tiles=tiles)
    assert_fits(partial(kernel.forward, **options), head_dim, dtype)


# Mistakes: the module, the original text, the planted text, and the checks that must find it.
# 'numbers' means wrong results, 'interpreter' a race or an error in the interpreter.
MISTAKES = {
    'no wait for K': (
        kernel,
        'plgpu.barrier_wait(k_ready.at[slot])',
        'pass',
        {'interpreter'},
    ),
    'no wait for V': (
        kernel,
        'plgpu.barrier_wait(v_ready.at[slot])',
        'pass',
        {'interpreter'},
    ),
    'no wait for a free slot of K': (kernel, 'await_free(k_free)', 'pass', {'interpreter'}),
    'the other slot of V': (
        kernel,
        'return v_smem.at[slot]',
        'return v_smem.at[slots - 1 - slot]',
        {'interpreter', 'numbers'},
    ),
    'V of another tile than K': (
        kernel,
        'v_ref.at[b, keys, kv_head]',
        'v_ref.at[b, pl.ds(tiles_ref[b, row, 0] * kv_tile, kv_tile), kv_head]',
        {'numbers'},
    ),
    'a partial tile taken for full': (
        kernel,
        'visit(*x, is_partial=True)',
        'visit(*x, is_partial=False)',
        {'numbers'},
    ),
    'a query does not see itself': (
        schedule,
        '(kv_position <= q_position)',
        '(kv_position < q_position)',
        {'numbers'},
    ),
    'window one too wide': (
        schedule,
        'mask &= q_position - kv_position < window',
        'mask &= q_position - kv_position <= window',
        {'numbers'},
    ),
    'the segment that ends in a tile skipped': (
        schedule,
        'kv.greatest_segment >= q.least_segment',
        'kv.greatest_segment > q.least_segment',
        {'schedule', 'numbers'},
    ),
    'the first key of a tile skipped': (
        schedule,
        'kv.first_position <= q.last_position',
        'kv.first_position < q.last_position',
        {'schedule'},
    ),
    'window one too narrow between tiles': (
        schedule,
        'q.first_position - kv.last_position < window',
        'q.first_position - kv.last_position < window - 1',
        {'schedule'},
    ),
    'a tile with padding taken for full': (
        schedule,
        'jnp.all(counts, axis=-1) & (least_segment',
        '(least_segment',
        {'schedule'},
    ),
}
# Two tiles of queries, four of keys, a document that begins within a tile and padding after it.
SENSITIVE = Case(250, 250, num_heads=1, lengths=(140, 90), window=100)


@pytest.mark.parametrize('name', MISTAKES)
def test_planted_mistake_is_found(name, monkeypatch):
    module, old, new, expected = MISTAKES[name]
    made = mutant(module, old, new)
    found = set()
    if module is schedule:
        monkeypatch.setattr(kernel, 'schedule', made)
        if not schedule_is_right(made):
            found.add('schedule')
    forward = kernel.forward if module is schedule else made.forward
    with interpreted_races() as races:
        try:
            if not within(SENSITIVE, partial(forward, tiles=SMALL, interpret=True)):
                found.add('numbers')
        except jax.errors.JaxRuntimeError:  # the interpreter cannot continue
            found.add('interpreter')
        if races():
            found.add('interpreter')
    assert found >= expected, found


def test_without_a_mistake_nothing_is_found(interpreter):
    assert within(SENSITIVE, partial(kernel.forward, tiles=SMALL, interpret=True))


@pytest.mark.gpu
@pytest.mark.parametrize('name', CASES)
def test_kernel_agrees_with_float64_on_the_gpu(name):
    """On the GPU, approximate instructions compute the log-sum-exp."""
    case = dataclasses.replace(CASES[name], num_queries=777, num_keys=777)
    assert within(case, jax.jit(kernel.forward, static_argnames=tuple(case.options)), 2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize('head_dim', HEAD_DIMS)
def test_kernel_repeats_its_bits_on_the_gpu(head_dim):
    case = Case(2048, 2048, 16, 4, head_dim, lengths=(700, 3, 900), window=500)
    arrays = case.arrays()
    first, *others = (kernel.forward(*arrays, **case.options) for _ in range(3))
    for other in others:
        assert all(np.array_equal(x, y) for x, y in zip(first, other, strict=True))

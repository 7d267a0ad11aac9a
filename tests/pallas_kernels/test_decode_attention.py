"""Decode attention over pages: reference, kernel interpreted and compiled, planted mistakes.

Pages are shuffled, everything that a query does not see is NaN, and unused table entries are
invalid.
"""

import functools
import importlib
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _tables
from pallas_kernels._compat import interpreted_races
from pallas_kernels.decode_attention import (
    candidates,
    choose_tiles,
    forward,
    reference,
    table_key,
)
from pallas_kernels.decode_attention.tiles import Tiles
from tests.pallas_kernels.mutants import mutant
from tools import deviceless

# The attribute of this name in the package is the function, not the module.
kernel = importlib.import_module('pallas_kernels.decode_attention.forward')
NOWHERE = 1_000_000


def inputs(lengths, *, heads, head_dim, page_size, dtype, window=0, logits=1.0, seed=0):
    """(q, k_pages, v_pages, page_table, lengths); everything else in the pages is NaN."""
    random = np.random.default_rng(seed)
    K, G = heads
    lengths = np.array(lengths, np.int32)
    M = -(-max(*lengths, 1) // page_size)
    P = len(lengths) * M + 3
    shape = P, page_size, K, head_dim
    k_pages, v_pages = np.full(shape, np.nan), np.full(shape, np.nan)
    table = np.full((len(lengths), M), NOWHERE, np.int32)
    free = iter(random.permutation(P))
    for b, length in enumerate(lengths):
        for j in range(max(0, length - window) if window else 0, length):
            if table[b, j // page_size] == NOWHERE:
                table[b, j // page_size] = next(free)
            place = table[b, j // page_size], j % page_size
            k_pages[place] = random.normal(size=shape[2:])
            v_pages[place] = random.normal(size=shape[2:])
    q = logits * random.normal(size=(len(lengths), K * G, head_dim))
    matrices = [jnp.asarray(x, dtype) for x in (q, k_pages, v_pages)]
    return *matrices, jnp.asarray(table), jnp.asarray(lengths)


def exact(q, k_pages, v_pages, table, lengths, *, scale, window=0, softcap=0.0):
    """(out, lse) in float64, one sequence and one head at a time."""
    q, k_pages, v_pages = (np.asarray(x, np.float64) for x in (q, k_pages, v_pages))
    table, L = np.asarray(table), k_pages.shape[1]
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    group = q.shape[1] // k_pages.shape[2]
    for b, n in np.ndindex(lse.shape):
        length = int(lengths[b])
        seen = np.arange(max(0, length - window) if window else 0, length)
        if len(seen):
            places = table[b, seen // L], seen % L, n // group
            scores = scale * k_pages[places] @ q[b, n]
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            lse[b, n] = scores.max() + np.log(np.exp(scores - scores.max()).sum())
            out[b, n] = np.exp(scores - lse[b, n]) @ v_pages[places]
    return out, lse


def check(found, arrays, **options):
    """Asserts at most twice XLA's error for the same inputs, and closeness in any case."""
    wanted_out, wanted_lse = exact(*arrays, **options)
    plain_out, _ = jax.jit(functools.partial(reference.forward, **options))(*arrays)
    out, lse = (np.asarray(x, np.float64) for x in found)
    error_of_xla = np.abs(np.asarray(plain_out, np.float64) - wanted_out).max()
    assert found[0].dtype == arrays[0].dtype
    assert np.abs(out - wanted_out).max() <= max(2 * error_of_xla, 1e-3)
    np.testing.assert_allclose(out, wanted_out, rtol=0.02, atol=0.02)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-4, atol=1e-4)


# The reference


@pytest.mark.parametrize('softcap', [0.0, 2.0])
@pytest.mark.parametrize('window', [0, 1, 9])
@pytest.mark.parametrize('heads', [(4, 1), (2, 4), (1, 8)])
def test_reference_equals_float64(heads, window, softcap):
    options = dict(scale=0.3, window=window, softcap=softcap)
    arrays = inputs(
        [0, 1, 8, 21], heads=heads, head_dim=16, page_size=8, dtype='float32', window=window
    )
    out, lse = reference.forward(*arrays, **options)
    wanted_out, wanted_lse = exact(*arrays, **options)
    np.testing.assert_allclose(out, wanted_out, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-5, atol=1e-5)


def test_parts_merge_to_the_whole_and_empty_ones_count_nothing():
    arrays = inputs([24], heads=(2, 2), head_dim=16, page_size=8, dtype='float32')
    q, k_pages, v_pages, table, _ = arrays
    parts = [
        exact(q, k_pages, v_pages, table[:, columns], [length], scale=0.3)
        for columns, length in [(slice(0, 1), 8), (slice(0, 3), 0), (slice(1, 3), 16)]
    ]
    out, lse = kernel.merge(*(np.stack(x).astype(np.float32) for x in zip(*parts)))
    whole_out, whole_lse = exact(*arrays, scale=0.3)
    np.testing.assert_allclose(out, whole_out, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse, whole_lse, rtol=1e-5, atol=1e-5)


# In the interpreter


def simulate(forward, arrays, **options):
    return jax.jit(functools.partial(forward, interpret=True, **options))(*arrays)


CASES = {
    'lengths of all kinds': dict(lengths=[0, 1, 150], heads=(2, 4), page_size=16),
    'more splits than tiles': dict(lengths=[64, 193], page_size=32, tiles=Tiles(64, 1, 5)),
    'a window that begins within a page': dict(lengths=[90, 300], page_size=32, window=70),
    'a window of one': dict(lengths=[1, 65], page_size=64, window=1),
    'a long page, a wide head': dict(
        lengths=[200, 64], heads=(1, 2), head_dim=256, page_size=128, window=130
    ),
    'soft-cap, large scores': dict(
        lengths=[65, 130], heads=(1, 8), page_size=64, softcap=5.0, logits=10.0
    ),
    'large scores in float16': dict(
        lengths=[65, 127], heads=(1, 9), head_dim=128, page_size=32, dtype='float16', logits=10.0
    ),
}


@pytest.mark.parametrize('name', CASES)
def test_kernel_equals_float64_without_races(name, interpreter):
    case = CASES[name]
    shapes = dict(heads=(1, 4), head_dim=64, dtype='bfloat16', window=0, logits=1.0)
    shapes = {word: case.get(word, default) for word, default in shapes.items()}
    arrays = inputs(case['lengths'], page_size=case['page_size'], **shapes)
    options = dict(scale=0.125, window=shapes['window'], softcap=case.get('softcap', 0.0))
    found = simulate(forward, arrays, tiles=case.get('tiles', Tiles(64, 2, 2)), **options)
    check(found, arrays, **options)


# What is loaded


def loads_what_is_seen(kernel) -> bool:
    """Whether exactly the pieces that hold a key within window and length are loaded."""
    lengths = jnp.arange(70)
    for window, piece in itertools.product([0, 1, 8, 9, 100], [8, 16]):
        found = kernel.find_seen(lengths, window=window, piece=piece)
        found = (np.broadcast_to(x, lengths.shape) for x in found)
        for length, start, first, end in zip(lengths.tolist(), *found):
            keys = range(max(0, length - window) if window else 0, length)
            pieces = sorted({key // piece for key in keys})
            if list(range(first, end)) != pieces or (length and start != keys[0]):
                return False
    return True


def test_no_page_is_loaded_that_the_query_sees_nothing_of():
    assert loads_what_is_seen(kernel)


# Planted mistakes, and what finds each: the test of what is loaded (an extra page would change no
# number), the interpreter, which refuses programs that hang, its race detector, or the numbers.

FIRST = 'lax.div(start, jnp.int32(piece))'
END = 'pl.cdiv(length, jnp.int32(piece))'
PRODUCT = """\
            out = accumulate(out, weights.astype(dtype), v_smem.at[slot], interpret=interpret)
"""
REFILL = """
            @pl.when(tile + tiles.slots < end_tile)
            def _():
                load(tile + tiles.slots, next_pages)
"""
MISTAKES = {
    'no wait for a tile': ('plgpu.barrier_wait(loaded.at[slot])\n', 'pass\n', 'refused'),
    'no wait for the queries': ('plgpu.barrier_wait(q_loaded)', 'pass', 'race'),
    'a tile is overwritten before its product': (PRODUCT + REFILL, REFILL + PRODUCT, 'race'),
    'a key beyond the length is seen': ('(key < length)', '(key <= length)', 'numbers'),
    'masked values are not zeroed': ('jnp.zeros_like(values)', 'values', 'numbers'),
    'two pages are swapped': (
        'pl.ds(i * piece, piece)',
        'pl.ds((i ^ 1) * piece, piece)',
        'numbers',
    ),
    'one page less before the window is skipped': (FIRST, f'{FIRST} - (start > 0)', 'loads'),
    'one page more before the window is skipped': (FIRST, f'{FIRST} + (start > 0)', 'loads'),
    'one page more is loaded': (END, f'{END} + (length > 0)', 'loads'),
    'the last page is left out': (END, 'lax.div(length, jnp.int32(piece))', 'loads'),
    'the window is one key short': ('length - window, 0)', 'length - window + 1, 0)', 'loads'),
    'a split begins one tile late': (
        'jnp.minimum(split * tiles_a_split, num_tiles)',
        'jnp.minimum(split * (tiles_a_split + 1), num_tiles)',
        'numbers',
    ),
    'an empty split is no number': ('jnp.where(total > 0, 1 / total, 0)', '1 / total', 'numbers'),
}


def what_finds(wrong, arrays, *, tiles, **options) -> str | None:
    if not loads_what_is_seen(wrong):
        return 'loads'
    with interpreted_races() as races:
        try:
            found = jax.block_until_ready(simulate(wrong.forward, arrays, tiles=tiles, **options))
        except jax.errors.JaxRuntimeError:
            return 'refused'
        if races():
            return 'race'
    try:
        check(found, arrays, **options)
    except AssertionError:
        return 'numbers'
    return None


@pytest.mark.parametrize('name', MISTAKES)
def test_a_mistake_is_found(name):
    old, new, finder = MISTAKES[name]
    shapes = dict(heads=(1, 4), head_dim=64, page_size=64, dtype='bfloat16', window=400)
    arrays = inputs([0, 500], **shapes)  # seven pages in four tiles, the ends partly
    wrong = mutant(kernel, old, new)
    assert what_finds(wrong, arrays, scale=0.125, window=400, tiles=Tiles(128, 1, 2)) == finder


# Compiled for an H200


def compiled(forward, head_dim, page_size=16, dtype='bfloat16', **options):
    """(tiles, the code of the only kernel)."""
    B, K, N, P, M = 4, 2, 8, 300, 64
    tiles = options.setdefault('tiles', guess(head_dim, page_size, dtype))
    shapes = [(B, N, head_dim)] + 2 * [(P, page_size, K, head_dim)]
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    arrays += [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in [(B, M), (B,)]]
    (code,) = deviceless.compile_kernels(functools.partial(forward, scale=0.1, **options), *arrays)
    return tiles, code


def guess(head_dim, page_size, dtype='bfloat16'):
    return choose_tiles(
        'forward',
        batch=4,
        num_kv_heads=2,
        head_dim=head_dim,
        page_size=page_size,
        max_length=4096,
        dtype=dtype,
    )


def num_commits(code) -> int:
    return code.sass.count('FENCE.VIEW.ASYNC')


def assert_good(code, tiles, head_dim):
    """Asserts no spills, and that as many blocks fit on an SM as the choice of splits assumes."""
    blocks = tiles.blocks_per_sm(head_dim)
    assert code.spilled_bytes == 0
    assert code.uses_tensor_cores
    assert num_commits(code) == 2
    assert code.smem_bytes <= tiles.smem_bytes(head_dim) <= 227 * 1024
    assert blocks * (code.smem_bytes + 1024) <= 228 * 1024
    assert blocks * 128 * -(-code.registers // 8) * 8 <= 65536


FULL = dict(window=1000, softcap=30.0)


@pytest.mark.parametrize(
    'head_dim, page_size, dtype, options',
    [
        (64, 16, 'bfloat16', {}),
        (64, 128, 'float16', FULL),
        (128, 16, 'bfloat16', FULL),
        (128, 64, 'float16', {}),
        (256, 16, 'bfloat16', FULL),
        (256, 128, 'float16', {}),
    ],
)
def test_compiles_without_spills(head_dim, page_size, dtype, options, gpu_compiler):
    tiles, code = compiled(forward, head_dim, page_size, dtype, **options)
    assert_good(code, tiles, head_dim)


def test_every_entry_of_the_table_compiles_without_spills(gpu_compiler):
    for entry in _tables.entries(Path(kernel.__file__).parent):
        tiles, head_dim = Tiles(**entry['tiles']), entry['head_dim']
        shapes = head_dim, entry['page_size'], entry['dtype']
        assert_good(compiled(forward, *shapes, tiles=tiles)[1], tiles, head_dim)


# The interpreter does not need these fences. On a GPU, writes must be committed before WGMMA or TMA
# reads them, so only the instructions reveal the mistake.
COMMITS = {
    'masked values': ('plgpu.commit_smem()\n\n            out =', '\n            out ='),
    'result': ('plgpu.commit_smem()\n        plgpu.copy', 'plgpu.copy'),
}


@pytest.mark.parametrize('name', COMMITS)
def test_a_commit_that_is_missing_is_found_by_the_compiler(name, gpu_compiler):
    _, code = compiled(mutant(kernel, *COMMITS[name]).forward, 64, page_size=128)
    assert num_commits(code) == 1


def test_too_many_values_in_registers_are_found_by_the_compiler(gpu_compiler):
    whole = mutant(
        kernel,
        'range(0, H, 64):  # by parts: registers are scarce\n'
        '                    part = slot, slice(None), pl.ds(i, 64)',
        'range(1):\n                    part = slot, slice(None), pl.ds(i, H)',
    )
    assert compiled(whole.forward, 256)[1].spilled_bytes > 0


# Sizes


def test_tiles_come_from_the_table_else_by_rule(monkeypatch):
    shape = dict(head_dim=128, page_size=16, max_length=8000, dtype='bfloat16')
    key = table_key('forward', batch=60, num_kv_heads=8, **shape)
    sizes = dict(head_dim=128, page_size=16, max_length=8192, streams=512)
    assert key == dict(part='forward', dtype='bfloat16', **sizes)
    assert choose_tiles('forward', batch=60, num_kv_heads=8, **shape) == Tiles(64, 2, 3)
    entry = dict(device='cpu', **key, tiles=dict(tokens=64, slots=4, splits=2))
    monkeypatch.setattr(_tables, '_read', lambda path: [entry])
    assert choose_tiles('forward', batch=64, num_kv_heads=8, **shape) == Tiles(64, 4, 2)


@pytest.mark.parametrize(
    'streams, max_length, splits', [(8, 8192, 33), (8, 1024, 8), (1, 131072, 264), (4096, 8192, 1)]
)
def test_a_few_sequences_are_split_more_than_many(streams, max_length, splits):
    shape = dict(head_dim=128, page_size=16, max_length=max_length, dtype='bfloat16')
    assert choose_tiles('forward', batch=streams, num_kv_heads=1, **shape).splits == splits


def test_everything_the_tuner_tries_can_run():
    for head_dim, page_size, batch, max_length in itertools.product(
        (64, 128, 256), (16, 128), (1, 64), (256, 32768)
    ):
        shape = dict(head_dim=head_dim, page_size=page_size)
        key = dict(batch=batch, num_kv_heads=8, max_length=max_length, dtype='bfloat16', **shape)
        found = candidates('forward', **key)
        assert len(set(found)) == len(found) > 1
        assert choose_tiles('forward', **key) in found
        assert all(tiles.misfit(**shape) is None for tiles in found)


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(dtype='float32'), 'q, k and v must be all bfloat16 or all float16, not float32'),
        (dict(head_dim=96), 'head_dim must be one of 64, 128, 256, not 96'),
        (dict(page_size=24), 'page_size must be a power of two and at least 8, not 24'),
        (dict(heads=(1, 65)), 'a kv head must have at most 64 query heads, not 65'),
        (dict(tiles=Tiles(32, 2, 1)), 'tiles must have a multiple of 64 tokens, not 32'),
        (dict(tiles=Tiles(192, 1, 1)), 'tiles of 192 and pages of 128 tokens must divide each'),
        (dict(tiles=Tiles(64, 2, 0)), 'slots and splits must be at least 1, not 2 and 0'),
        (dict(tiles=Tiles(128, 8, 1)), 'shared memory: 272,456 bytes exceed 232,448'),
    ],
)
def test_what_the_kernel_cannot_do_is_an_error(change, message):
    tiles = change.pop('tiles', None)
    shapes = dict(heads=(1, 4), head_dim=64, page_size=128, dtype='bfloat16') | change
    with pytest.raises(ValueError, match=f'decode_attention: {message}'):
        forward(*inputs([5], **shapes), scale=1.0, tiles=tiles)


# On a GPU


# Every head dim with every page size; all options, and every grouping of heads several times.
OPTIONS = [
    dict(),
    dict(window=700, logits=10.0),
    dict(window=1),
    dict(softcap=30.0, logits=10.0),
]
ON_A_GPU = [
    (16, (2, 1), 64, 'bfloat16', OPTIONS[0]),
    (32, (8, 4), 64, 'float16', OPTIONS[1]),
    (64, (1, 8), 64, 'bfloat16', OPTIONS[2]),
    (128, (1, 40), 64, 'bfloat16', OPTIONS[3]),
    (16, (8, 4), 128, 'float16', OPTIONS[1]),
    (32, (1, 8), 128, 'bfloat16', OPTIONS[2]),
    (64, (1, 40), 128, 'float16', OPTIONS[3]),
    (128, (2, 1), 128, 'bfloat16', OPTIONS[0]),
    (16, (1, 8), 256, 'bfloat16', OPTIONS[2]),
    (32, (1, 40), 256, 'bfloat16', OPTIONS[3]),
    (64, (2, 1), 256, 'float16', OPTIONS[0]),
    (128, (8, 4), 256, 'bfloat16', OPTIONS[1]),
]


@pytest.mark.gpu
@pytest.mark.parametrize('page_size, heads, head_dim, dtype, options', ON_A_GPU)
def test_kernel_on_a_gpu_equals_float64_and_repeats_bitwise(
    page_size, heads, head_dim, dtype, options
):
    lengths = [0, 1, 63, 64, 65, 1000, 3001]
    shapes = dict(heads=heads, head_dim=head_dim, page_size=page_size, dtype=dtype)
    window, softcap = options.get('window', 0), options.get('softcap', 0.0)
    arrays = inputs(lengths, window=window, logits=options.get('logits', 1.0), **shapes)
    options = dict(scale=head_dim**-0.5, window=window, softcap=softcap)
    attend = jax.jit(functools.partial(forward, **options))
    found = attend(*arrays)
    check(found, arrays, **options)
    for _ in range(3):
        for again, first in zip(attend(*arrays), found):
            np.testing.assert_array_equal(again, first)


@pytest.mark.gpu
@pytest.mark.parametrize('head_dim', [64, 128, 256])
def test_sizes_the_tuner_tries_are_right_on_a_gpu(head_dim):
    """Checks a quarter of them; the tuner compares the results of all."""
    shapes = dict(head_dim=head_dim, page_size=16, dtype='bfloat16')
    arrays = inputs([5, 900, 4096], heads=(2, 4), **shapes)
    shape = dict(batch=3, num_kv_heads=2, max_length=4096, **shapes)
    for tiles in candidates('forward', **shape)[::4]:
        found = jax.jit(functools.partial(forward, scale=0.1, tiles=tiles))(*arrays)
        check(found, arrays, scale=0.1)

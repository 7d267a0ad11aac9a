"""Flash attention, backward: numbers, races, machine code, and planted mistakes."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _tables
from pallas_kernels._compat import interpreted_races
from pallas_kernels.attention import candidates, choose_tiles, reference, schedule
from pallas_kernels.attention.tiles import HEAD_DIMS, BackwardTiles
from tests.pallas_kernels.attention_cases import Case, exact_gradients
from tests.pallas_kernels.mutants import mutant
from tools import deviceless

# The attribute of this name in the package is the function, not the module.
kernel = importlib.import_module('pallas_kernels.attention.backward')
DIRECTORY = _tables.DIRECTORY / 'attention'
NAMES = ('dq', 'dk', 'dv')
# With two slots, a ring wraps around soon.
SMALL = BackwardTiles(dkv_stages=2, dq_stages=2)
ONE_WARPGROUP = BackwardTiles(dq_warpgroups=1)

# Shapes and options are the same where possible, to share compiled programs.
PACKED = Case(num_heads=4, lengths=(64, 70, 1, 1, 31))
CASES = {
    'documents': PACKED,
    'large logits': dataclasses.replace(PACKED, magnitude=10.0, lengths=(130, 70)),
    'permuted': dataclasses.replace(PACKED, is_permuted=True),
    'padding alone in some tiles': dataclasses.replace(PACKED, lengths=(20,)),
    'float16, window below a tile': Case(dtype='float16', window=30, num_kv_heads=2),
    'eight heads a group': Case(100, 100, num_heads=8, head_dim=128),
    'soft-cap, large logits': Case(100, 200, 2, 1, 128, softcap=20.0, magnitude=10.0),
    'last queries of a cache': Case(7, 330, num_heads=1),
    'head_dim 256': Case(100, 130, num_heads=1, head_dim=256, lengths=(90,)),
}
# Limits in addition to twice XLA's error; both are relative to the greatest gradient.
CAPS = {'bfloat16': 0.02, 'float16': 0.003}


@functools.cache
def problem(case: Case):
    """The kernel's inputs, with results of the forward pass and a gradient for its output."""
    q, k, v, *ids = case.arrays()
    out, lse = reference.forward(q, k, v, *ids, **case.options)
    dout = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape), q.dtype)
    return q, k, v, out, lse, dout, *ids


@functools.cache
def right(case: Case) -> tuple:
    q, k, v, _, _, dout, *ids = problem(case)
    return exact_gradients((q, k, v, *ids), dout, **case.options)


def errors(case: Case, gradients) -> np.ndarray:
    """The largest errors of dq, dk and dv, relative to the greatest gradient."""
    found = [np.asarray(x, np.float64) for x in gradients]
    return np.array(
        [np.max(np.abs(x - y)) / np.max(np.abs(y)) for x, y in zip(found, right(case), strict=True)]
    )


@functools.cache
def limits(case: Case) -> np.ndarray:
    """Twice XLA's error, plus the error of exact gradients that start from the rounded output.

    XLA keeps the weights, but a kernel can compute delta only from the output; this alone shows in
    dq of queries with few keys.
    """
    q, k, v, rounded, _, dout, *ids = problem(case)
    least = errors(case, exact_gradients((q, k, v, *ids), dout, rounded, **case.options))

    def out(q, k, v):
        return reference.forward(q, k, v, *ids, **case.options)[0]

    xla = jax.jit(lambda *x: jax.vjp(out, *x)[1](dout))(q, k, v)
    return np.minimum(2 * errors(case, xla) + least, CAPS[case.dtype])


def jitted(function):
    return jax.jit(function, static_argnames=('scale', 'window', 'softcap', 'tiles', 'interpret'))


backward = jitted(kernel.backward)


def interpreted(case: Case, function=backward, tiles=SMALL):
    return jax.block_until_ready(
        function(*problem(case), **case.options, tiles=tiles, interpret=True)
    )


def assert_right(case: Case, gradients) -> None:
    for x, y in zip(gradients, problem(case), strict=False):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
    # Also fails for NaN, which compares false.
    assert np.all(errors(case, gradients) <= limits(case)), (errors(case, gradients), limits(case))


@pytest.mark.parametrize('name', CASES)
def test_kernels_agree_with_float64_in_the_interpreter(name, interpreter):
    case = CASES[name]
    tiles = ONE_WARPGROUP if case.head_dim == 256 else SMALL
    assert_right(case, interpreted(case, tiles=tiles))


def test_interpreted_kernels_repeat_their_bits(interpreter):
    for x, y in zip(interpreted(PACKED), interpreted(PACKED), strict=True):
        assert np.array_equal(x, y)


def test_tokens_that_see_nothing_have_no_gradient(interpreter):
    case = CASES['padding alone in some tiles']
    for gradient in interpreted(case):
        gradient = np.asarray(gradient[0], np.float32)
        assert np.all(np.isfinite(gradient))
        assert not np.any(gradient[20:]) and np.any(gradient[:20])


def shapes(head_dim: int, dtype: str, num_tokens: int = 1024):
    def tokens(*rest, dtype='int32'):
        return jax.ShapeDtypeStruct((2, num_tokens, *rest), dtype)

    q, k = tokens(8, head_dim, dtype=dtype), tokens(2, head_dim, dtype=dtype)
    lse = jax.ShapeDtypeStruct((2, 8, num_tokens), 'float32')
    return q, k, k, q, lse, q, *(tokens() for _ in range(4))


def assert_fits(head_dim: int, dtype: str, tiles, **options):
    codes = deviceless.compile_kernels(
        functools.partial(kernel.backward, scale=0.1, tiles=tiles, **options),
        *shapes(head_dim, dtype),
    )
    assert len(codes) == 2
    for code in codes:
        assert code.uses_tensor_cores
        assert code.spilled_bytes == 0
        assert not code.is_serialized
        assert code.registers <= 255  # at launch; later, warpgroups redistribute them
        assert code.smem_bytes <= 227 * 1024


@pytest.mark.parametrize('head_dim', HEAD_DIMS)
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_kernels_compile_without_spills(head_dim, dtype, gpu_compiler):
    """bfloat16 without options, float16 with a window and a soft-cap."""
    tiles = choose_tiles('backward', head_dim=head_dim, dtype=dtype)
    options = {'bfloat16': dict(), 'float16': dict(window=1000, softcap=50.0)}[dtype]
    assert_fits(head_dim, dtype, tiles, **options)


def measurable() -> list:
    """Tiles that a tuner may try or has chosen, except those tested above."""
    found = []
    for head_dim in HEAD_DIMS:
        default = choose_tiles('backward', head_dim=head_dim, dtype='bfloat16')
        tiles = candidates('backward', head_dim=head_dim, dtype='bfloat16')
        found += [(head_dim, 'bfloat16', x) for x in tiles if x != default]
    for entry in _tables.entries(DIRECTORY):
        if entry['part'] == 'backward':
            found.append((entry['head_dim'], entry['dtype'], BackwardTiles(**entry['tiles'])))
    return list(dict.fromkeys(found))


@pytest.mark.slow  # before a tuner tries them; what is chosen today is compiled above
@pytest.mark.parametrize(('head_dim', 'dtype', 'tiles'), measurable())
def test_all_tiles_that_may_be_chosen_compile_without_spills(head_dim, dtype, tiles, gpu_compiler):
    assert_fits(head_dim, dtype, tiles, window=1000, softcap=50.0)


@dataclasses.dataclass(frozen=True)
class Mistake:
    """`new` replaces `old`, and at least one of `finders` must find it.

    'numbers' means wrong results, 'interpreter' a race or an error in the interpreter.
    """

    kernel: str  # the only one that runs
    old: str
    new: str
    finders: set
    module: object = kernel
    case: Case = Case(num_heads=2, lengths=(100, 90), window=60)


SPLIT = Case(64, 100, num_heads=2, head_dim=128, softcap=20.0)
MISTAKES = {
    'no wait for queries': Mistake(
        '_dkv',
        'plgpu.barrier_wait(filled.at[slot])\n                own = _opaque(part)',
        'own = _opaque(part)',
        {'interpreter'},
    ),
    'no wait for keys': Mistake(
        '_dq',
        'plgpu.barrier_wait(filled.at[slot])\n                own = _opaque(warpgroup)',
        'own = _opaque(warpgroup)',
        {'interpreter', 'numbers'},  # uninitialised memory, if a load is that early
    ),
    'no wait for the owned queries': Mistake(
        '_dq',
        'plgpu.barrier_wait(owned)\n\n            def over_rows',
        'def over_rows',
        {'interpreter'},
    ),
    'no wait for a free slot': Mistake(
        '_dkv',
        'plgpu.barrier_wait(consumed.at[slot])\n\n            queries',
        'pass\n\n            queries',
        {'interpreter'},
    ),
    # Nothing finds this one: the interpreter's last product also has a fence, after the loads.
    'loads open when a slot is given back': Mistake(
        '_dkv',
        'plgpu.commit_smem()\n    plgpu.barrier_arrive(barrier)',
        'plgpu.barrier_arrive(barrier)',
        set(),
    ),
    'an output over what the other warpgroup reads': Mistake(
        '_dkv', 'plgpu.barrier_wait(finished)', 'pass', {'interpreter'}, case=SPLIT
    ),
    'dK from the other tile': Mistake(
        '_dkv',
        'dscores.astype(q.dtype), q_tile_ref)',
        'dscores.astype(q.dtype), dout_tile_ref)',
        {'numbers'},
    ),
    'tiles swapped': Mistake(
        '_dkv',
        'tiles_ref[batch, row, index]',
        'tiles_ref[batch, row, num_visited - 1 - index]',
        {'numbers'},
        case=Case(192, 192),  # has full tiles, so that swapping matters
    ),
    'one head for all of a group': Mistake(
        '_dkv', 'kv_head * G + group', 'kv_head * G', {'numbers'}
    ),
    'a partial tile taken for full': Mistake(
        '_dq', '(num_full, num_visited, True)', '(num_full, num_visited, False)', {'numbers'}
    ),
    'delta added': Mistake('_dq', 'log2_BNT, -delta_BNT', 'log2_BNT, delta_BNT', {'numbers'}),
    'soft-cap without its slope': Mistake(
        '_dkv', '(1.0 - capped * capped)', '1.0', {'numbers'}, case=SPLIT
    ),
    'a query does not see itself': Mistake(
        '_dkv',
        '(kv_position <= q_position)',
        '(kv_position < q_position)',
        {'numbers'},
        schedule,
    ),
    'window one too wide': Mistake(
        '_dq',
        'mask &= q_position - kv_position < window',
        'mask &= q_position - kv_position <= window',
        {'numbers'},
        schedule,
    ),
    'the segment that ends in a tile skipped': Mistake(
        '_dkv',
        'kv.greatest_segment >= q.least_segment',
        'kv.greatest_segment > q.least_segment',
        {'numbers'},
        schedule,
    ),
}


def found_by(mistake: Mistake, monkeypatch) -> set:
    made = mutant(mistake.module, mistake.old, mistake.new)
    if mistake.module is schedule:
        monkeypatch.setattr(kernel, 'schedule', made)
        made = kernel
    idle = {'_dkv': '_dq', '_dq': '_dkv'}[mistake.kernel]
    right_ones = right(mistake.case)
    monkeypatch.setattr(
        made, idle, lambda *_, **__: right_ones[0] if idle == '_dq' else right_ones[1:]
    )
    ran = [i for i, name in enumerate(NAMES) if (name == 'dq') == (mistake.kernel == '_dq')]
    found = set()
    # A new function, so that jax does not reuse the compiled original.
    function = jitted(lambda *x, **options: made.backward(*x, **options))
    with interpreted_races() as races:
        try:
            gradients = interpreted(mistake.case, function)
            worst = errors(mistake.case, gradients) - limits(mistake.case)
            if not np.all(worst[ran] <= 0):
                found.add('numbers')
        except jax.errors.JaxRuntimeError:  # the interpreter cannot continue
            found.add('interpreter')
        if races():
            found.add('interpreter')
    return found


@pytest.mark.parametrize('name', MISTAKES)
def test_planted_mistake_is_found(name, monkeypatch):
    mistake = MISTAKES[name]
    found = found_by(mistake, monkeypatch)
    assert found & mistake.finders if mistake.finders else not found, found


@pytest.mark.parametrize('case', [Mistake.case, SPLIT], ids=['plain', 'split'])
def test_without_a_mistake_nothing_is_found(case, interpreter):
    assert_right(case, interpreted(case))


@pytest.mark.gpu
@pytest.mark.parametrize('name', CASES)
def test_kernels_agree_with_float64_on_the_gpu(name):
    case = dataclasses.replace(CASES[name], num_queries=777, num_keys=777)
    assert_right(case, backward(*problem(case), **case.options))


@pytest.mark.gpu
@pytest.mark.parametrize('head_dim', HEAD_DIMS)
@pytest.mark.parametrize('softcap', [0.0, 20.0])
def test_kernels_repeat_their_bits_on_the_gpu(head_dim, softcap):
    case = Case(2048, 2048, 16, 4, head_dim, lengths=(700, 3, 900), window=500, softcap=softcap)
    first, *others = (backward(*problem(case), **case.options) for _ in range(3))
    for other in others:
        assert all(np.array_equal(x, y) for x, y in zip(first, other, strict=True))

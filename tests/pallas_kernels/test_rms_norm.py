"""RMS norm kernels: in the interpreter, compiled for an H200, and with planted mistakes."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pallas_kernels import _tables, rms_norm
from pallas_kernels._compat import interpreted_races
from pallas_kernels.rms_norm import choose_tiles, reference
from pallas_kernels.rms_norm.tiles import Tiles
from tests.pallas_kernels.mutants import mutant
from tools import deviceless

EPSILON = 1e-3
# The attributes of these names in the package are functions, not modules.
FORWARD, BACKWARD = (
    importlib.import_module(f'pallas_kernels.rms_norm.{name}') for name in ('forward', 'backward')
)
# Relative tolerance of a result: one rounding, and the error of the sums.
UNIT = {'bfloat16': 2.0**-8, 'float16': 2.0**-11, 'float32': 2.0**-20}


def arrays(M, D, dtype, residual, seed=0):
    """x, scale, residual, dy, dsum; the first row is zero, the last is large."""
    random = np.random.default_rng(seed)
    x, r, dy, dsum = (jnp.asarray(random.normal(size=(M, D)), dtype) for _ in range(4))
    x, r = x.at[0].set(0).at[-1].multiply(100), r.at[0].set(0)
    scale = jnp.asarray(random.normal(size=D), jnp.float32)
    return (x, scale, r, dy, dsum) if residual else (x, scale, None, dy, None)


def exact(x, scale, residual, dy, dsum):
    """normed, 1 / rms, dx, dscale in float64, from the rounded x + residual."""
    total = x if residual is None else x + residual
    z, w, dy = (np.asarray(value, np.float64) for value in (total, scale, dy))
    inverse = 1 / np.sqrt(np.mean(z * z, axis=1, keepdims=True) + EPSILON)
    dx = inverse * (dy * w - z * inverse**2 * np.mean(dy * w * z, axis=1, keepdims=True))
    dx += 0 if dsum is None else np.asarray(dsum, np.float64)
    return z * inverse * w, inverse[:, 0], dx, np.sum(dy * z * inverse, axis=0)


def check(found, exact_values, dtype, M):
    y, inverse, dx, dscale = (np.asarray(value, np.float64) for value in found)
    y_64, inverse_64, dx_64, dscale_64 = exact_values
    np.testing.assert_allclose(y, y_64, rtol=UNIT[dtype], atol=1e-5)
    np.testing.assert_allclose(inverse, inverse_64, rtol=1e-5)
    np.testing.assert_allclose(dx, dx_64, rtol=UNIT[dtype], atol=1e-5 * np.abs(dx_64).max())
    np.testing.assert_allclose(dscale, dscale_64, rtol=1e-5, atol=1e-5 * M**0.5)


def run(values, tiles=None, *, forward=rms_norm.forward, backward=rms_norm.backward, **options):
    x, scale, residual, dy, dsum = values
    y, total, inverse = forward(x, scale, residual, epsilon=EPSILON, tiles=tiles, **options)
    assert (total is None) == (residual is None)
    if residual is not None:
        np.testing.assert_array_equal(total, x + residual)
    normed = x if total is None else total
    dx, dscale = backward(dy, dsum, normed, scale, inverse, tiles=tiles, **options)
    assert (y.dtype, dx.dtype, dscale.dtype) == (x.dtype, x.dtype, jnp.float32)
    return y, inverse, dx, dscale


@pytest.mark.parametrize('residual', [False, True])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_the_reference_equals_float64(dtype, residual):
    values = arrays(7, 96, dtype, residual)
    x, scale, r, dy, dsum = values
    y, total, inverse = reference.forward(x, scale, r, epsilon=EPSILON)
    dx, dscale = reference.backward(dy, dsum, x if total is None else total, scale, inverse)
    check((y, inverse, dx, dscale), exact(*values), dtype, 7)


def test_the_backward_pass_of_the_reference_is_its_gradient():
    x, scale, _, dy, _ = arrays(5, 64, 'float32', False)
    x = x[1:-1]

    def normed(x, scale):
        return reference.forward(x, scale, epsilon=EPSILON)[0]

    check_grads(normed, (x, scale), order=1, modes=['rev'], rtol=2e-2)
    _, pull = jax.vjp(normed, x, scale)
    inverse = reference.forward(x, scale, epsilon=EPSILON)[2]
    found = reference.backward(dy[1:-1], None, x, scale, inverse)
    for ours, theirs in zip(found, pull(dy[1:-1]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


# vector, lanes, warps, groups, columns, blocks
SMALL = {
    'the guess': None,
    'rows side by side, in groups': Tiles(8, 8, 1, 2, 64, 2),
    'a row a block, several steps': Tiles(8, 32, 4, 1, 1024, 2),
    'rows in chunks': Tiles(4, 16, 2, 1, 128, 3),
}


@pytest.mark.parametrize(
    'rows, width, dtype, residual, tiles',
    [
        (3, 4096, 'bfloat16', True, 'the guess'),
        (5, 96, 'float16', False, 'the guess'),  # fewer rows than a step has
        (70, 64, 'bfloat16', True, 'rows side by side, in groups'),  # ragged
        (7, 1024, 'float16', True, 'a row a block, several steps'),
        (18, 384, 'float32', True, 'rows in chunks'),
        (18, 384, 'bfloat16', False, 'rows in chunks'),
    ],
)
def test_the_kernels_equal_float64_in_the_interpreter(
    interpreter, rows, width, dtype, residual, tiles
):
    values = arrays(rows, width, dtype, residual)
    found = run(values, SMALL[tiles], interpret=True)
    check(found, exact(*values), dtype, rows)


def compiled(part, rows, width, dtype, tiles=None, module=None):
    x = jax.ShapeDtypeStruct((rows, width), dtype)
    scale, inverse = (jax.ShapeDtypeStruct((n,), jnp.float32) for n in (width, rows))
    module = module or {'forward': FORWARD, 'backward': BACKWARD}[part]
    if part == 'forward':
        function = functools.partial(module.forward, epsilon=EPSILON, tiles=tiles)
        [code] = deviceless.compile_kernels(function, x, scale, x)
    else:
        function = functools.partial(module.backward, tiles=tiles)
        [code] = deviceless.compile_kernels(function, x, x, x, scale, inverse)
    return code


def is_good(code):
    return code.spilled_bytes == 0 and code.registers <= 255 and code.smem_bytes <= 227 * 1024


@pytest.mark.parametrize(
    'part, width, dtype',
    [
        ('forward', 64, 'bfloat16'),
        ('backward', 64, 'bfloat16'),
        ('forward', 16384, 'bfloat16'),
        ('backward', 16384, 'float32'),
        ('forward', 4096, 'float16'),
        ('backward', 4096, 'float16'),
        ('backward', 2880, 'bfloat16'),
    ],
)
def test_compiled_for_an_h200_nothing_is_spilled_and_loads_are_wide(
    gpu_compiler, part, width, dtype
):
    code = compiled(part, 4096, width, dtype)
    assert is_good(code)
    if width % 512 == 0:
        assert '.E.128' in code.sass


def test_every_entry_of_the_table_compiles(gpu_compiler):
    for entry in _tables.entries(rms_norm.__path__[0]):
        shape = [entry[name] for name in ('part', 'rows', 'width', 'dtype')]
        assert is_good(compiled(*shape, Tiles(**entry['tiles']))), entry


def test_a_table_is_looked_up_before_a_guess_is_made(monkeypatch):
    measured = dict(vector=4, lanes=32, warps=4, groups=2, columns=512, blocks=264)
    shape = dict(rows=4000, width=512, dtype=jnp.bfloat16)
    key = rms_norm.table_key('forward', **shape)
    assert key == dict(part='forward', dtype='bfloat16', width=512, rows=4096)
    entry = {'device': 'H200', **key, 'tiles': measured, 'measured': {}}
    monkeypatch.setattr(_tables, '_read', lambda path: [entry])
    with deviceless.target():
        assert choose_tiles('forward', **shape) == Tiles(**measured)
        assert choose_tiles('backward', **shape) != Tiles(**measured)


@pytest.mark.parametrize('part', ['forward', 'backward'])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_every_supported_width_has_tiles_that_cover_it(dtype, part):
    for width in range(64, 16384 + 1, 32):
        tiles = choose_tiles(part, rows=4096, width=width, dtype=dtype)
        threads = tiles.lanes * tiles.warps
        assert tiles.columns % (threads * tiles.vector) == 0
        assert width % tiles.columns == 0
        assert tiles.groups * tiles.columns <= 64 * threads
        assert tiles.vector * jnp.dtype(dtype).itemsize <= 16


@pytest.mark.parametrize(
    'width, dtype, word',
    [(80, 'bfloat16', 'multiple of 32'), (32, 'bfloat16', '64 to'), (64, 'int8', 'not int8')],
)
def test_what_is_not_supported_is_said(width, dtype, word):
    assert word in rms_norm.obstacle(width=width, dtype=dtype)


def test_a_tuner_is_offered_tiles_that_cover_the_rows():
    shape = dict(rows=16384, width=4096, dtype='bfloat16')
    for part in ('forward', 'backward'):
        offered = rms_norm.candidates(part, **shape)
        assert choose_tiles(part, **shape) in offered
        assert len(offered) >= 5


# Module, original text, mistake, how it shows in the interpreter. The race detector does not notice
# two blocks that write to the same place in GMEM; that shows in the place that nobody has written.
MUTATIONS = {
    'the last step is left out': (
        FORWARD, '(steps - block + blocks - 1) // blocks', '(steps - block) // blocks', 'numbers'),
    'blocks take the same rows': (
        FORWARD, '(block + index * blocks) * tiles.rows', 'index * tiles.rows', 'numbers'),
    'a chunk is read in the place of another': (
        FORWARD, 'load(scale_ref, layout.reduce(0), columns)',
        'load(scale_ref, layout.reduce(0), chunks[0])', 'numbers'),
    'only the last chunk is summed': (
        FORWARD, 'x * x if squares is None else squares + x * x', 'x * x', 'numbers'),
    'sums start from nothing at all': (
        BACKWARD, 'over_chunks(clear, None)', 'None', 'numbers'),
    'sums of a step replace those before': (
        BACKWARD, 'sums + dy * x * inverse', 'dy * x * inverse', 'numbers'),
    'blocks leave their sums in one place': (
        BACKWARD, 'dscale_ref.at[block, :, columns]', 'dscale_ref.at[0, :, columns]', 'numbers'),
    'the rows of the next step': (
        BACKWARD, 'first + g * row_tile', 'first + (g + 1) * row_tile', 'bounds'),
}  # fmt: skip


@pytest.mark.parametrize('name', MUTATIONS)
def test_a_planted_mistake_is_found_in_the_interpreter(name):
    module, old, new, finder = MUTATIONS[name]
    wrong = mutant(module, old, new)
    part = module.__name__.rpartition('.')[2]
    values = arrays(5, 256, 'bfloat16', False)
    tiles = Tiles(vector=1, lanes=32, warps=4, groups=1, columns=128, blocks=2)
    with interpreted_races():
        try:
            found = run(values, tiles, **{part: getattr(wrong, part)}, interpret=True)
        except jax.errors.JaxRuntimeError as error:
            seen = 'bounds' if 'Out-of-bounds read' in str(error) else str(error)
        else:
            seen = 'numbers'
    assert seen == finder
    if finder == 'numbers':
        with pytest.raises(AssertionError):
            check(found, exact(*values), 'bfloat16', 5)


def test_tiles_that_need_too_many_registers_are_found_by_the_compiler(gpu_compiler):
    wide = Tiles(vector=8, lanes=32, warps=1, groups=1, columns=8192, blocks=264)
    assert not is_good(compiled('forward', 4096, 8192, 'bfloat16', wide))


# All widths, with varying dtypes, with a residual and without.
ON_A_GPU = [
    ('bfloat16', 64, True),
    ('float16', 96, False),
    ('float32', 576, True),
    ('bfloat16', 2048, False),
    ('float16', 2880, True),
    ('bfloat16', 4096, True),
    ('float32', 4096, False),
    ('float16', 5120, False),
    ('bfloat16', 8192, True),
    ('float32', 8192, True),
    ('bfloat16', 16384, False),
    ('float16', 16384, True),
]


@pytest.mark.gpu
@pytest.mark.parametrize('dtype, width, residual', ON_A_GPU)
def test_on_the_gpu_the_kernels_equal_float64_and_repeat_bit_for_bit(dtype, width, residual):
    for rows in (1, 1000):
        values = arrays(rows, width, dtype, residual)
        first = run(values)
        check(first, exact(*values), dtype, rows)
        for _ in range(2):
            again = run(values)
            assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(first, again))

"""Log-probs without logits: reference and kernels against float64, races, machine code."""

import contextlib
import dataclasses
import functools
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm.ops import logprobs
from jaxfm.ops.logprobs import Unembedding
from jaxfm.sharding import MESH_AXES, make_mesh, place
from pallas_kernels import _tables, token_logprobs
from pallas_kernels._compat import interpreted_races
from pallas_kernels.token_logprobs import candidates, choose_tiles, reference, walk
from pallas_kernels.token_logprobs.tiles import Tiles
from tests.pallas_kernels.mutants import mutant
from tools import deviceless

# The attributes of these names in the package are functions, not modules.
FORWARD, BACKWARD = (
    importlib.import_module(f'pallas_kernels.token_logprobs.{name}')
    for name in ('forward', 'backward')
)
KERNELS = {'forward': FORWARD, 'backward': BACKWARD}


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of hidden states, and a part of a vocabulary that begins at first_id."""

    M: int = 128
    D: int = 128
    V: int = 128
    vocab_size: int = 100_000
    first_id: int = 0
    softcap: float = 0.0
    size: float = 1.0  # of the logits
    dtype: type = jnp.bfloat16
    tiles: Tiles = Tiles(vocab_tile=64, slots=2)

    @property
    def options(self) -> dict:
        return dict(vocab_size=self.vocab_size, first_id=self.first_id, softcap=self.softcap)

    @functools.cached_property
    def arrays(self):
        draw = np.random.default_rng(0)
        hidden = draw.normal(size=(self.M, self.D)) * self.size
        weight = draw.normal(size=(self.V, self.D)) * self.D**-0.5
        # Some targets are before and some after these ids.
        targets = self.first_id + draw.integers(-20, self.V + 20, self.M)
        hidden, weight = (jnp.asarray(x, self.dtype) for x in (hidden, weight))
        return hidden, weight, jnp.asarray(targets, jnp.int32)

    @functools.cached_property
    def cotangents(self):
        """Gradients of the picked logits and of the log-sum-exp; those of some rows are 0."""
        draw = np.random.default_rng(1)
        values = draw.normal(size=(2, self.M)) * (draw.random(self.M) > 0.1)
        return tuple(jnp.asarray(x, jnp.float32) for x in values)

    @property
    def logsumexp(self):
        """The log-sum-exp over a larger vocabulary, which is always finite."""
        here = np.asarray(self.exact()[0])
        return jnp.asarray(np.logaddexp(here, 1.0), jnp.float32)

    def exact(self, gradients: bool = False):
        """What `forward` or `backward` should return, in float64."""
        hidden, weight, targets = (np.asarray(x) for x in self.arrays)
        logits = hidden.astype(np.float64) @ weight.astype(np.float64).T
        if self.softcap:
            logits = self.softcap * np.tanh(logits / self.softcap)
        ids = self.first_id + np.arange(self.V)
        is_known = ids < self.vocab_size
        is_target = ids == targets[:, None]
        if not gradients:
            with np.errstate(divide='ignore'):
                largest = logits.max(1)
                powers = np.exp(logits - largest[:, None]) * is_known
                masked = np.where(is_known, logits, -np.inf)
                picked = np.where(is_target, masked, 0).sum(1)
                return np.log(powers.sum(1)) + largest, picked
        dpicked, dlogsumexp = (np.asarray(x, np.float64)[:, None] for x in self.cotangents)
        weights = np.exp(logits - np.asarray(self.logsumexp, np.float64)[:, None])
        result = dlogsumexp * weights + is_target * dpicked
        if self.softcap:
            result *= 1 - (logits / self.softcap) ** 2
        return result * is_known

    def forward(self, module=FORWARD, **options):
        function = functools.partial(module.forward, **self.options, **options)
        return jax.jit(function)(*self.arrays)

    def backward(self, module=BACKWARD, **options):
        function = functools.partial(module.backward, **self.options, **options)
        return jax.jit(function)(*self.arrays, self.logsumexp, *self.cotangents)

    def check_forward(self, module=FORWARD, **options):
        """Asserts that the error against float64 is similar to that of the reference."""
        for result, known, exact in zip(
            self.forward(module, **options), self.forward(reference), self.exact(), strict=True
        ):
            assert result.dtype == jnp.float32
            assert_near(result, known, exact, rounding=2e-6)

    def check_backward(self, module=BACKWARD, **options):
        result = self.backward(module, **options)
        assert result.dtype == self.dtype and result.shape == (self.M, self.V)
        assert_near(result, self.backward(reference), self.exact(gradients=True), rounding=1e-6)


def assert_near(result, known, exact, rounding):
    """Asserts at most twice the error of `known`, plus float32's rounding."""
    result, known = (np.asarray(x, np.float64) for x in (result, known))
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(result[~finite], exact[~finite])
    result, known, exact = result[finite], known[finite], exact[finite]
    if exact.size:
        limit = 2 * np.abs(known - exact).max() + rounding * np.abs(exact).max()
        assert np.abs(result - exact).max() <= limit


# Three tiles of two steps in two splits; padding, a soft-cap and large logits.
MIXED = Case(
    V=192,
    first_id=30,
    vocab_size=200,
    softcap=20.0,
    size=4.0,
    tiles=Tiles(vocab_tile=64, slots=2, splits=2),
)
CASES = {
    'mixed': MIXED,
    'ragged': Case(M=70, D=64, V=150),
    'nothing but padding': Case(D=64, V=64, first_id=500, vocab_size=500),
    'nothing after the first id': Case(D=64, V=192, first_id=20, vocab_size=21),
    'large': Case(D=64, size=10.0),
    'large under a soft-cap': Case(D=64, size=30.0, softcap=5.0),
    'float16': Case(dtype=jnp.float16, V=64),
    'two blocks, wide tile': Case(M=200, V=256, tiles=Tiles(vocab_tile=256, slots=4, splits=4)),
}


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_reference_equals_float64(case):
    exact = dataclasses.replace(case, dtype=jnp.float32)
    with jax.default_matmul_precision('float32'):
        for result, right in zip(exact.forward(reference), exact.exact(), strict=True):
            np.testing.assert_allclose(result, right, rtol=1e-5, atol=1e-5 * case.size)
        result, right = exact.backward(reference), exact.exact(gradients=True)
        np.testing.assert_allclose(result, right, rtol=1e-4, atol=1e-5)


def test_gradients_of_the_reference_are_those_of_its_forward():
    case = Case(M=8, D=64, V=48, vocab_size=40, softcap=2.0, dtype=jnp.float32)
    hidden, weight, targets = case.arrays
    dpicked, dlogsumexp = case.cotangents
    values = reference.products(hidden, weight)

    @jax.jit
    def total(values):
        logsumexp, picked = reference.reduce(values, targets, **case.options)
        return jnp.sum(logsumexp * dlogsumexp) + jnp.sum(picked * dpicked)

    logsumexp, _ = reference.reduce(values, targets, **case.options)
    by_hand = reference.product_gradients(
        values, targets, logsumexp, dpicked, dlogsumexp, **case.options
    )
    np.testing.assert_allclose(by_hand, jax.grad(total)(values), rtol=1e-4, atol=1e-6)


def test_logits_have_no_cap_unless_one_is_given():
    case = Case(M=8, D=64, V=48, vocab_size=40, dtype=jnp.float32)
    hidden, weight, targets = case.arrays
    logsumexp, _ = reference.forward(hidden, weight, targets, vocab_size=40)
    np.testing.assert_array_equal(logsumexp, case.forward(reference)[0])
    rows = targets, logsumexp, *case.cotangents
    for function, first in (
        (reference.backward, (hidden, weight)),
        (reference.product_gradients, (reference.products(hidden, weight),)),
    ):
        found, wanted = (
            function(*first, *rows, vocab_size=40, **o) for o in ({}, {'softcap': 0.0})
        )
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_kernels_equal_float64(case, interpreter):
    case.check_forward(tiles=case.tiles, interpret=True)
    case.check_backward(tiles=case.tiles, interpret=True)


def test_the_first_id_may_be_traced(interpreter):
    case = Case(M=64, D=64, V=64, first_id=32, vocab_size=80)
    options = dict(vocab_size=case.vocab_size, tiles=case.tiles, interpret=True)
    arrays = case.arrays

    @jax.jit
    def forward(first_id):
        return FORWARD.forward(*arrays, first_id=first_id, **options)

    for result, right in zip(forward(jnp.int32(32)), case.exact(), strict=True):
        np.testing.assert_allclose(result, right, rtol=1e-5, atol=1e-5)


def test_what_kernels_cannot_do_is_an_error_that_says_so():
    with pytest.raises(ValueError, match='must be bfloat16 or float16, not float32'):
        Case(dtype=jnp.float32).forward()
    with pytest.raises(ValueError, match='multiple of 64 dimensions, not 96'):
        Case(D=96).forward()


# Mistakes: (module, original text, planted text), (kernel to run, what finds it). The interpreter
# runs a product at once, so that a slot that is released too early shows only in the machine code.
MISTAKES = {
    'products do not wait for the copy': (
        (walk, 'plgpu.barrier_wait(ready.at[slot])', 'None'),
        ('forward', 'race'),
    ),
    'the copy does not wait for a free slot': (
        (walk, 'plgpu.barrier_wait(free.at[slot])', 'None'),
        ('forward', 'race'),
    ),
    'a result leaves before it is committed': (
        (BACKWARD, 16 * ' ' + 'plgpu.commit_smem()\n' + 16 * ' ' + 'columns', 16 * ' ' + 'columns'),
        ('backward', 'race'),
    ),
    'a result overwrites the last one': (
        (BACKWARD, 'plgpu.wait_smem_to_gmem(0, wait_read_only=True)', 'None'),
        ('backward', 'race'),
    ),
    'one padding id counts': (
        (FORWARD, 'ids < limit_ref[0], logits', 'ids <= limit_ref[0], logits'),
        ('forward', 'numbers'),
    ),
    'one padding id has a gradient': (
        (BACKWARD, 'ids < limit_ref[0], gradients', 'ids <= limit_ref[0], gradients'),
        ('backward', 'numbers'),
    ),
    'the last id counts as padding': (
        (walk, 'jnp.minimum(vocab_size - first_id,', 'jnp.minimum(vocab_size - 1 - first_id,'),
        ('forward', 'numbers'),
    ),
    'no derivative of the soft-cap': (
        (BACKWARD, '                if softcap:\n', '                if False:\n'),
        ('backward', 'numbers'),
    ),
    'targets are not moved to the first id': (
        (walk, '(targets_M - first_id)', '(targets_M)'),
        ('forward', 'numbers'),
    ),
    'tiles of the vocabulary are swapped': (
        (walk, 'tile = first_tile + lax.div(', 'tile = first_tile + count - 1 - lax.div('),
        ('backward', 'numbers'),
    ),
    'halves of the rows are swapped': (
        (walk, 'hidden_smem.at[slot, pl.ds(thread', 'hidden_smem.at[slot, pl.ds((1 - thread)'),
        ('forward', 'numbers'),
    ),
    'the sum is not scaled to a new maximum': (
        (FORWARD, 'total * jnp.exp2((largest - new) * LOG2E)', 'total'),
        ('forward', 'numbers'),
    ),
    'a part walks into the next one': (
        (walk, '- first_tile, self._tiles_a_split)', '- first_tile, self._tiles_a_split + 1)'),
        ('forward', 'numbers'),
    ),
}


@pytest.fixture
def plant(monkeypatch):
    """A function that returns a kernel's module with a mistake in it or in `walk`."""

    def plant(kernel, module, old, new):
        made = mutant(module, old, new)
        if module is not walk:
            return made
        for name in ('Walk', 'own_ids'):
            monkeypatch.setattr(KERNELS[kernel], name, getattr(made, name))
        return KERNELS[kernel]

    return plant


@pytest.mark.parametrize('mistake', MISTAKES)
def test_a_planted_mistake_is_found(mistake, plant):
    change, (kernel, finder) = MISTAKES[mistake]
    check = getattr(MIXED, f'check_{kernel}')
    module = plant(kernel, *change)
    with interpreted_races() as found_race:
        if finder == 'numbers':
            with pytest.raises(AssertionError):
                check(module, tiles=MIXED.tiles, interpret=True)
            assert not found_race()
        else:
            # Numbers may also be wrong, or uninitialised memory may be read.
            with contextlib.suppress(Exception):
                check(module, tiles=MIXED.tiles, interpret=True)
            assert found_race()


def test_a_target_of_the_next_part_is_not_taken_for_a_row_that_fills_a_tile(interpreter, plant):
    module = plant('forward', walk, 'jnp.where(targets < V, targets, -1)', 'targets')
    with pytest.raises(AssertionError):
        CASES['ragged'].check_forward(module, tiles=CASES['ragged'].tiles, interpret=True)


def shapes(M, V, D, dtype):
    hidden = jax.ShapeDtypeStruct((M, D), dtype)
    weight = jax.ShapeDtypeStruct((V, D), dtype)
    targets = jax.ShapeDtypeStruct((M,), jnp.int32)
    return hidden, weight, targets, *[jax.ShapeDtypeStruct((M,), jnp.float32)] * 3


def machine_code(kernel, M, V, D, dtype=jnp.bfloat16, softcap=0.0, tiles=None):
    function = getattr(KERNELS[kernel], kernel)
    arrays = shapes(M, V, D, dtype)[: 3 if kernel == 'forward' else 6]
    options = dict(vocab_size=V - 3, softcap=softcap, tiles=tiles)
    [code] = deviceless.compile_kernels(functools.partial(function, **options), *arrays)
    return code


def assert_good(code):
    assert code.spilled_bytes == 0
    # The limit for three warpgroups at launch; later, two take registers from the third.
    assert code.registers <= 168
    assert code.smem_bytes <= 227 * 1024
    assert code.uses_tensor_cores and not code.is_serialized
    # The loop over D keeps one product in flight while it releases the slot of the previous one.
    assert 'WARPGROUP.DEPBAR.LE gsb0, 0x1' in code.sass


@pytest.mark.parametrize('kernel', KERNELS)
@pytest.mark.parametrize(
    'shape',
    [
        dict(M=16384, V=131072, D=4096),
        dict(M=4096, V=128256, D=2048, softcap=30.0),
        dict(M=4096, V=16032, D=2048, dtype=jnp.float16),  # a vocabulary over eight devices
        dict(M=100, V=384, D=64),
    ],
    ids=str,
)
def test_machine_code_spills_nothing_and_multiplies_on_tensor_cores(gpu_compiler, kernel, shape):
    assert_good(machine_code(kernel, **shape))


def test_every_measured_tile_compiles(gpu_compiler):
    for entry in _tables.entries(token_logprobs.__path__[0]):
        tiles, dtype = Tiles(**entry['tiles']), jnp.dtype(entry['dtype'])
        sizes = entry['rows'], entry['vocab'], entry['dim'], dtype
        assert_good(machine_code(entry['part'], *sizes, tiles=tiles))


def test_a_slot_given_back_too_early_shows_in_the_machine_code(gpu_compiler, plant):
    plant('forward', walk, 'plgpu.wgmma_wait(1)', 'None')
    with pytest.raises(AssertionError):
        assert_good(machine_code('forward', M=256, V=512, D=128))


def test_the_guess_fills_processors_and_fits_memory():
    shape = dict(rows=16384, vocab=131072, dim=4096, dtype=jnp.bfloat16)
    for kernel in KERNELS:
        tiles = choose_tiles(kernel, **shape)
        assert tiles.vocab_tile == 256
        # 1024 rows are 8 blocks: without splits, 124 of 132 processors would idle.
        assert choose_tiles(kernel, **shape | dict(rows=1024)).splits == 16
        uneven = shape | dict(rows=1024, vocab=128 * 999)
        assert choose_tiles(kernel, **uneven).vocab_tile == 128
        assert tiles in candidates(kernel, **shape)


def value_and_gradients(implementation, chunk_size=None, mesh=None):
    """Log-probs, log-sum-exps, and gradients of something that uses both."""
    B, T, D, V, padded = 2, 70, 64, 500, 512
    draw = np.random.default_rng(0)
    hidden = jnp.asarray(draw.normal(size=(B, T, D)), jnp.bfloat16)
    weight = jnp.asarray(draw.normal(size=(padded, D)) * 0.3, jnp.bfloat16)
    targets = jnp.asarray(draw.integers(0, V, (B, T)), jnp.int32)

    def total(hidden, weight):
        unembedding = Unembedding(weight, V, 5.0, implementation)
        values = logprobs.token_logprobs(hidden, unembedding, targets, chunk_size)
        return jnp.sum(jnp.sin(values[0])) + 0.1 * jnp.sum(jnp.square(values[1])), values

    if mesh is not None:
        hidden, weight = place(hidden, 'batch', 'position', 'embed'), place(weight, 'vocab', None)
    gradients, values = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(hidden, weight)
    return [np.asarray(x, np.float32) for x in (*values, *gradients)]


def assert_same(results, wanted):
    for result, right, tolerance in zip(results, wanted, (1e-6, 1e-6, 1e-2, 1e-2), strict=True):
        assert np.linalg.norm(result - right) < tolerance * np.linalg.norm(right)


@pytest.mark.parametrize('chunk_size', [None, 256])
def test_log_probs_by_the_kernel_are_those_by_xla(chunk_size, interpreter):
    with jax.set_mesh(mesh := make_mesh(dict.fromkeys(MESH_AXES, 1), jax.devices()[:1])):
        results = value_and_gradients('interpret', chunk_size, mesh)
    assert_same(results, value_and_gradients('xla'))


@pytest.mark.parametrize(
    'sizes',
    [dict(tensor=2), dict(fsdp=2, context=2, tensor=2)],
    ids=lambda sizes: ' x '.join(sizes),
)
def test_every_device_gives_the_kernel_its_part(sizes, monkeypatch):
    """The reference replaces the kernels, as the interpreter simulates only one device."""

    def stand_in(function):
        return lambda *arrays, interpret, **options: function(*arrays, **options)

    for name in KERNELS:
        monkeypatch.setattr(token_logprobs, name, stand_in(getattr(reference, name)))
    shape = dict.fromkeys(MESH_AXES, 1) | sizes
    with jax.set_mesh(mesh := make_mesh(shape, jax.devices()[: math.prod(sizes.values())])):
        results = value_and_gradients('interpret', mesh=mesh)
    assert_same(results, value_and_gradients('xla'))


def test_a_training_step_with_the_kernel_never_holds_logits(gpu_compiler):
    M, V, D = 16384, 131072, 2048
    needed = {}
    for implementation in ('xla', 'mosaic'):

        def loss(hidden, weight, targets, implementation=implementation):
            unembedding = Unembedding(weight, V - 3, 0.0, implementation)
            return -jnp.mean(logprobs.token_logprobs(hidden, unembedding, targets)[0])

        hidden, weight, targets = shapes(M, V, D, jnp.bfloat16)[:3]
        hidden = jax.ShapeDtypeStruct((1, M, D), hidden.dtype)
        targets = jax.ShapeDtypeStruct((1, M), targets.dtype)
        step = jax.value_and_grad(loss, argnums=(0, 1))
        program = deviceless.compile(step, hidden, weight, targets)
        needed[implementation] = program.memory_analysis().temp_size_in_bytes
        assert (program.as_text().count('mosaic_gpu') > 0) == (implementation == 'mosaic')
    print({name: f'{size / 1e9:.2f} GB' for name, size in needed.items()})
    assert needed['mosaic'] <= 1.05 * needed['xla']
    assert needed['mosaic'] < M * V * 4 / 10


@pytest.mark.gpu
@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_kernels_on_the_device_equal_float64_and_repeat_bit_for_bit(case):
    case.check_forward(tiles=case.tiles)
    case.check_backward(tiles=case.tiles)
    runs = [(*case.forward(tiles=case.tiles), case.backward(tiles=case.tiles)) for _ in range(3)]
    for run in runs[1:]:
        jax.tree.map(np.testing.assert_array_equal, run, runs[0])


@pytest.mark.gpu
def test_a_large_shape_on_the_device_equals_float64():
    case = Case(M=2048, D=2048, V=16384, vocab_size=16300, softcap=30.0, size=3.0, tiles=None)
    case.check_forward()
    case.check_backward()

"""Times kernels and their peers at the shapes that matter: microseconds, rates, work.

Work is the minimum for any implementation: half of the square for causal attention, every input
read once, every output written once. An implementation that does more gets lower rates.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels._tables import source_digest
from tools.bench.gpu import documents, peers, references
from tools.bench.gpu.numerics import kernels
from tools.bench.gpu.stages import Task
from tools.bench.gpu.timing import microseconds, normal, rates


def measure(function, *arrays, smoke: bool, flops: float = 0, moved: float = 0) -> dict:
    """Measures a call; returns the values of its row."""
    times = microseconds(jax.jit(function), *arrays, smoke=smoke)
    work = {'flops': flops} if flops else {}
    work |= {'bytes': moved} if moved else {}
    return {**times, **work, **rates(times, flops, moved)}


@dataclasses.dataclass(frozen=True)
class Call:
    """A jittable function, its arguments, and the work it has to do."""

    function: Callable
    arrays: tuple
    flops: float = 0
    moved: float = 0


@dataclasses.dataclass(frozen=True)
class RmsNorm:
    """Residual add and norm: two arrays in, two out."""

    M: int
    D: int

    op = 'rms_norm'
    parts = ('forward', 'backward')
    implementations = ('mosaic', 'xla', 'tokamax')

    @property
    def name(self) -> str:
        return f'add + rms_norm {self.M} x {self.D}'

    @property
    def words(self) -> dict:
        """The shape as arguments of `choose_tiles`."""
        return dict(rows=self.M, width=self.D, dtype='bfloat16')

    @property
    def _arrays(self) -> tuple:
        scale = 1 + normal(4, (self.D,), jnp.float32, 0.1)
        return *(normal(i, (self.M, self.D)) for i in range(4)), scale

    def kernel(self, part: str, interpret: bool = False, tiles=None) -> Call:
        """A call of our kernel."""
        package = kernels(self.op)
        x, residual, dy, dsum, scale = self._arrays
        forward = functools.partial(package.forward, epsilon=1e-6, interpret=interpret)
        # Forward x, residual -> y, sum; backward dy, dsum, sum -> dx.
        work = dict(moved=4 * x.nbytes)
        if part == 'forward':
            return Call(functools.partial(forward, tiles=tiles), (x, scale, residual), **work)
        _, total, inverse = jax.jit(forward)(x, scale, residual)
        backward = functools.partial(package.backward, interpret=interpret, tiles=tiles)
        return Call(backward, (dy, dsum, total, scale, inverse), **work)

    def other(self, part: str, implementation: str) -> Call:
        """A call of another implementation."""
        x, residual, dy, dsum, scale = self._arrays
        function = {'xla': references.rms_norm, 'tokamax': peers.tokamax_rms_norm}[implementation]
        function = functools.partial(function, epsilon=1e-6)
        work = dict(moved=4 * x.nbytes)
        if part == 'forward':
            return Call(function, (x, scale, residual), **work)
        back = jax.jit(lambda *arrays: jax.vjp(function, *arrays)[1])(x, scale, residual)
        return Call(lambda back, *grads: back(grads)[:2], (back, dy, dsum), **work)


@dataclasses.dataclass(frozen=True)
class Attention:
    title: str
    B: int
    T: int
    N: int
    K: int
    H: int
    packed: bool = False
    window: int = 0
    compared: bool = True  # not only with XLA, because there is a goal for this shape

    op = 'attention'
    parts = ('forward', 'backward')

    @property
    def implementations(self) -> tuple:
        return ('mosaic', *(peers.ATTENTION if self.compared else ('xla',)))

    @property
    def name(self) -> str:
        return f'attention {self.title} B{self.B} S{self.T} H{self.N}/{self.K} D{self.H}'

    @property
    def words(self) -> dict:
        """The shape as arguments of `choose_tiles`."""
        return dict(head_dim=self.H, dtype='bfloat16')

    @property
    def _arrays(self) -> tuple:
        q, dout = (normal(i, (self.B, self.T, self.N, self.H)) for i in (0, 3))
        k, v = (normal(i, (self.B, self.T, self.K, self.H)) for i in (1, 2))
        return q, k, v, dout

    @property
    def _rows(self) -> peers.Rows:
        lengths = documents.lengths(self.B, self.T) if self.packed else [[self.T]] * self.B
        return peers.Rows(lengths, self.window)

    def _work(self, part: str) -> dict:
        flops = 4 * self.N * self.H * documents.visible_pairs(self._rows.lengths, self.window)
        moved = 2 * 2 * self.B * self.T * (self.N + self.K) * self.H
        # Backward q, k, v, out, dout -> dq, dk, dv; five products instead of two.
        times = (1, 1) if part == 'forward' else (2.5, 2)
        return dict(flops=times[0] * flops, moved=times[1] * moved)

    def kernel(self, part: str, interpret: bool = False, tiles=None) -> Call:
        """A call of our kernel."""
        package = kernels(self.op)
        (q, k, v, dout), places = self._arrays, self._rows.places
        options = dict(scale=self.H**-0.5, window=self.window, interpret=interpret)
        forward = functools.partial(package.forward, **options)
        if part == 'forward':
            function = functools.partial(forward, tiles=tiles)
            return Call(function, (q, k, v, *places), **self._work(part))
        out, lse = jax.jit(forward)(q, k, v, *places)
        function = functools.partial(package.backward, tiles=tiles, **options)
        return Call(function, (q, k, v, out, lse, dout, *places), **self._work(part))

    def other(self, part: str, implementation: str) -> Call:
        """A call of another implementation."""
        q, k, v, dout = self._arrays
        attention, scale = peers.ATTENTION[implementation], self.H**-0.5

        def function(q, k, v):
            return attention(q, k, v, self._rows, scale)

        if part == 'forward':
            return Call(function, (q, k, v), **self._work(part))
        back = jax.jit(lambda *arrays: jax.vjp(function, *arrays)[1])(q, k, v)
        return Call(lambda back, dout: back(dout), (back, dout), **self._work(part))


@dataclasses.dataclass(frozen=True)
class DecodeAttention:
    """One query per sequence over a full cache."""

    B: int
    L: int
    N: int
    K: int
    H: int
    page: int = 64

    op = 'decode_attention'
    parts = ('forward',)
    implementations = ('mosaic', 'xla')

    @property
    def name(self) -> str:
        return f'paged decode B{self.B} L{self.L} H{self.N}/{self.K} D{self.H}'

    @property
    def words(self) -> dict:
        """The shape as arguments of `choose_tiles`."""
        return dict(
            batch=self.B,
            num_kv_heads=self.K,
            head_dim=self.H,
            page_size=self.page,
            max_length=self.L,
            dtype='bfloat16',
        )

    @property
    def _arrays(self) -> tuple:
        pages = self.L // self.page
        order = 1 + jax.random.permutation(jax.random.key(3), self.B * pages)
        table = order.reshape(self.B, pages).astype(jnp.int32)
        lengths = jnp.full((self.B,), self.L, jnp.int32)
        shape = (self.B * pages + 1, self.page, self.K, self.H)
        k, v = (normal(i, shape) for i in (1, 2))
        return normal(0, (self.B, self.N, self.H)), k, v, table, lengths

    def kernel(self, part: str, interpret: bool = False, tiles=None) -> Call:
        """A call of our kernel."""
        function = kernels(self.op).forward
        return self._call(functools.partial(function, interpret=interpret, tiles=tiles))

    def other(self, part: str, implementation: str) -> Call:
        """A call of another implementation."""
        return self._call(references.decode_attention)

    def _call(self, function) -> Call:
        moved = 2 * 2 * self.B * self.L * self.K * self.H
        return Call(functools.partial(function, scale=self.H**-0.5), self._arrays, moved=moved)


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Loss and both gradients: at least three matrix products."""

    M: int
    D: int
    V: int

    op = 'token_logprobs'
    parts = ('loss and gradients',)
    implementations = ('mosaic', 'xla', 'naive', 'tokamax')

    @property
    def name(self) -> str:
        return f'cross-entropy {self.M} x {self.D} x {self.V}'

    @property
    def words(self) -> dict:
        """The shape as arguments of `choose_tiles`."""
        return dict(rows=self.M, vocab=self.V, dim=self.D, dtype='bfloat16')

    @property
    def _arrays(self) -> tuple:
        targets = jax.random.randint(jax.random.key(2), (self.M,), 0, self.V, jnp.int32)
        weight = normal(1, (self.V, self.D), scale=self.D**-0.5)
        return normal(0, (self.M, self.D)), weight, targets

    def kernel(self, part: str, interpret: bool = False, tiles=None) -> Call:
        """A call of our op; with part 'forward' or 'backward', of only that kernel."""
        if part in self.parts:
            return self.other(part, 'interpret' if interpret else 'mosaic')
        function = getattr(kernels(self.op), part)
        options = dict(vocab_size=self.V, interpret=interpret, tiles=tiles)
        more = () if part == 'forward' else (normal(i, (self.M,), jnp.float32) for i in range(3))
        return Call(
            functools.partial(function, **options),
            (*self._arrays, *more),
            flops=2 * self.M * self.D * self.V,
        )

    def other(self, part: str, implementation: str) -> Call:
        """A call of another implementation."""
        function = jax.value_and_grad(peers.CROSS_ENTROPY[implementation], (0, 1))
        return Call(function, self._arrays, flops=3 * 2 * self.M * self.D * self.V)


SHAPES = (
    RmsNorm(16384, 4096),
    Attention('causal', 4, 4096, 32, 32, 128),
    Attention('1B shape', 8, 4096, 32, 8, 64, compared=False),
    Attention('GQA', 4, 4096, 32, 8, 128, compared=False),
    Attention('packed', 4, 4096, 32, 8, 128, packed=True),
    Attention('packed, 1B shape', 8, 4096, 32, 8, 64, packed=True, compared=False),
    Attention('window 1024', 4, 4096, 32, 8, 128, window=1024, compared=False),
    DecodeAttention(64, 8192, 32, 8, 128),
    TokenLogprobs(16384, 4096, 131072),
)
SMOKE_SHAPES = (
    RmsNorm(16, 256),
    Attention('packed', 1, 128, 2, 1, 64, packed=True),
    DecodeAttention(2, 128, 8, 1, 64),
    TokenLogprobs(128, 64, 256),
)


# A group shares a process, because ours may break the device and others may start slowly.
GROUPS = (('mosaic',), ('xla',), ('fa3', 'cudnn', 'tokamax', 'naive'))


def tasks(smoke: bool, implementations: list[str]) -> list[Task]:
    """These implementations at all shapes for which they are compared."""
    return [
        Task(
            f'{shape.name} {part} / {implementation}',
            functools.partial(_run, shape, part, implementation, smoke),
        )
        for implementation in implementations
        for shape in (SMOKE_SHAPES if smoke else SHAPES)
        if implementation in shape.implementations
        for part in shape.parts
    ]


def _run(shape, part: str, implementation: str, smoke: bool) -> dict:
    if implementation == 'mosaic' and smoke:

        def call_kernel():
            call = shape.kernel(part, interpret=True)
            return call.function(*call.arrays)

        jax.eval_shape(call_kernel)  # interpreted, its time is meaningless
        return {'traced': True}
    call = shape.kernel(part) if implementation == 'mosaic' else shape.other(part, implementation)
    row = measure(call.function, *call.arrays, smoke=smoke, flops=call.flops, moved=call.moved)
    return row | ({'source': source_digest(shape.op)} if implementation == 'mosaic' else {})

"""Kernels at the shapes that count, beside what others have: microseconds, rates, work.

Work is what any implementation must do: causal attention half of the square, every input read once
and every output written once. What does more is slower by it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from tools.bench.gpu import documents, peers, references
from tools.bench.gpu.numerics import kernels
from tools.bench.gpu.stages import Refused, Task
from tools.bench.gpu.timing import microseconds, normal, rates


def measured(function, *arrays, smoke: bool, flops: float = 0, moved: float = 0) -> dict:
    """What a row says of a call."""
    times = microseconds(jax.jit(function), *arrays, smoke=smoke)
    work = {'flops': flops} if flops else {}
    work |= {'bytes': moved} if moved else {}
    return {**times, **work, **rates(times, flops, moved)}


@dataclasses.dataclass(frozen=True)
class RmsNorm:
    """Residual add and norm: two arrays in, two out."""

    M: int
    D: int

    op = 'rms_norm'
    implementations = ('xla', 'tokamax', 'mosaic')

    @property
    def name(self) -> str:
        return f'add + rms_norm {self.M} x {self.D}'

    def tasks(self, implementation: str, smoke: bool) -> list[Task]:
        name = self.name
        run = functools.partial(self._run, implementation, smoke=smoke)
        return [
            Task(f'{name} {way} / {implementation}', functools.partial(run, way))
            for way in ('forward', 'backward')
        ]

    def _run(self, implementation: str, way: str, *, smoke: bool) -> dict:
        x, residual, dy, dsum = (normal(i, (self.M, self.D)) for i in range(4))
        scale = 1 + normal(4, (self.D,), jnp.float32, 0.1)
        # Forward x, residual -> y, sum; backward dy, dsum, sum -> dx.
        moved = 4 * x.nbytes
        measure = functools.partial(measured, smoke=smoke, moved=moved)
        if implementation == 'mosaic':
            package = kernels(self.op)
            forward = functools.partial(package.forward, epsilon=1e-6, interpret=smoke)
            if way == 'forward':
                return measure(forward, x, scale, residual)
            _, total, inverse = jax.jit(forward)(x, scale, residual)
            backward = functools.partial(package.backward, interpret=smoke)
            return measure(backward, dy, dsum, total, scale, inverse)
        function = {'xla': references.rms_norm, 'tokamax': peers.tokamax_rms_norm}[implementation]
        function = functools.partial(function, epsilon=1e-6)
        if way == 'forward':
            return measure(function, x, scale, residual)
        back = jax.jit(lambda *arrays: jax.vjp(function, *arrays)[1])(x, scale, residual)
        return measure(lambda back, *grads: back(grads)[:2], back, dy, dsum)


@dataclasses.dataclass(frozen=True)
class FlashAttention:
    title: str
    B: int
    T: int
    N: int
    K: int
    H: int
    packed: bool = False
    window: int = 0

    op = 'flash_attention'
    implementations = ('xla', 'cudnn', 'fa3', 'tokamax', 'mosaic')

    @property
    def name(self) -> str:
        return f'attention {self.title} B{self.B} S{self.T} H{self.N}/{self.K} D{self.H}'

    def tasks(self, implementation: str, smoke: bool) -> list[Task]:
        run = functools.partial(self._run, implementation, smoke=smoke)
        return [
            Task(f'{self.name} {way} / {implementation}', functools.partial(run, way))
            for way in ('forward', 'backward')
        ]

    def _run(self, implementation: str, way: str, *, smoke: bool) -> dict:
        lengths = documents.lengths(self.B, self.T) if self.packed else [[self.T]] * self.B
        rows = peers.Rows(lengths, self.window)
        q, dout = (normal(i, (self.B, self.T, self.N, self.H)) for i in (0, 3))
        k, v = (normal(i, (self.B, self.T, self.K, self.H)) for i in (1, 2))
        flops = 4 * self.N * self.H * documents.visible_pairs(lengths, self.window)
        moved = 2 * (q.nbytes + k.nbytes)
        if way == 'backward':
            flops, moved = 2.5 * flops, 2 * moved  # q, k, v, out, dout -> dq, dk, dv
        measure = functools.partial(measured, smoke=smoke, flops=flops, moved=moved)
        scale = self.H**-0.5
        if implementation == 'mosaic':
            package = kernels(self.op)
            options = dict(scale=scale, window=self.window, interpret=smoke)
            forward = functools.partial(package.forward, **options)
            if way == 'forward':
                return measure(forward, q, k, v, *rows.places)
            out, lse = jax.jit(forward)(q, k, v, *rows.places)
            backward = functools.partial(package.backward, **options)
            return measure(backward, q, k, v, out, lse, dout, *rows.places)
        attention = peers.ATTENTION[implementation]

        def function(q, k, v):
            return attention(q, k, v, rows, scale)

        if way == 'forward':
            return measure(function, q, k, v)
        back = jax.jit(lambda *arrays: jax.vjp(function, *arrays)[1])(q, k, v)
        return measure(lambda back, dout: back(dout), back, dout)


@dataclasses.dataclass(frozen=True)
class DecodeAttention:
    """One query a sequence over a cache that is full."""

    B: int
    L: int
    N: int
    K: int
    H: int
    page: int = 64

    op = 'decode_attention'
    implementations = ('xla', 'mosaic')

    @property
    def name(self) -> str:
        return f'paged decode B{self.B} L{self.L} H{self.N}/{self.K} D{self.H}'

    def tasks(self, implementation: str, smoke: bool) -> list[Task]:
        return [Task(f'{self.name} / {implementation}', lambda: self._run(implementation, smoke))]

    def _run(self, implementation: str, smoke: bool) -> dict:
        pages = self.L // self.page
        table, _ = documents.paged(self.B, pages, self.page)
        order = 1 + jax.random.permutation(jax.random.key(3), self.B * pages)
        table = order.reshape(table.shape).astype(jnp.int32)
        lengths = jnp.full((self.B,), self.L, jnp.int32)
        q = normal(0, (self.B, self.N, self.H))
        shape = (self.B * pages + 1, self.page, self.K, self.H)
        k, v = (normal(i, shape) for i in (1, 2))
        function = references.decode_attention
        if implementation == 'mosaic':
            function = functools.partial(kernels(self.op).forward, interpret=smoke)
        function = functools.partial(function, scale=self.H**-0.5)
        moved = 2 * k.nbytes * self.B * pages // (self.B * pages + 1)
        return measured(function, q, k, v, table, lengths, smoke=smoke, moved=moved)


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Loss and both gradients; three products at least."""

    M: int
    D: int
    V: int

    op = 'cross_entropy'
    implementations = tuple(peers.CROSS_ENTROPY)

    @property
    def name(self) -> str:
        return f'cross-entropy {self.M} x {self.D} x {self.V}'

    def tasks(self, implementation: str, smoke: bool) -> list[Task]:
        return [Task(f'{self.name} / {implementation}', lambda: self._run(implementation, smoke))]

    def _run(self, implementation: str, smoke: bool) -> dict:
        if smoke and implementation == 'mosaic':
            raise Refused('mosaic needs a GPU')
        hidden = normal(0, (self.M, self.D))
        weight = normal(1, (self.V, self.D), scale=self.D**-0.5)
        targets = jax.random.randint(jax.random.key(2), (self.M,), 0, self.V, jnp.int32)
        loss = jax.value_and_grad(peers.CROSS_ENTROPY[implementation], (0, 1))
        flops = 3 * 2 * self.M * self.D * self.V
        return measured(loss, hidden, weight, targets, smoke=smoke, flops=flops)


SHAPES = (
    RmsNorm(16384, 4096),
    FlashAttention('causal', 4, 4096, 32, 32, 128),
    FlashAttention('1B shape', 8, 4096, 32, 8, 64),
    FlashAttention('GQA', 4, 4096, 32, 8, 128),
    FlashAttention('packed', 4, 4096, 32, 8, 128, packed=True),
    FlashAttention('packed, 1B shape', 8, 4096, 32, 8, 64, packed=True),
    FlashAttention('window 1024', 4, 4096, 32, 8, 128, window=1024),
    DecodeAttention(64, 8192, 32, 8, 128),
    CrossEntropy(16384, 4096, 131072),
)
SMOKE_SHAPES = (
    RmsNorm(16, 256),
    FlashAttention('packed', 1, 128, 2, 1, 64, packed=True),
    DecodeAttention(2, 128, 8, 1, 64),
    CrossEntropy(128, 64, 256),
)


def tasks(smoke: bool, op: str) -> list[Task]:
    """All implementations at the shapes of an op, ours last: their faults break the device."""
    shapes = [shape for shape in (SMOKE_SHAPES if smoke else SHAPES) if shape.op == op]
    order = dict.fromkeys(name for shape in shapes for name in shape.implementations)
    return [task for name in order for shape in shapes for task in shape.tasks(name, smoke)]

"""Checks every kernel over a grid of shapes against a float32 reference.

A kernel's error may be at most twice that of XLA's path in the same dtype, and at most a cap. Its
results must be the same, bit for bit, every time.
"""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm.ops import IMPLEMENTATIONS
from pallas_kernels._tables import source_digest
from tools.bench.gpu import documents, references
from tools.bench.gpu.stages import Task
from tools.bench.gpu.timing import normal

OPS = tuple(op for op, names in IMPLEMENTATIONS.items() if 'mosaic' in names)
CAP = 0.02  # limit of the relative error
STRETCHED_CAP = 0.1  # the same if scores, and thus rounding errors, are ten times as large
WORST_CAP = 0.1  # limit of the largest single error, relative to the largest value
ALLOWANCE = 1e-4  # added to twice XLA's error, which may be 0
LEAST = 0.01  # inputs are of unit size: values smaller than this count as this large


def kernels(op: str):
    """The package of an op's kernels."""
    return importlib.import_module(f'pallas_kernels.{op}')


def compare(kernel, plain, exact, cap: float = CAP, repeats: int = 3, least=None) -> dict:
    """Errors of the kernel's and the plain outputs against the exact ones, and the verdict.

    `kernel` is called `repeats` times and returns {name: array}, like `plain` and `exact`.
    least: {name: size that smaller values count as}, by default LEAST.
    """
    sizes = least or {}
    first, *again = (jax.device_get(kernel()) for _ in range(repeats))
    plain, exact = jax.device_get((plain, exact))
    errors = {
        name: [
            *_errors(first[name], exact[name], sizes.get(name, LEAST)),
            *_errors(plain[name], exact[name], sizes.get(name, LEAST)),
        ]
        for name in exact
    }
    repeatable = all(
        np.array_equal(x[name].view(np.uint8), first[name].view(np.uint8))
        for x in again
        for name in exact
    )
    held = repeatable and all(
        error <= min(2 * of_plain + ALLOWANCE, cap) and worst <= WORST_CAP
        for error, worst, of_plain, _ in errors.values()
    )
    return {
        'held': held,
        'repeatable': repeatable,
        'error': max(error for error, *_ in errors.values()),
        'of_xla': max(of_plain for _, _, of_plain, _ in errors.values()),
        'errors': errors,  # output: [relative, worst] of the kernel, then of XLA
    }


def _errors(got, exact, least: float) -> tuple[float, float]:
    """(relative error of the norm, largest single error relative to the largest value)."""
    got, exact = (np.asarray(x, np.float64) for x in (got, exact))
    infinite = np.isinf(exact)
    if not np.isfinite(got[~infinite]).all() or not np.array_equal(got[infinite], exact[infinite]):
        return float('inf'), float('inf')
    difference, exact = got[~infinite] - exact[~infinite], exact[~infinite]
    if not exact.size:
        return 0.0, 0.0
    norm = max(np.sqrt(np.mean(exact**2)), least)
    largest = max(np.max(np.abs(exact)), least)
    return float(np.sqrt(np.mean(difference**2)) / norm), float(np.abs(difference).max() / largest)


@dataclasses.dataclass(frozen=True)
class RmsNorm:
    M: int
    D: int
    residual: bool = True
    dtype: str = 'bfloat16'

    op = 'rms_norm'

    def outputs(self, interpret: bool) -> tuple:
        package = kernels(self.op)
        x, residual, dy, dsum = (normal(i, (self.M, self.D), self.dtype) for i in range(4))
        scale = 1 + normal(4, (self.D,), jnp.float32, 0.1)
        plain = functools.partial(references.rms_norm, epsilon=1e-6)
        more = (residual,) if self.residual else ()

        def kernel(x, scale, dy, dsum, *more):
            y, total, inverse = package.forward(x, scale, *more, epsilon=1e-6, interpret=interpret)
            dx, dscale = package.backward(
                dy,
                dsum if self.residual else None,
                total if self.residual else x,
                scale,
                inverse,
                interpret=interpret,
            )
            return dict(y=y, dx=dx, dscale=dscale) | ({'sum': total} if self.residual else {})

        # The stored sum is rounded, and backward starts from it.
        total = x + residual if self.residual else x

        def reference(x, scale, dy, dsum, total, *more):
            y, added = plain(x, scale, *more)
            _, back = jax.vjp(lambda total, scale: plain(total, scale)[0], total, scale)
            dx, dscale = back(dy)
            dx = dx + dsum if self.residual else dx
            return dict(y=y, dx=dx, dscale=dscale) | ({'sum': added} if self.residual else {})

        arrays = (x, scale, dy, dsum, total, *more)
        exact = references.exact(reference, *arrays)
        return _jit(kernel, x, scale, dy, dsum, *more), jax.jit(reference)(*arrays), exact


@dataclasses.dataclass(frozen=True)
class Attention:
    B: int
    T: int
    N: int
    K: int
    H: int
    layout: str = 'causal'  # see documents.layout
    window: int = 0
    softcap: float = 0.0
    S: int = 0  # 0: T
    dtype: str = 'bfloat16'
    stretched: bool = False  # scores ten times as large

    op = 'attention'

    @property
    def least(self) -> dict:
        """Sizes that smaller values count as, for `compare`.

        With one key per query, dq and dk are 0, as the difference of two equal sums. Those sums are
        about as large as the scale times |dout||v|, so errors are relative to that.
        """
        return dict.fromkeys(('dq', 'dk'), self.H**0.5) if self.layout == 'single' else {}

    def outputs(self, interpret: bool) -> tuple:
        package = kernels(self.op)
        S = self.S or self.T
        q = normal(0, (self.B, self.T, self.N, self.H), self.dtype, 10 if self.stretched else 1)
        k, v = (normal(i, (self.B, S, self.K, self.H), self.dtype) for i in (1, 2))
        dout = normal(3, q.shape, self.dtype)
        places = documents.layout(self.layout, self.B, self.T, S)
        options = dict(scale=self.H**-0.5, softcap=self.softcap)

        def kernel(q, k, v, dout, *places):
            more = dict(window=self.window, interpret=interpret, **options)
            out, lse = package.forward(q, k, v, *places, **more)
            dq, dk, dv = package.backward(q, k, v, out, lse, dout, *places, **more)
            return dict(out=out, lse=lse, dq=dq, dk=dk, dv=dv)

        def reference(q, k, v, dout, *places):
            mask = references.visible(*places, self.window)
            function = functools.partial(references.attention, mask_BTS=mask, **options)
            out, back, lse = jax.vjp(function, q, k, v, has_aux=True)
            dq, dk, dv = back(dout)
            return dict(out=out, lse=lse, dq=dq, dk=dk, dv=dv)

        return _outputs(kernel, reference, q, k, v, dout, *places)


@dataclasses.dataclass(frozen=True)
class DecodeAttention:
    B: int
    N: int
    K: int
    H: int
    pages: int  # maximum per sequence
    page: int = 64  # tokens per page
    window: int = 0
    softcap: float = 0.0
    dtype: str = 'bfloat16'

    op = 'decode_attention'

    def outputs(self, interpret: bool) -> tuple:
        package = kernels(self.op)
        q = normal(0, (self.B, self.N, self.H), self.dtype)
        table, lengths = documents.make_paged(self.B, self.pages, self.page)
        shape = (self.B * self.pages + 1, self.page, self.K, self.H)
        k, v = (normal(i, shape, self.dtype) for i in (1, 2))
        options = dict(scale=self.H**-0.5, window=self.window, softcap=self.softcap)

        def kernel(q, k, v, table, lengths):
            return label(package.forward(q, k, v, table, lengths, interpret=interpret, **options))

        def reference(q, k, v, table, lengths):
            return label(references.decode_attention(q, k, v, table, lengths, **options))

        def label(outputs):
            return dict(zip(('out', 'lse'), outputs))

        return _outputs(kernel, reference, q, k, v, table, lengths)


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    M: int
    D: int
    V: int
    vocab_size: int = 0  # 0: V
    first_id: int = 0
    softcap: float = 0.0
    dtype: str = 'bfloat16'

    op = 'token_logprobs'

    def outputs(self, interpret: bool) -> tuple:
        package = kernels(self.op)
        vocab_size = self.vocab_size or self.first_id + self.V
        hidden = normal(0, (self.M, self.D), self.dtype)
        weight = normal(1, (self.V, self.D), self.dtype, self.D**-0.5)
        targets = jax.random.randint(jax.random.key(2), (self.M,), 0, vocab_size, jnp.int32)
        dpicked, dlse = (normal(i, (self.M,), jnp.float32) for i in (3, 4))
        options = dict(vocab_size=vocab_size, first_id=self.first_id, softcap=self.softcap)

        def kernel(hidden, weight, targets, dpicked, dlse):
            more = dict(interpret=interpret, **options)
            lse, picked = package.forward(hidden, weight, targets, **more)
            gradient = package.backward(hidden, weight, targets, lse, dpicked, dlse, **more)
            return dict(lse=lse, picked=picked, gradient=gradient)

        def reference(hidden, weight, targets, dpicked, dlse):
            zeros = jnp.zeros((self.M, self.V), jnp.float32)
            (lse, picked), back = jax.vjp(
                lambda offset: references.cross_entropy(hidden, weight, targets, offset, **options),
                zeros,
            )
            [gradient] = back((dlse, dpicked))
            return dict(lse=lse, picked=picked, gradient=gradient.astype(hidden.dtype))

        return _outputs(kernel, reference, hidden, weight, targets, dpicked, dlse)


def _outputs(kernel, reference, *arrays) -> tuple:
    """The arguments of `compare`, for a kernel with the same signature as its reference."""
    exact = references.exact(reference, *arrays)
    return _jit(kernel, *arrays), jax.jit(reference)(*arrays), exact


def _jit(function, *arrays):
    """A call without arguments. The arrays are arguments of jit, as XLA would fold constants."""
    return functools.partial(jax.jit(function), *arrays)


GRID = (
    RmsNorm(4096, 2048),
    RmsNorm(4096, 4096, residual=False),
    RmsNorm(777, 1024),
    RmsNorm(1, 4096),
    RmsNorm(300, 8192, dtype='float16'),
    RmsNorm(512, 2048, residual=False, dtype='float16'),
    Attention(2, 512, 8, 8, 64),
    Attention(2, 512, 8, 2, 128),
    Attention(1, 512, 8, 1, 256),
    Attention(2, 1000, 8, 2, 128, 'packed'),
    Attention(2, 1000, 8, 1, 64, 'packed', window=100, softcap=50.0),
    Attention(1, 777, 8, 2, 256, 'packed'),
    Attention(2, 512, 4, 4, 128, window=32),
    Attention(2, 512, 4, 4, 128, softcap=30.0),
    Attention(2, 512, 8, 2, 128, 'packed', stretched=True),
    Attention(2, 300, 4, 1, 128, 'single'),
    Attention(2, 512, 4, 1, 64, 'masked'),
    Attention(2, 512, 4, 1, 128, 'permuted'),
    Attention(2, 128, 8, 2, 128, 'continued', S=640),
    Attention(1, 4096, 4, 1, 128, 'packed', window=1024),
    Attention(2, 1000, 8, 2, 64, 'packed', dtype='float16'),
    Attention(2, 1000, 8, 2, 128, 'packed', dtype='float16'),
    Attention(1, 500, 8, 2, 256, 'packed', dtype='float16'),
    DecodeAttention(8, 32, 8, 128, 16),
    DecodeAttention(8, 8, 8, 64, 16),
    DecodeAttention(3, 8, 1, 256, 7),
    DecodeAttention(8, 32, 8, 128, 16, window=100, softcap=50.0),
    DecodeAttention(8, 32, 8, 128, 16, dtype='float16'),
    DecodeAttention(64, 32, 8, 64, 32),
    TokenLogprobs(1024, 2048, 4096),
    TokenLogprobs(1000, 1024, 3000),
    TokenLogprobs(512, 2048, 2048, vocab_size=1999),
    TokenLogprobs(512, 2048, 2048, vocab_size=4000, first_id=2048, softcap=30.0),
    TokenLogprobs(777, 4096, 8192, dtype='float16'),
)
SMOKE_GRID = (
    RmsNorm(16, 256),
    Attention(1, 128, 2, 1, 64, 'packed'),
    DecodeAttention(2, 8, 1, 64, 2),
    TokenLogprobs(128, 64, 256),
)


def tasks(smoke: bool, op: str) -> list[Task]:
    """The cases of an op."""
    grid = SMOKE_GRID if smoke else GRID
    return [
        Task(_describe(case), functools.partial(check, case, smoke))
        for case in grid
        if case.op == op
    ]


def names(op: str) -> list[str]:
    """The cases that must hold before an op is proven."""
    return [_describe(case) for case in GRID if case.op == op]


def check(case, smoke: bool) -> dict:
    """Runs one case; smoke: interpreted, and only once."""
    cap = STRETCHED_CAP if getattr(case, 'stretched', False) else CAP
    least = getattr(case, 'least', None)
    outputs = case.outputs(interpret=smoke)
    row = compare(*outputs, cap=cap, repeats=1 if smoke else 3, least=least)
    return row | {'source': source_digest(case.op)}


def _describe(case) -> str:
    """'attention B2 T512 N8 K2 H128 packed window 32'."""
    words = [case.op]
    for field in dataclasses.fields(case):
        value = getattr(case, field.name)
        if len(field.name) == 1 and value:
            words.append(f'{field.name}{value}')
        elif field.name in ('layout', 'dtype'):
            words.append(value)
        elif value != field.default:
            words.append(field.name if value is True else f'{field.name} {value}')
    return ' '.join(words)

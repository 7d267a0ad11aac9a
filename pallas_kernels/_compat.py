"""The only module that imports Pallas for Mosaic GPU, whose API may change with any jax release.

Kernels take `pl` and `plgpu` from here, start with `launch`, and multiply matrices with `matmul`.
The same source thus runs on a GPU, runs in the interpreter, and compiles on machines without a GPU.
"""

import contextlib
import importlib
import math

import jax
import jax.numpy as jnp
from jax import lax

__all__ = [
    'accumulate',
    'add_product',
    'interpreted_races',
    'launch',
    'matmul',
    'operand',
    'overlap',
    'pl',
    'plgpu',
    'read',
    'tanh',
    'tiled_layout',
]


class _Late:
    """A module that is imported on first use.

    Importing Mosaic takes 15 % of the CPU time of starting a run, and runs on CPU do not need it.
    """

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str):
        return getattr(importlib.import_module(self._name), attribute)


pl = _Late('jax.experimental.pallas')
plgpu = _Late('jax.experimental.pallas.mosaic_gpu')
mgpu = _Late('jax.experimental.mosaic.gpu')
fragmented_array = _Late('jax.experimental.mosaic.gpu.fragmented_array')


def launch(body, *, interpret: bool, approx_math: bool = False, **options):
    """`plgpu.kernel` with our compiler parameters; `interpret` simulates the GPU and finds races.

    Args:
      options: for `plgpu.kernel`: out_type, scratch_types, grid, grid_names, num_threads, ...
    """
    return plgpu.kernel(
        body,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=approx_math
        ),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else False,
        **options,
    )


def operand(shape, dtype, columns: int = 64):
    """Shared memory for an operand of the tensor cores, in tiles of 8 rows and `columns` columns.

    Elements have two bytes; the swizzle spans one row of a tile.
    """
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def tanh(x, times: float):
    """tanh(times * x), within 1e-6.

    The tanh instruction is only within 5e-4, which a soft-cap of 50 turns into 0.025. This uses
    exp2 and rsqrt, which are instructions; division is not.
    """
    return 1 - 2 * lax.rsqrt(1 + jnp.exp2(x * (2 * math.log2(math.e) * times))) ** 2


def matmul(a, b, *, interpret: bool, meanwhile=lambda: None):
    """a [M, K] b [K, N] -> [M, N] float32 in registers; waits for the result.

    a is in SMEM or registers, b in SMEM (`ref.transpose((1, 0))` for a transposed one).
    `meanwhile` is called between the start of the product and the wait.
    """
    shape = (a.shape[0], b.shape[1])
    if interpret:
        meanwhile()
        return _simulate(a, b)

    def product(acc_ref):
        plgpu.wgmma(acc_ref, a, b)
        meanwhile()
        return acc_ref[...]

    return pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))


def accumulate(acc, a, b, *, interpret: bool):
    """acc + a b, with operands as in `matmul`; acc [M, N] float32 is in WGMMA layout."""
    if interpret:
        return acc + _simulate(a, b)

    def product(acc_ref):
        plgpu.wgmma(acc_ref, a, b)

    return pl.run_state(product)(plgpu.ACC.init(acc))


def overlap(body, sums: tuple, shapes: tuple, values: tuple = (), *, interpret: bool) -> tuple:
    """Runs body(sums, products), whose matrix products overlap with other work; returns the sums.

    The body starts products with `add_product` and waits for results with `read`. All products
    have finished when this returns; operands in SMEM must not be released before.

    Args:
      sums: float32 in WGMMA layout; the body adds to them.
      shapes: of accumulators that start at zero and do not outlive the body.
      values: arrays with the shapes of what the body returns, which is returned after the sums.
    """
    if interpret:
        simulated = tuple(_Accumulator(x) for x in sums)
        results = body(simulated, tuple(_Accumulator(jnp.zeros(shape)) for shape in shapes))
        return tuple(x.value for x in simulated) + (tuple(results) if values else ())

    def outer(refs):
        def inner(*products):
            results = body(refs[: len(sums)], products)
            for ref, result in zip(refs[len(sums) :], results or (), strict=True):
                ref[...] = result

        pl.run_scoped(inner, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))

    return tuple(pl.run_state(outer)((*(plgpu.ACC.init(x) for x in sums), *values)))


def add_product(accumulator, a, b):
    """Starts accumulator += a b; operands as in `matmul`."""
    if isinstance(accumulator, _Accumulator):
        accumulator.value = accumulator.value + _simulate(a, b)
    else:
        plgpu.wgmma(accumulator, a, b)


def read(accumulator, *, in_flight: int = 0):
    """The accumulator's value, once at most the last `in_flight` products are still running."""
    if isinstance(accumulator, _Accumulator):
        return accumulator.value
    return plgpu.wgmma_accumulator_load(accumulator, wait_n=in_flight)


class _Accumulator:
    """Replaces a WGMMA accumulator in the interpreter."""

    def __init__(self, value):
        self.value = value


def _simulate(a, b):
    """a b without WGMMA, whose accumulators the interpreter cannot carry through a loop."""
    a, b = (x if isinstance(x, jax.Array) else x[...] for x in (a, b))  # a view is not a jax.Ref
    # WGMMA reads SMEM like the copy engine. Here the program itself reads, so it needs a fence
    # before the engine may refill the buffer.
    plgpu.commit_smem()
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def tiled_layout(tiles, *, warp_dims, lane_dims):
    """A register layout: an array cut into tiles, these into smaller tiles, and so on to vectors.

    Args:
      tiles: shapes, each of a tile within the previous one.
      warp_dims, lane_dims: dimensions of the tiled array, counted from the end, that are spread
        over the 4 warps and the 32 lanes.
    """
    layout = mgpu.TiledLayout(
        fragmented_array.Tiling(tiles), warp_dims, lane_dims, vector_dim=-1, _check_canonical=False
    ).canonicalize()
    fields = layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim
    return plgpu.Layout.TILED(*fields)


@contextlib.contextmanager
def interpreted_races():
    """Resets the interpreter; yields a function that returns whether it has found a race since."""
    # A private module of jax, which only tests need.
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

    interpreter.reset_gpu_interpret_mode_state()
    try:
        # The detector is created by the first launch.
        yield lambda: interpreter.get_races().races_found
    finally:
        interpreter.reset_gpu_interpret_mode_state()

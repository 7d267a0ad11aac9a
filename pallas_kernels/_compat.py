"""The one door to Pallas for Mosaic GPU, whose interface may change with every release of jax.

Kernels take `pl` and `plgpu` from here, start through `launch`, and multiply matrices through
`matmul`, so that the same source runs on a GPU, in the interpreter, and through the compiler of a
machine that has no GPU.
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
    """A module that is imported when something of it is first used.

    Mosaic takes 15 % of the CPU time of starting a training, and no CPU needs it.
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
      options: those of `plgpu.kernel`: out_type, scratch_types, grid, grid_names, num_threads, ...
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
    """Shared memory for what the tensor cores multiply, in tiles of 8 rows and so many columns.

    Of two bytes an element; a row of a tile is what the swizzle goes over.
    """
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def tanh(x, times: float):
    """tanh(times x) within 1e-6, where the instruction is within 5e-4: a soft-cap of 50 makes that
    0.025. Of exp2 and rsqrt, which are instructions; a quotient is not.
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
    """acc + a b, as `matmul`; acc [M, N] float32 has the layout of WGMMA."""
    if interpret:
        return acc + _simulate(a, b)

    def product(acc_ref):
        plgpu.wgmma(acc_ref, a, b)

    return pl.run_state(product)(plgpu.ACC.init(acc))


def overlap(body, sums: tuple, shapes: tuple, values: tuple = (), *, interpret: bool) -> tuple:
    """The sums after body(sums, products), in which matrix products run beside other work.

    The body begins products by `add_product` and takes a result by `read`; all that it has begun
    is done at the end. Operands in SMEM must not be given back before that.

    Args:
      sums: float32 in the layout of WGMMA; the body adds to them.
      shapes: of products that begin at zero and do not outlive the body.
      values: what the body returns has their shapes, and is returned after the sums.
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
    """Begins accumulator += a b; operands as in `matmul`."""
    if isinstance(accumulator, _Accumulator):
        accumulator.value = accumulator.value + _simulate(a, b)
    else:
        plgpu.wgmma(accumulator, a, b)


def read(accumulator, *, in_flight: int = 0):
    """What is in the accumulator when no more than the last `in_flight` products still run."""
    if isinstance(accumulator, _Accumulator):
        return accumulator.value
    return plgpu.wgmma_accumulator_load(accumulator, wait_n=in_flight)


class _Accumulator:
    """Stands for one of WGMMA in the interpreter."""

    def __init__(self, value):
        self.value = value


def _simulate(a, b):
    """The interpreter cannot carry accumulators of WGMMA through a loop."""
    a, b = (x if isinstance(x, jax.Array) else x[...] for x in (a, b))  # a view is no jax.Ref
    # WGMMA reads as the copy engine does; this read is one of the program, so it has to be closed
    # before the engine may fill the room again.
    plgpu.commit_smem()
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def tiled_layout(tiles, *, warp_dims, lane_dims):
    """A layout of registers: an array cut into tiles, those again, ..., the last one a vector.

    Args:
      tiles: shapes, each of a tile of the one before.
      warp_dims, lane_dims: which dimensions of the array so cut, counted from the end, go over the
      4 warps and the 32 lanes.
    """
    layout = mgpu.TiledLayout(
        fragmented_array.Tiling(tiles), warp_dims, lane_dims, vector_dim=-1, _check_canonical=False
    ).canonicalize()
    fields = layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim
    return plgpu.Layout.TILED(*fields)


@contextlib.contextmanager
def interpreted_races():
    """Starts with a clean interpreter; yields a function that says if races were found since."""
    # Private, and for tests alone: nothing else needs it.
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

    interpreter.reset_gpu_interpret_mode_state()
    try:
        # The detector exists from the first launch on.
        yield lambda: interpreter.get_races().races_found
    finally:
        interpreter.reset_gpu_interpret_mode_state()

"""The one door to Pallas for Mosaic GPU, whose interface may change with every release of jax.

Kernels take `pl` and `plgpu` from here, start through `launch`, and multiply matrices through
`matmul`, so that the same source runs on a GPU, in the interpreter, and through the compiler of a
machine that has no GPU.
"""

import contextlib

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

__all__ = ['accumulate', 'interpreted_races', 'launch', 'matmul', 'pl', 'plgpu']


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


def matmul(a, b, *, interpret: bool):
    """a [M, K] b [K, N] -> [M, N] float32 in registers; waits for the result.

    a is in SMEM or registers, b in SMEM (`ref.transpose((1, 0))` for a transposed one).
    """
    shape = (a.shape[0], b.shape[1])
    if interpret:
        return _simulated(a, b)

    def product(acc_ref):
        plgpu.wgmma(acc_ref, a, b)
        return acc_ref[...]

    return pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))


def accumulate(acc, a, b, *, interpret: bool):
    """acc + a b, as `matmul`; acc [M, N] float32 has the layout of WGMMA."""
    if interpret:
        return acc + _simulated(a, b)

    def product(acc_ref):
        plgpu.wgmma(acc_ref, a, b)

    return pl.run_state(product)(plgpu.ACC.init(acc))


def _simulated(a, b):
    """The interpreter cannot carry accumulators of WGMMA through a loop."""
    a, b = (x[...] if isinstance(x, jax.Ref) else x for x in (a, b))
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


@contextlib.contextmanager
def interpreted_races():
    """Starts with a clean interpreter; yields a function that says if races were found since."""
    interpreter.reset_gpu_interpret_mode_state()
    try:
        # The detector exists from the first launch on.
        yield lambda: interpreter.get_races().races_found
    finally:
        interpreter.reset_gpu_interpret_mode_state()

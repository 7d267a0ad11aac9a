"""Times calls on the device, and measures its ceilings: a matmul and a copy.

All data is random normal: with zeros, the device appears more than a tenth too fast.
"""

import statistics
import time

import jax
import jax.numpy as jnp

from tools.bench.gpu.stages import Task

BATCH_SECONDS = 0.02  # of calls that are queued together to hide the host's overhead
BATCHES = 15
QUEUED_BYTES = 4 << 30  # most bytes of queued results


def microseconds(function, *arguments, smoke: bool = False) -> dict:
    """Median microseconds of a jitted call over batches of calls, and their spread.

    smoke: a single call, whose time is meaningless.
    """
    if smoke:
        batches, count = 1, 1
    else:
        outputs = jax.block_until_ready(function(*arguments))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(outputs))
        del outputs
        once = min(_batch(function, arguments, 1) for _ in range(3))
        count = max(1, min(64, int(BATCH_SECONDS / once), QUEUED_BYTES // max(size, 1)))
        batches = BATCHES if once < 0.2 else 5
    times = [_batch(function, arguments, count) * 1e6 for _ in range(batches)]
    return {'microseconds': statistics.median(times), 'spread': [min(times), max(times)]}


def _batch(function, arguments, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        outputs = function(*arguments)
    jax.block_until_ready(outputs)
    return (time.perf_counter() - start) / count


def normal(seed: int, shape, dtype=jnp.bfloat16, scale: float = 1.0):
    """Random normal numbers."""
    values = jax.random.normal(jax.random.key(seed), shape, jnp.float32) * scale
    return values.astype(dtype)


def tasks(smoke: bool) -> list[Task]:
    """The ceilings of this device, and the overhead of a launch."""

    def matmul():
        size = 256 if smoke else 8192
        a, b = normal(0, (size, size)), normal(1, (size, size))
        times = microseconds(jax.jit(jnp.matmul), a, b, smoke=smoke)
        return {**times, 'flops': 2 * size**3, **rates(times, flops=2 * size**3)}

    def copy():
        x = normal(0, (1 << 16 if smoke else 1 << 30,))
        times = microseconds(jax.jit(jnp.negative), x, smoke=smoke)
        return {**times, 'bytes': 2 * x.nbytes, **rates(times, moved=2 * x.nbytes)}

    def launch():
        return microseconds(jax.jit(jnp.negative), normal(0, (8,)), smoke=smoke)

    return [Task('matmul', matmul), Task('copy', copy), Task('launch', launch)]


def rates(times: dict, flops: float = 0, moved: float = 0) -> dict:
    """TFLOP/s and GB/s, if the work is given."""
    seconds = times['microseconds'] * 1e-6
    found = {'tflops': flops / seconds / 1e12} if flops else {}
    return found | ({'gigabytes_per_second': moved / seconds / 1e9} if moved else {})


def floor_microseconds(row: dict, ceilings: dict) -> float | None:
    """The least time for a row's flops and bytes at the measured ceilings; None without them."""
    if not {'matmul', 'copy'} <= ceilings.keys():
        return None
    by_flops = row.get('flops', 0) / (ceilings['matmul']['tflops'] * 1e12)
    by_bytes = row.get('bytes', 0) / (ceilings['copy']['gigabytes_per_second'] * 1e9)
    return max(by_flops, by_bytes) * 1e6

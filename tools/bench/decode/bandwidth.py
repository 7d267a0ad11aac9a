"""Case `bandwidth`: what copies reach, and the share of it that decode steps reach (MBU).

A decode step has to read all weights and all cached keys and values. A copy counts what it reads
and what it writes.
"""

import functools
import statistics
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from tools.bench.decode.timing import alternate, spread

COPY_BYTES = 256 << 20


def measure(repeats: int, threads: int, step: dict | None, size: int = COPY_BYTES) -> dict:
    """GB/s of copies; and of decoding, if there are the figures of case `step`."""
    source = np.ones(size // 4, np.float32)
    target, array = np.zeros_like(source), jnp.asarray(source)
    copy, pool = jax.jit(jnp.negative), ThreadPoolExecutor(threads)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads)))
    works = {'numpy, 1 thread': lambda: np.copyto(target, source)}
    if threads > 1:
        works[f'numpy, {threads} threads'] = lambda: list(pool.map(lambda x: np.copyto(*x), parts))
    works['jax'] = lambda: jax.block_until_ready(copy(array))
    works = {name: functools.partial(_quietly, work) for name, work in works.items()}
    results = alternate(works, max(repeats, 5))
    pool.shutdown()
    rates = {
        name: [2 * size / seconds / 1e9 for seconds in found['seconds']]
        for name, found in results.items()
    }
    best = max(statistics.median(values) for values in rates.values())
    figures = {'copy_bytes': size, 'gigabytes_per_second': rates, 'copy': best}
    return figures | {'mbu': _of_copy(step, best) if step else []}


def _quietly(work) -> None:
    work()


def _of_copy(step: dict, copy: float) -> list[dict]:
    rows = []
    for row in step['rows']:
        seconds = [s / step['steps'] for s in row['results']['engine']['seconds']]
        rates = [row['bytes_per_step'] / each / 1e9 for each in seconds]
        about = {'batch': row['batch'], 'sampling': row['sampling']}
        rows.append(about | {'gigabytes_per_second': rates, 'mbu': [x / copy for x in rates]})
    return rows


def show(figures: dict) -> None:
    """The copies, and the share of the best one that decoding reaches."""
    for name, rates in figures['gigabytes_per_second'].items():
        print(f'  copy, {name}: {spread(rates)} GB/s, read and written')
    if not figures['mbu']:
        print('  run case `step` on the same day for the share that decoding reaches')
    for row in figures['mbu']:
        print(
            f'  batch {row["batch"]:2} {row["sampling"]:14} '
            f'{spread(row["gigabytes_per_second"])} GB/s, of copy {spread(row["mbu"])}'
        )

"""Rows of documents as in training, and paged caches as in serving.

Numpy draws them from a fixed seed, so that every peer gets the same ones.
"""

import jax.numpy as jnp
import numpy as np

MEDIAN, SIGMA = 500, 1.2  # lognormal, tokens: as in web text, few documents hold most tokens


def lengths(rows: int, tokens: int, seed: int = 0) -> list[list[int]]:
    """Lengths of the documents that fill each row; the last document is cut to fit."""
    random, median = np.random.default_rng(seed), min(MEDIAN, tokens / 8)
    filled = []
    for _ in range(rows):
        row = []
        while (left := tokens - sum(row)) > 0:
            row.append(min(left, max(1, int(random.lognormal(np.log(median), SIGMA)))))
        filled.append(row)
    return filled


def places(rows: list[list[int]], tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(positions, segment ids), each [rows, tokens], of documents of these lengths and padding."""
    positions, segments = (np.zeros((len(rows), tokens), np.int32) for _ in range(2))
    for index, row in enumerate(rows):
        start = 0
        for number, length in enumerate(row, 1):
            positions[index, start : start + length] = np.arange(length)
            segments[index, start : start + length] = number
            start += length
    return positions, segments


def visible_pairs(rows: list[list[int]], window: int = 0) -> float:
    """Pairs of a query and a key that it sees; without a window, n^2 / 2 for n tokens (causal)."""
    total = 0.0
    for length in (length for row in rows for length in row):
        reach = min(window, length) if window else length
        total += length * (reach - reach * reach / (2 * length))
    return total


def layout(name: str, B: int, T: int, S: int):
    """Positions and segment ids of queries [B, T] and of keys [B, S], as a kernel takes them.

    causal: one document per row. packed: several documents and padding. single: documents of one
    token. masked: the first row is one document, the others are only padding. permuted: packed,
    with different random orders of queries and keys. continued: the queries are the last T keys.
    """
    random = np.random.default_rng(1)
    rows = {
        'causal': [[S]] * B,
        'continued': [[S]] * B,
        'single': [[1] * (S - 3)] * B,
        'masked': [[S], *[[]] * (B - 1)],
    }.get(name)
    if rows is None:
        short = [max(1, S // part) for part in (7, 3, 11, 5)]
        rows = [list(random.permutation(short)) for _ in range(B)]
    positions, segments = places(rows, S)
    keys = queries = (positions, segments)
    if name == 'permuted':
        orders = [random.permutation(S) for _ in range(2)]
        keys, queries = ((positions[:, order], segments[:, order]) for order in orders)
    queries = tuple(x[:, S - T :] for x in queries)
    return tuple(map(jnp.asarray, (*queries, *keys)))


def make_paged(B: int, pages: int, page: int):
    """A page table [B, pages] in random order, and lengths [B], which include full, 0 and 1.

    Page 0 belongs to no sequence: unused entries of the table point there.
    """
    random = np.random.default_rng(2)
    found = random.integers(1, pages * page + 1, B)
    found[: min(B, 3)] = [pages * page, 0, 1][: min(B, 3)]
    table = 1 + random.permutation(B * pages).reshape(B, pages)
    used = np.arange(pages)[None] < -(-found[:, None] // page)
    return jnp.asarray(np.where(used, table, 0), jnp.int32), jnp.asarray(found, jnp.int32)

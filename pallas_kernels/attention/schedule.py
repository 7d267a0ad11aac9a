"""Which queries see which keys: the rule for a pair of tokens, and a schedule for tiles.

Kernels work on tiles. XLA computes the schedule beforehand from positions and segment ids, never
from array indices. Any order of tokens is therefore correct, and the usual ones (packed documents,
caches, context-sharded queries) are fast: a tile in which no query sees a key is neither loaded nor
multiplied, and a tile in which every query sees every key needs no mask.

B batch, T query position, S key position, I tiles of queries, J tiles of keys; X and Y stand for
either: a schedule has one row for each X, which visits some of Y.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels._padding import whole_tiles

_FULL, _PARTIAL, _SKIPPED = 0, 1, 2
_INT_MAX = jnp.iinfo(jnp.int32).max
_INT_MIN = jnp.iinfo(jnp.int32).min


class Schedule(NamedTuple):
    """The tiles that each row visits; all int32."""

    tiles_BXY: jax.Array  # first the full tiles of a row, then the partial ones; the rest is unused
    num_full_BX: jax.Array
    num_visited_BX: jax.Array  # full and partial
    order_BX: jax.Array  # rows with most tiles first, so that blocks end at about the same time


def visible(q_position, q_segment, kv_position, kv_segment, window: int):
    """True where a query sees a key; the arguments broadcast. window 0 is no limit."""
    mask = (q_segment == kv_segment) & (q_segment > 0) & (kv_position <= q_position)
    if window:
        mask &= q_position - kv_position < window
    return mask


def for_queries(
    q_positions_BT,
    q_segment_ids_BT,
    kv_positions_BS,
    kv_segment_ids_BS,
    *,
    q_tile: int,
    kv_tile: int,
    window: int = 0,
) -> Schedule:
    """The tiles of keys for each tile of queries (forward, dq)."""
    return _order(
        _tile_kinds(
            _summary(q_positions_BT, q_segment_ids_BT, q_tile),
            _summary(kv_positions_BS, kv_segment_ids_BS, kv_tile),
            window,
        )
    )


def for_keys(
    q_positions_BT,
    q_segment_ids_BT,
    kv_positions_BS,
    kv_segment_ids_BS,
    *,
    q_tile: int,
    kv_tile: int,
    window: int = 0,
) -> Schedule:
    """The tiles of queries for each tile of keys (dk and dv)."""
    kinds_BIJ = _tile_kinds(
        _summary(q_positions_BT, q_segment_ids_BT, q_tile),
        _summary(kv_positions_BS, kv_segment_ids_BS, kv_tile),
        window,
    )
    return _order(jnp.swapaxes(kinds_BIJ, 1, 2))


def token_ids(positions_BX, segment_ids_BX, tile: int):
    """Positions and segment ids [B, 2, X] int32 in whole tiles: one copy brings a tile of both."""
    ids = jnp.stack([positions_BX, segment_ids_BX], axis=1).astype(jnp.int32)
    return whole_tiles(ids, tile, 2)


class _Summary(NamedTuple):
    """A summary of each tile, [B, X]. All fields but `is_uniform` ignore tokens of segment 0."""

    is_empty: jax.Array
    is_uniform: jax.Array  # one segment, which is not 0
    least_segment: jax.Array
    greatest_segment: jax.Array
    least_position: jax.Array
    greatest_position: jax.Array
    first_position: jax.Array  # least in the least segment
    last_position: jax.Array  # greatest in the greatest segment


def _summary(positions_BX, segment_ids_BX, tile: int) -> _Summary:
    B = positions_BX.shape[0]
    position, segment = (
        whole_tiles(x.astype(jnp.int32), tile, 1).reshape(B, -1, tile)
        for x in (positions_BX, segment_ids_BX)
    )
    counts = segment > 0

    def least(x, where):
        return jnp.min(x, axis=-1, where=where, initial=_INT_MAX)

    def greatest(x, where):
        return jnp.max(x, axis=-1, where=where, initial=_INT_MIN)

    least_segment, greatest_segment = least(segment, counts), greatest(segment, counts)
    return _Summary(
        is_empty=~jnp.any(counts, axis=-1),
        is_uniform=jnp.all(counts, axis=-1) & (least_segment == greatest_segment),
        least_segment=least_segment,
        greatest_segment=greatest_segment,
        least_position=least(position, counts),
        greatest_position=greatest(position, counts),
        first_position=least(position, segment == least_segment[..., None]),
        last_position=greatest(position, segment == greatest_segment[..., None]),
    )


def _tile_kinds(queries: _Summary, keys: _Summary, window: int):
    """[B, I, J] of _FULL, _PARTIAL, _SKIPPED. Never skips a visible pair.

    A visible pair has equal segments and kv_position <= q_position. In lexicographic order of
    (segment, position), the key therefore does not come after the query, and the first key of a
    tile must not come after the last query. In packed rows this skips the documents that follow;
    bounds on positions alone say little if a tile holds the end of one document and the start of
    another.
    """
    q = _Summary(*(x[:, :, None] for x in queries))
    kv = _Summary(*(x[:, None, :] for x in keys))
    is_possible = (
        ~q.is_empty
        & ~kv.is_empty
        & (kv.least_segment <= q.greatest_segment)
        & (kv.greatest_segment >= q.least_segment)
        & (kv.least_position <= q.greatest_position)
        & ((kv.least_segment < q.greatest_segment) | (kv.first_position <= q.last_position))
    )
    is_full = (
        q.is_uniform
        & kv.is_uniform
        & (q.least_segment == kv.least_segment)
        & (kv.greatest_position <= q.least_position)
    )
    if window:
        is_possible &= q.least_position - kv.greatest_position < window
        is_possible &= (kv.greatest_segment > q.least_segment) | (
            q.first_position - kv.last_position < window
        )
        is_full &= q.greatest_position - kv.least_position < window
    # is_full is exact, so it implies is_possible.
    return jnp.where(is_full, _FULL, jnp.where(is_possible, _PARTIAL, _SKIPPED))


def _order(kinds_BXY) -> Schedule:
    num_full_BX = jnp.sum(kinds_BXY == _FULL, axis=-1, dtype=jnp.int32)
    num_visited_BX = jnp.sum(kinds_BXY != _SKIPPED, axis=-1, dtype=jnp.int32)
    return Schedule(
        tiles_BXY=jnp.argsort(kinds_BXY, axis=-1, stable=True).astype(jnp.int32),
        num_full_BX=num_full_BX,
        num_visited_BX=num_visited_BX,
        order_BX=jnp.argsort(-num_visited_BX, axis=-1, stable=True).astype(jnp.int32),
    )

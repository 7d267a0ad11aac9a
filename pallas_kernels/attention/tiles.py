"""Which heads the kernels support, and their tiles: measured, otherwise guessed."""

import dataclasses

import jax.numpy as jnp

from pallas_kernels import _tables

HEAD_DIMS = (64, 128, 256)
COMPUTE = 2  # computing warpgroups per block of the forward kernel


@dataclasses.dataclass(frozen=True)
class ForwardTiles:
    """Sizes that affect speed, not results."""

    rows: int = 64  # queries per warpgroup
    kv_tile: int = 128
    slots: int = 2  # tiles of K and of V in flight

    @property
    def q_tile(self) -> int:
        return COMPUTE * self.rows


@dataclasses.dataclass(frozen=True)
class BackwardTiles:
    """Sizes that affect speed, and results only in the last bits."""

    dkv_warpgroups: int = 2  # computing ones; each owns 64 rows
    dkv_q: int = 64  # queries visited at a time
    dkv_stages: int = 2  # slots of the ring
    dq_warpgroups: int = 2
    dq_kv: int = 64  # keys visited at a time
    dq_stages: int = 2


def obstacle(*, head_dim: int, dtype) -> str | None:
    """Why the kernels do not support such heads, or None."""
    if head_dim not in HEAD_DIMS:
        return f'head_dim must be one of {", ".join(map(str, HEAD_DIMS))}, not {head_dim}'
    if jnp.dtype(dtype).name not in ('bfloat16', 'float16'):
        return f'q, k and v must be bfloat16 or float16, not {jnp.dtype(dtype).name}'
    return None


def choose_tiles(part: str, *, head_dim: int, dtype) -> ForwardTiles | BackwardTiles:
    """The tiles measured on the target device, otherwise a guess.

    Args:
      part: 'forward' or 'backward'.
    """
    measured = _tables.look_up(__file__, **table_key(part, head_dim=head_dim, dtype=dtype))
    return _TILES[part](**(measured or _SIZES[part][head_dim][0]))


def table_key(part: str, *, head_dim: int, dtype) -> dict:
    """The key of an entry of tiles.json, without the device."""
    return dict(part=part, dtype=jnp.dtype(dtype).name, head_dim=head_dim)


def candidates(part: str, *, head_dim: int, dtype) -> list[ForwardTiles | BackwardTiles]:
    """Tiles worth measuring; all fit in shared memory and registers."""
    del dtype  # both dtypes have two bytes
    return [_TILES[part](**sizes) for sizes in _SIZES[part][head_dim]]


_TILES = {'forward': ForwardTiles, 'backward': BackwardTiles}
# By head_dim, the guess first.
_SIZES = {
    # The scores must fit in a thread's registers besides the output; 64 columns of either take 32
    # registers. A product with V takes keys in multiples of 64. Other sizes spill: 192 or 256 keys,
    # or 128 rows, from head_dim 128 on.
    'forward': {
        64: (
            dict(rows=64, kv_tile=128, slots=4),
            dict(rows=64, kv_tile=192, slots=3),
            dict(rows=128, kv_tile=64, slots=4),
        ),
        128: (
            dict(rows=64, kv_tile=128, slots=2),
            dict(rows=64, kv_tile=64, slots=4),
        ),
        256: (dict(rows=64, kv_tile=64, slots=2),),
    },
    # The rings take all of shared memory; nothing spills.
    'backward': {
        64: (dict(dkv_stages=4, dq_stages=4), dict(dkv_stages=2, dq_stages=2)),
        128: (dict(dkv_stages=4, dq_stages=4), dict(dkv_stages=3, dq_stages=3)),
        256: (dict(dq_warpgroups=1), dict(dq_kv=32)),
    },
}

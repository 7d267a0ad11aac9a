"""Which heads the kernels take, and their tiles: what was measured, else a guess."""

import dataclasses

import jax.numpy as jnp

from pallas_kernels import _tables

HEAD_DIMS = (64, 128, 256)
COMPUTE = 2  # warpgroups of a block that compute, in the forward kernel


@dataclasses.dataclass(frozen=True)
class ForwardTiles:
    """Sizes that change speed, not results."""

    rows: int = 64  # queries of one warpgroup
    kv_tile: int = 128
    slots: int = 2  # tiles of K and of V in flight

    @property
    def q_tile(self) -> int:
        return COMPUTE * self.rows


@dataclasses.dataclass(frozen=True)
class BackwardTiles:
    """Sizes that change speed, not results, but for the last bits."""

    dkv_warpgroups: int = 2  # that compute; each owns 64 rows
    dkv_q: int = 64  # queries visited at a time
    dkv_stages: int = 2  # of the ring
    dq_warpgroups: int = 2
    dq_kv: int = 64  # keys visited at a time
    dq_stages: int = 2


def obstacle(*, head_dim: int, dtype) -> str | None:
    """Why the kernels cannot take such heads, and what they take."""
    if head_dim not in HEAD_DIMS:
        return f'head_dim must be one of {", ".join(map(str, HEAD_DIMS))}, not {head_dim}'
    if jnp.dtype(dtype).name not in ('bfloat16', 'float16'):
        return f'q, k and v must be bfloat16 or float16, not {jnp.dtype(dtype).name}'
    return None


def choose_tiles(part: str, *, head_dim: int, dtype) -> ForwardTiles | BackwardTiles:
    """What was measured on the device of the program, else a guess.

    Args:
      part: 'forward' or 'backward'.
    """
    measured = _tables.look_up(__file__, **table_key(part, head_dim=head_dim, dtype=dtype))
    return _TILES[part](**(measured or _SIZES[part][head_dim][0]))


def table_key(part: str, *, head_dim: int, dtype) -> dict:
    """What an entry of tiles.json is found by, beside the device."""
    return dict(part=part, dtype=jnp.dtype(dtype).name, head_dim=head_dim)


def candidates(part: str, *, head_dim: int, dtype) -> list[ForwardTiles | BackwardTiles]:
    """What is worth measuring: all of it fits in shared memory and in registers."""
    del dtype  # both have two bytes
    return [_TILES[part](**sizes) for sizes in _SIZES[part][head_dim]]


_TILES = {'forward': ForwardTiles, 'backward': BackwardTiles}
# By head_dim, the guess first.
_SIZES = {
    # As many scores as the registers of a thread take beside the output: 64 columns of either are
    # 32. A product with V takes its keys in pieces of 64. What is left out spills: 192 or 256 keys,
    # 128 rows from head_dim 128 on.
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
    # All of shared memory for the rings, and no spills.
    'backward': {
        64: (dict(dkv_stages=4, dq_stages=4), dict(dkv_stages=2, dq_stages=2)),
        128: (dict(dkv_stages=4, dq_stages=4), dict(dkv_stages=3, dq_stages=3)),
        256: (dict(dq_warpgroups=1), dict(dq_kv=32)),
    },
}

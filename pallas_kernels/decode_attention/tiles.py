"""Tile sizes of decode attention, which affect only speed: measured, otherwise guessed."""

import dataclasses

import jax.numpy as jnp

from pallas_kernels import _tables

HEAD_DIMS = (64, 128, 256)
ROWS = 64  # of one WGMMA: the query heads of a kv head, with padding
SMS = 132  # of an H100 or H200
_SMEM_OF_SM = 228 * 1024
_SMEM_OF_BLOCK = 227 * 1024


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a block walks its part of a sequence."""

    tokens: int  # per tile
    slots: int  # tiles of K and V in the ring
    splits: int  # parts of a sequence, one per block

    def smem_bytes(self, head_dim: int) -> int:
        """Per block: the queries, the ring, what the compiler needs, the barriers."""
        matrices = 2 * head_dim * (ROWS + 2 * self.slots * self.tokens)
        return matrices + 2048 + 8 * (self.slots + 1)

    def blocks_per_sm(self, head_dim: int) -> int:
        """Blocks that share an SM: while one starts or ends, another keeps loading."""
        return min(2, _SMEM_OF_SM // (self.smem_bytes(head_dim) + 1024))

    def misfit(self, *, head_dim: int, page_size: int) -> str | None:
        """Why the kernel cannot run with these sizes, or None."""
        if self.tokens % 64:
            return f'tiles must have a multiple of 64 tokens, not {self.tokens}'
        if self.tokens % page_size and page_size % self.tokens:
            return f'tiles of {self.tokens} and pages of {page_size} tokens must divide each other'
        if min(self.slots, self.splits) < 1:
            return f'slots and splits must be at least 1, not {self.slots} and {self.splits}'
        if self.smem_bytes(head_dim) > _SMEM_OF_BLOCK:
            return f'shared memory: {self.smem_bytes(head_dim):,} bytes exceed {_SMEM_OF_BLOCK:,}'
        return None


def obstacle(
    *, num_heads: int, num_kv_heads: int, head_dim: int, page_size: int, dtypes
) -> str | None:
    """Why the kernel does not support such arrays, or None.

    Args:
      dtypes: of queries, keys and values.
    """
    dtypes = {jnp.dtype(dtype).name for dtype in dtypes}
    if len(dtypes) > 1 or not dtypes <= {'bfloat16', 'float16'}:
        return f'q, k and v must be all bfloat16 or all float16, not {", ".join(sorted(dtypes))}'
    if head_dim not in HEAD_DIMS:
        return f'head_dim must be one of {", ".join(map(str, HEAD_DIMS))}, not {head_dim}'
    if page_size < 8 or page_size & (page_size - 1):
        return f'page_size must be a power of two and at least 8, not {page_size}'
    if num_heads // num_kv_heads > ROWS:
        return f'a kv head must have at most {ROWS} query heads, not {num_heads // num_kv_heads}'
    return None


def choose_tiles(
    part: str,
    *,
    batch: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    max_length: int,
    dtype,
) -> Tiles:
    """The tiles measured on the target device, otherwise a guess.

    Args:
      part: 'forward', the only one.
      max_length: most tokens that a query can see.
    """
    key = table_key(
        part,
        batch=batch,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        max_length=max_length,
        dtype=dtype,
    )
    if found := _tables.look_up(__file__, **key):
        return Tiles(**found)
    return _guess(*_RINGS[head_dim][0], batch * num_kv_heads, head_dim, max_length)


def table_key(
    part: str,
    *,
    batch: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    max_length: int,
    dtype,
) -> dict:
    """The key of an entry of tiles.json, without the device; sizes are rounded to powers of two."""
    return dict(
        part=part,
        dtype=jnp.dtype(dtype).name,
        head_dim=head_dim,
        page_size=page_size,
        streams=_power_of_two(batch * num_kv_heads),
        max_length=_power_of_two(max_length),
    )


def candidates(
    part: str,
    *,
    batch: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    max_length: int,
    dtype,
) -> list[Tiles]:
    """Tiles worth measuring for a shape: every ring, and splits around the guess."""
    del part, dtype  # there is one kernel; both dtypes have two bytes
    found = []
    for tokens, slots in _RINGS[head_dim]:
        guess = _guess(tokens, slots, batch * num_kv_heads, head_dim, max_length)
        most = -(-max_length // tokens)
        for splits in sorted(
            {1, max(1, guess.splits // 2), guess.splits, min(2 * guess.splits, most)}
        ):
            tiles = dataclasses.replace(guess, splits=splits)
            if tiles.misfit(head_dim=head_dim, page_size=page_size) is None:
                found.append(tiles)
    return found


# (tokens per tile, slots) by head dim, the guess first. An SM takes about 1700 cycles to load 32 KB
# of K and V, longer than to compute with them. Two or three such tiles in flight are more than
# latency times bandwidth (32 KB per SM).
_RINGS = {
    64: ((128, 3), (128, 2), (64, 4), (64, 6), (128, 6)),
    128: ((64, 2), (64, 3), (64, 4), (64, 6), (128, 3)),
    256: ((64, 3), (64, 2)),
}


def _guess(tokens: int, slots: int, streams: int, head_dim: int, max_length: int) -> Tiles:
    """Chooses the splits for `streams`, the kv heads of all sequences.

    Aims at four blocks for each place on an SM, so that little is idle at the end. A split has at
    least eight tiles, so that its result is relatively small (3 %), or fewer if places would stay
    empty otherwise.
    """
    guess = Tiles(tokens, slots, splits=1)
    places = SMS * guess.blocks_per_sm(head_dim)
    tiles = -(-max_length // tokens)
    wanted, filling = -(-4 * places // streams), -(-places // streams)
    splits = max(1, min(wanted, max(tiles // 8, min(tiles // 2, filling))))
    return dataclasses.replace(guess, splits=splits)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()

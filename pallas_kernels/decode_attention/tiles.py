"""Sizes of decode attention that change speed, not results: what was measured, else a guess."""

import dataclasses

import jax.numpy as jnp

from pallas_kernels import _tables

HEAD_DIMS = (64, 128, 256)
ROWS = 64  # of one WGMMA: the query heads of a kv head, padded
SMS = 132  # of an H100, an H200
_SMEM_OF_SM = 228 * 1024
_SMEM_OF_BLOCK = 227 * 1024


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a block goes through its part of a sequence."""

    tokens: int  # a tile
    slots: int  # tiles of K and V in the ring
    splits: int  # parts of a sequence, each for a block of its own

    def smem_bytes(self, head_dim: int) -> int:
        """Of a block: the queries, the ring, what the compiler takes for itself, the barriers."""
        matrices = 2 * head_dim * (ROWS + 2 * self.slots * self.tokens)
        return matrices + 2048 + 8 * (self.slots + 1)

    def blocks_per_sm(self, head_dim: int) -> int:
        """How many work side by side: while one begins or ends, another one keeps loading."""
        return min(2, _SMEM_OF_SM // (self.smem_bytes(head_dim) + 1024))

    def misfit(self, *, head_dim: int, page_size: int) -> str | None:
        """Why the kernel cannot run with these sizes."""
        if self.tokens % 64:
            return f'tiles of {self.tokens} tokens: only multiples of 64'
        if self.tokens % page_size and page_size % self.tokens:
            return f'tiles of {self.tokens} tokens and pages of {page_size} do not divide'
        if min(self.slots, self.splits) < 1:
            return f'{self.slots} slots and {self.splits} splits: both are at least 1'
        if self.smem_bytes(head_dim) > _SMEM_OF_BLOCK:
            return f'{self.smem_bytes(head_dim):,} bytes of shared memory, of {_SMEM_OF_BLOCK:,}'
        return None


def obstacle(
    *, num_heads: int, num_kv_heads: int, head_dim: int, page_size: int, dtypes
) -> str | None:
    """Why the kernel cannot attend to such pages, and what it takes.

    Args:
      dtypes: of queries, keys and values.
    """
    dtypes = {jnp.dtype(dtype).name for dtype in dtypes}
    if len(dtypes) > 1 or not dtypes <= {'bfloat16', 'float16'}:
        return f'{", ".join(sorted(dtypes))}: all bfloat16 or all float16'
    if head_dim not in HEAD_DIMS:
        return f'head_dim {head_dim} is none of {", ".join(map(str, HEAD_DIMS))}'
    if page_size < 8 or page_size & (page_size - 1):
        return f'pages of {page_size} tokens: a power of two, 8 at least'
    if num_heads // num_kv_heads > ROWS:
        return f'{num_heads // num_kv_heads} query heads of one kv head, at most {ROWS}'
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
    """What was measured on the device of the program, else a guess.

    Args:
      part: 'forward', the only one.
      max_length: tokens that a query can see.
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
    """What an entry of tiles.json is found by, beside the device; sizes go by powers of two."""
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
    """What is worth measuring for a shape: every ring, and splits around the guess."""
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


# Tokens of a tile and slots by head dim, the guess first: a tile of K and V of 32 KB takes an SM
# about 1700 cycles to load, longer than to compute with it, and two or three of them on their way
# are more than latency times bandwidth (32 KB an SM).
_RINGS = {
    64: ((128, 3), (128, 2), (64, 4), (64, 6), (128, 6)),
    128: ((64, 2), (64, 3), (64, 4), (64, 6), (128, 3)),
    256: ((64, 3), (64, 2)),
}


def _guess(tokens: int, slots: int, streams: int, head_dim: int, max_length: int) -> Tiles:
    """Splits for `streams` kv heads of sequences.

    Four blocks for each place on an SM, so that the last ones leave little idle. A split has eight
    tiles, beside which its result is small (3 %); fewer only where places would stay empty.
    """
    guess = Tiles(tokens, slots, splits=1)
    places = SMS * guess.blocks_per_sm(head_dim)
    tiles = -(-max_length // tokens)
    wanted, filling = -(-4 * places // streams), -(-places // streams)
    splits = max(1, min(wanted, max(tiles // 8, min(tiles // 2, filling))))
    return dataclasses.replace(guess, splits=splits)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()

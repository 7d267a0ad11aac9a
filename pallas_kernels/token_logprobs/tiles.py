"""Which hidden states the kernels support, and their tiles: measured, otherwise guessed."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import _tables

COMPUTE = 2  # computing warpgroups per block
ROWS = 64  # per warpgroup
BLOCK_ROWS = COMPUTE * ROWS
DEPTH = 64  # the part of D in a slot
_SMEM_BYTES = 227 * 1024 - 2048  # per block, less a little for barriers and padding


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes that affect speed, not results."""

    vocab_tile: int = 256  # ids whose products a block computes at a time
    slots: int = 4  # steps of D in flight
    splits: int = 1  # parts of the vocabulary, for different blocks


def obstacle(*, dim: int, dtype) -> str | None:
    """Why the kernels do not support such hidden states, or None."""
    name = jnp.dtype(dtype).name
    if name not in ('bfloat16', 'float16'):
        return f'hidden states must be bfloat16 or float16, not {name}'
    if dim % DEPTH:
        return f'hidden states must have a multiple of {DEPTH} dimensions, not {dim}'
    return None


def choose_tiles(part: str, *, rows: int, vocab: int, dim: int, dtype) -> Tiles:
    """The tiles measured on the target device, otherwise a guess.

    Args:
      part: 'forward' or 'backward'.
    """
    key = table_key(part, rows=rows, vocab=vocab, dim=dim, dtype=dtype)
    measured = _tables.look_up(__file__, **key)
    return Tiles(**measured) if measured else _guess(part, rows, vocab, dtype)


def table_key(part: str, *, rows: int, vocab: int, dim: int, dtype) -> dict:
    """The key of an entry of tiles.json, without the device; rows and ids go by powers of two."""
    return dict(
        part=part,
        dtype=jnp.dtype(dtype).name,
        rows=1 << (rows - 1).bit_length(),
        vocab=1 << (vocab - 1).bit_length(),
        dim=dim,
    )


def candidates(part: str, *, rows: int, vocab: int, dim: int, dtype) -> list[Tiles]:
    """Tiles worth measuring for a shape."""
    del dim  # affects only the number of steps
    guess = _guess(part, rows, vocab, dtype)
    found = {guess}
    for vocab_tile in (128, 256):
        if vocab % vocab_tile == 0:
            for slots in range(3, guess.slots + 1):
                for splits in {1, 2, 4, 8, guess.splits}:
                    found.add(Tiles(vocab_tile, slots, splits))
    return sorted(found, key=dataclasses.astuple)


def _guess(part: str, rows: int, vocab: int, dtype) -> Tiles:
    """The largest tile with little padding; splits that leave few processors idle."""
    itemsize = jnp.dtype(dtype).itemsize
    vocab_tile = min((256, 128, 64), key=lambda t: (vocab + -vocab % t > 1.1 * vocab, -t))
    if vocab % 256 and vocab % 128 == 0:
        vocab_tile = 128  # with 256, the weight would be copied to pad it
    slot = (BLOCK_ROWS + vocab_tile) * DEPTH * itemsize
    result = BLOCK_ROWS * vocab_tile * itemsize if part == 'backward' else 0
    slots = min((_SMEM_BYTES - result) // slot, 6)
    blocks, tiles = -(-rows // BLOCK_ROWS), -(-vocab // vocab_tile)
    processors = _processors()

    def waves(splits):
        return -(-blocks * splits // processors) * -(-tiles // splits)

    splits = min(range(1, min(tiles, 16) + 1), key=waves)
    return Tiles(vocab_tile, slots, splits)


def _processors() -> int:
    """Multiprocessors of the target GPU; those of an H100 or H200 if it is not described."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    return (described.num_cores if described else None) or 132

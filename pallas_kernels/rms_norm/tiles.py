"""How a block of threads covers rows and columns, and which shapes that supports.

A block is a warpgroup: 4 warps of 32 lanes. `warps` x `lanes` threads share a row, each with
`vector` neighbouring elements at a time; the other threads have other rows.
"""

import dataclasses

import jax.numpy as jnp

from pallas_kernels import _tables

DTYPES = ('bfloat16', 'float16', 'float32')
WIDEST = 16384
MULTIPROCESSORS = 132
# The most elements of an operand that a thread holds at once (backward has two operands). Speed is
# better up to EASILY_HELD.
HELD = {'forward': 64, 'backward': 40}
EASILY_HELD = 32
# Forward: so many that it hardly matters how many fit on a multiprocessor. Backward: only as many
# as fit in any case, because each writes a partial sum.
BLOCKS = {'forward': 16 * MULTIPROCESSORS, 'backward': 3 * MULTIPROCESSORS}


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Static choices of a launch."""

    vector: int  # elements that a thread loads at once
    lanes: int  # lanes of a warp that share a row
    warps: int  # warps that share a row
    groups: int  # rows of which a thread has a part
    columns: int  # columns of a row in registers at once
    blocks: int  # each takes every blocks-th group of rows

    @property
    def row_tile(self) -> int:
        """Rows that the threads of a block cover at once."""
        return (4 // self.warps) * (32 // self.lanes)

    @property
    def rows(self) -> int:
        """Rows per step of a block."""
        return self.row_tile * self.groups


def obstacle(*, width: int, dtype) -> str | None:
    """Why the kernels do not support rows of this width and dtype, or None."""
    name = jnp.dtype(dtype).name
    if name not in DTYPES:
        return f'arrays must be one of {", ".join(DTYPES)}, not {name}'
    if not 64 <= width <= WIDEST or width % 32:
        return f'rows must have 64 to {WIDEST} elements, a multiple of 32, not {width}'
    return None


def choose_tiles(part: str, *, rows: int, width: int, dtype) -> Tiles:
    """The tiles measured on the target device, otherwise a guess.

    Args:
      part: 'forward' or 'backward'.
    """
    measured = _tables.look_up(__file__, **table_key(part, rows=rows, width=width, dtype=dtype))
    return Tiles(**measured) if measured else _guess(part, rows, width, dtype)


def table_key(part: str, *, rows: int, width: int, dtype) -> dict:
    """The key of an entry of tiles.json, without the device; rows are rounded to a power of two."""
    return {
        'part': part,
        'dtype': jnp.dtype(dtype).name,
        'width': width,
        'rows': 1 << max(rows - 1, 0).bit_length(),
    }


def candidates(part: str, *, rows: int, width: int, dtype) -> list[Tiles]:
    """Tiles worth measuring for a shape: the guess and its neighbours."""
    guess = _guess(part, rows, width, dtype)
    tried = {guess}
    for vector, lanes, warps in _ways(width, jnp.dtype(dtype).itemsize):
        row_tile, most = (4 // warps) * (32 // lanes), HELD[part] * lanes * warps
        if vector < guess.vector:
            continue
        for groups in (1, 2, 4, 8):
            if groups * width > most or rows % (groups * row_tile):
                continue
            for blocks in (2, 3, 4, 8, 16):
                blocks *= MULTIPROCESSORS
                tried.add(Tiles(vector, lanes, warps, groups, width, blocks))
    return sorted(tried, key=dataclasses.astuple)


def _ways(width: int, itemsize: int):
    """Yields (vector, lanes, warps) that divide a row evenly."""
    for vector in (8, 4, 2, 1):
        for lanes in (32, 16, 8):
            for warps in (1, 2, 4):
                if vector * itemsize <= 16 and width % (vector * lanes * warps) == 0:
                    yield vector, lanes, warps


def _columns(width: int, unit: int, most: int) -> int:
    """The largest part of a row, in whole units, that divides it and is at most `most`."""
    units = width // unit
    fitting = [n for n in range(1, units + 1) if units % n == 0 and n * unit <= most]
    return unit * max(fitting, default=1)


def _guess(part: str, rows: int, width: int, dtype) -> Tiles:
    """Whole rows in registers where they fit, wide loads, as few warps as possible on a row."""
    held = HELD[part]

    def preference(way):
        vector, lanes, warps = way
        share = width // (lanes * warps)
        beyond = [max(share - most, 0) for most in (held, EASILY_HELD)]
        return *beyond, -vector, warps, -lanes

    vector, lanes, warps = min(_ways(width, jnp.dtype(dtype).itemsize), key=preference)
    columns = _columns(width, vector * lanes * warps, held * lanes * warps)
    row_tile = (4 // warps) * (32 // lanes)
    most = EASILY_HELD * lanes * warps // width
    # Rows that fill whole steps are not padded.
    groups = next((n for n in (8, 4, 2) if n <= most and rows % (n * row_tile) == 0), 1)
    return Tiles(vector, lanes, warps, groups, columns, BLOCKS[part])

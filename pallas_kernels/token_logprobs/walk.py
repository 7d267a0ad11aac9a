"""The walk over the vocabulary that both kernels share: rows times tiles of the weight.

A block has 128 rows of hidden states and a part of the vocabulary, which it walks tile by tile.
Two warpgroups compute, each its own 64 rows. A third copies what both read, 64 of D at a time, into
a ring of slots, and continues with the next tile while the others use the products of the last.
Blocks that run at the same time have different rows but the same tiles of the weight, so the weight
is read from memory once.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._compat import launch, operand, pl, plgpu
from pallas_kernels._padding import whole_tiles
from pallas_kernels.token_logprobs.tiles import (
    BLOCK_ROWS,
    COMPUTE,
    DEPTH,
    ROWS,
    Tiles,
    choose_tiles,
    obstacle,
)

LOG2E = math.log2(math.e)
_COPY = COMPUTE  # index of the warpgroup that copies


@dataclasses.dataclass(frozen=True)
class Walk:
    """Rows times tiles of the vocabulary, as both kernels compute them."""

    hidden: jax.Array  # [rows, D], whole blocks
    weight: jax.Array  # [vocab, D], whole tiles
    tiles: Tiles

    @classmethod
    def over(cls, part: str, hidden_MD, weight_VD, tiles: Tiles | None) -> 'Walk':
        (M, D), V = hidden_MD.shape, weight_VD.shape[0]
        if reason := obstacle(dim=D, dtype=hidden_MD.dtype):
            raise ValueError(f'token_logprobs: {reason}')
        shape = dict(rows=M, vocab=V, dim=D, dtype=hidden_MD.dtype)
        tiles = tiles or choose_tiles(part, **shape)
        return cls(
            whole_tiles(hidden_MD, BLOCK_ROWS, 0),
            whole_tiles(weight_VD.astype(hidden_MD.dtype), tiles.vocab_tile, 0),
            tiles,
        )

    @property
    def rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    @property
    def vocab_tile(self) -> int:
        return self.tiles.vocab_tile

    @property
    def _tiles_a_split(self) -> int:
        return pl.cdiv(self.vocab // self.vocab_tile, self.tiles.splits)

    @property
    def splits(self) -> int:
        """The number of splits, without empty ones."""
        return pl.cdiv(self.vocab // self.vocab_tile, self._tiles_a_split)

    def pad_rows(self, x_M):
        return whole_tiles(x_M, BLOCK_ROWS, 0)

    def launch(self, block, *, scratch_types: dict, **options):
        slots, dtype = self.tiles.slots, self.hidden.dtype
        ring = dict(
            hidden_smem=operand((slots, BLOCK_ROWS, DEPTH), dtype),
            weight_smem=operand((slots, self.vocab_tile, DEPTH), dtype),
            ready=plgpu.Barrier(num_arrivals=2, num_barriers=slots),
            free=plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=slots),
        )
        return launch(
            block,
            approx_math=True,
            scratch_types=ring | scratch_types,
            # The last axis varies fastest.
            grid=(self.splits, self.rows // BLOCK_ROWS),
            grid_names=('split', 'row'),
            num_threads=COMPUTE + 1,
            thread_name='warpgroup',
            **options,
        )

    def run(
        self,
        hidden_ref,
        weight_ref,
        compute,
        *,
        hidden_smem,
        weight_smem,
        ready,
        free,
        interpret: bool,
    ):
        """Runs compute(thread, its rows, each_tile) on each computing warpgroup.

        each_tile(use, carry) folds use(first id, products in registers, carry) over all tiles.
        """
        slots, depth = self.tiles.slots, self.hidden.shape[1] // DEPTH
        first_tile = lax.axis_index('split') * self._tiles_a_split
        count = jnp.minimum(self.vocab // self.vocab_tile - first_tile, self._tiles_a_split)
        first_row = lax.axis_index('row') * BLOCK_ROWS
        thread = lax.axis_index('warpgroup')

        def slot_of(step):
            return lax.rem(step, jnp.int32(slots))

        def copy():
            plgpu.set_max_registers(40, action='decrease')

            @pl.loop(0, count * depth)
            def _(step):
                slot = slot_of(step)
                tile = first_tile + lax.div(step, jnp.int32(depth))
                part = pl.ds(lax.rem(step, jnp.int32(depth)) * DEPTH, DEPTH)

                @pl.when(step >= slots)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                plgpu.copy_gmem_to_smem(
                    hidden_ref.at[pl.ds(first_row, BLOCK_ROWS), part],
                    hidden_smem.at[slot],
                    ready.at[slot],
                )
                plgpu.copy_gmem_to_smem(
                    weight_ref.at[pl.ds(tile * self.vocab_tile, self.vocab_tile), part],
                    weight_smem.at[slot],
                    ready.at[slot],
                )

        def release(step):
            """Releases a slot that a later step refills; nobody waits for the last slots."""

            @pl.when(step + slots < count * depth)
            def _():
                plgpu.barrier_arrive(free.at[slot_of(step)])

        def products_of(tile):
            start = tile * depth

            def scope(acc_ref):
                @pl.loop(0, depth)
                def _(index):
                    step = start + index
                    slot = slot_of(step)
                    plgpu.barrier_wait(ready.at[slot])
                    plgpu.wgmma(
                        acc_ref,
                        hidden_smem.at[slot, pl.ds(thread * ROWS, ROWS)],
                        weight_smem.at[slot].transpose((1, 0)),
                    )
                    # The previous product is done: its slot may be refilled.
                    plgpu.wgmma_wait(1)
                    pl.when(index > 0)(lambda: release(step - 1))

                return acc_ref[...]

            products = pl.run_scoped(scope, plgpu.ACC((ROWS, self.vocab_tile), jnp.float32))
            release(start + depth - 1)
            return products

        def each_tile(use, carry):
            def visit(tile, carry):
                return use((first_tile + tile) * self.vocab_tile, products_of(tile), carry)

            return lax.fori_loop(0, count, visit, carry)

        def work():
            plgpu.set_max_registers(232, action='increase')
            compute(thread, pl.ds(first_row + thread * ROWS, ROWS), each_tile)

        pl.when(thread == _COPY)(copy)
        pl.when(thread < COMPUTE)(work)


def own_ids(walk: Walk, targets_M, weight_VD, vocab_size: int, first_id):
    """Targets relative to the first row of the weight, and [1], the row where padding starts."""
    V = weight_VD.shape[0]
    limit = jnp.minimum(vocab_size - first_id, V)
    targets = (targets_M - first_id).astype(jnp.int32)
    # Rows that pad the last tile are not ids: those ids belong to the vocabulary's next part.
    targets = jnp.where(targets < V, targets, -1)
    return walk.pad_rows(targets), jnp.full((1,), limit, jnp.int32)


def load_row(ref, rows):
    """One value per row, straight from memory: each block reads it once."""
    return plgpu.load(ref.at[rows], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def broadcast(x, width: int):
    return lax.broadcast_in_dim(x, (ROWS, width), [0])


def ids_of(first, width: int):
    return first + plgpu.broadcasted_iota(jnp.int32, (ROWS, width), 1, layout=plgpu.Layout.WGMMA)


def cap(x, softcap: float):
    """The soft-cap by exp2, within 1e-6 of the cap: the tanh instruction is only within 5e-4."""
    if not softcap:
        return x
    return softcap - 2 * softcap / (1 + jnp.exp2(x * (2 * LOG2E / softcap)))

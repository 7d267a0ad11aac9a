"""Linear and cross-entropy on Hopper: one walk over the vocabulary, two things to do with it.

A block has 128 rows of hidden states and a part of the vocabulary, which it walks tile by tile.
Two warpgroups compute, each its own 64 rows; a third one copies what both read, 64 of D at a time,
into a ring of slots, and goes on with the next tile while the products of the last are used.
`forward` keeps a running maximum, sum and pick of each row in registers; `logit_gradients` makes
the same products again and writes their gradient. Blocks that run at the same time have other rows
and the same tiles of the weight: it is read from memory once.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _tables
from pallas_kernels._compat import launch, operand, pl, plgpu
from pallas_kernels._padding import whole_tiles

_LOG2E = math.log2(math.e)
_COMPUTE = 2  # warpgroups
_COPY = 2  # index of the third
_ROWS = 64  # of a warpgroup
_BLOCK_ROWS = _COMPUTE * _ROWS
_DEPTH = 64  # of D a slot
# Where a running maximum starts: finite, so that a row of nothing but padding has no NaN.
_LOWEST = -1e30
_SMEM_BYTES = 227 * 1024 - 2048  # a block may have; barriers and padding take a little


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes that change speed, not results."""

    vocab_tile: int = 256  # ids that a block has products of at a time
    slots: int = 4  # steps of D in flight
    splits: int = 1  # parts of the vocabulary, for blocks to work on at the same time

    @classmethod
    def for_shape(cls, kernel: str, rows: int, vocab: int, dim: int, dtype) -> 'Tiles':
        """What was measured best for such a shape, else a guess."""
        key = table_key(kernel, rows, vocab, dim, dtype)
        found = _tables.measured(__file__, **key)
        return cls(**found) if found else cls._guess(kernel, rows, vocab, jnp.dtype(dtype))

    @classmethod
    def _guess(cls, kernel: str, rows: int, vocab: int, dtype) -> 'Tiles':
        """The largest tile with little padding; splits that leave few processors idle."""
        vocab_tile = min((256, 128, 64), key=lambda t: (vocab + -vocab % t > 1.1 * vocab, -t))
        if vocab % 256 and vocab % 128 == 0:
            vocab_tile = 128  # the weight is copied to pad it
        slot = (_BLOCK_ROWS + vocab_tile) * _DEPTH * dtype.itemsize
        result = _BLOCK_ROWS * vocab_tile * dtype.itemsize if kernel == 'logit_gradients' else 0
        slots = min((_SMEM_BYTES - result) // slot, 6)
        blocks, tiles = pl.cdiv(rows, _BLOCK_ROWS), pl.cdiv(vocab, vocab_tile)
        processors = _processors()

        def waves(splits):
            return pl.cdiv(blocks * splits, processors) * pl.cdiv(tiles, splits)

        splits = min(range(1, min(tiles, 16) + 1), key=waves)
        return cls(vocab_tile, slots, splits)


def table_key(kernel: str, rows: int, vocab: int, dim: int, dtype) -> dict:
    """What tiles.json knows a shape by; rows and ids count by powers of two."""
    return dict(
        kernel=kernel,
        dtype=jnp.dtype(dtype).name,
        rows=1 << (rows - 1).bit_length(),
        vocab=1 << (vocab - 1).bit_length(),
        dim=dim,
    )


def candidates(kernel: str, rows: int, vocab: int, dim: int, dtype) -> list[Tiles]:
    """What is worth measuring for a shape."""
    guess = Tiles._guess(kernel, rows, vocab, jnp.dtype(dtype))
    found = {guess}
    for vocab_tile in (128, 256):
        if vocab % vocab_tile == 0:
            for slots in range(3, guess.slots + 1):
                for splits in {1, 2, 4, 8, guess.splits}:
                    found.add(Tiles(vocab_tile, slots, splits))
    return sorted(found, key=dataclasses.astuple)


def unsupported(hidden_dtype, dim: int) -> str | None:
    """Why the kernels cannot do it, if they cannot."""
    if hidden_dtype not in (jnp.bfloat16, jnp.float16):
        return f'it is for bfloat16 and float16, not {jnp.dtype(hidden_dtype).name}'
    if dim % _DEPTH:
        return f'the hidden states need a multiple of {_DEPTH} dimensions, not {dim}'
    return None


def forward(
    hidden_MD,
    weight_VD,
    targets_M,
    *,
    vocab_size: int,
    first_id=0,
    softcap: float = 0.0,
    tiles: Tiles | None = None,
    interpret: bool = False,
):
    """Log-sum-exp of each row's logits over these ids, and the logit of its target.

    Returns logsumexp [M] (-inf where all ids are padding) and picked [M] (0 where the target is not
    among these ids, -inf where it is padding), float32.

    Args:
      vocab_size: ids from here on are padding, of probability 0.
      first_id: the id of the weight's first row; may be traced.
      softcap: logits become cap * tanh(logits / cap); 0 is off.
    """
    walk = _Walk.over('forward', hidden_MD, weight_VD, tiles)
    targets, limit = _own_ids(walk, targets_M, weight_VD, vocab_size, first_id)
    layout = plgpu.Layout.WGMMA.reduce(1)

    def block(hidden_ref, weight_ref, targets_ref, limit_ref, sum_ref, picked_ref, **scratch):
        results_smem = scratch.pop('results_smem')

        def compute(thread, rows, each_tile):
            target = _load_row(targets_ref, rows)
            filled = lambda value: plgpu.layout_cast(jnp.full(_ROWS, value, jnp.float32), layout)  # noqa: E731

            def use(first, products, carry):
                largest, total, picked = carry
                logits = _capped(products, softcap)
                ids = _ids(first, walk.vocab_tile)
                logits = jnp.where(ids < limit_ref[0], logits, -jnp.inf)
                is_target = ids == _across(target, walk.vocab_tile)
                picked += jnp.sum(jnp.where(is_target, logits, 0.0), axis=1)
                new = jnp.maximum(largest, jnp.max(logits, axis=1))
                weights = jnp.exp2((logits - _across(new, walk.vocab_tile)) * _LOG2E)
                total = total * jnp.exp2((largest - new) * _LOG2E) + jnp.sum(weights, axis=1)
                return new, total, picked

            start = filled(_LOWEST), filled(0), filled(0)
            largest, total, picked = each_tile(use, start)
            results_smem[thread, 0] = jnp.where(total > 0, largest + jnp.log(total), -jnp.inf)
            results_smem[thread, 1] = picked
            plgpu.commit_smem()
            split = lax.axis_index('split')
            plgpu.copy_smem_to_gmem(results_smem.at[thread, 0], sum_ref.at[split, rows])
            plgpu.copy_smem_to_gmem(results_smem.at[thread, 1], picked_ref.at[split, rows])
            plgpu.wait_smem_to_gmem(0)

        walk.run(hidden_ref, weight_ref, compute, interpret=interpret, **scratch)

    partial = jax.ShapeDtypeStruct((walk.splits, walk.rows), jnp.float32)
    logsumexp, picked = walk.launch(
        block,
        interpret=interpret,
        out_type=(partial, partial),
        scratch_types=dict(results_smem=plgpu.SMEM((_COMPUTE, 2, _ROWS), jnp.float32)),
    )(walk.hidden, walk.weight, targets, limit)
    M = hidden_MD.shape[0]
    return jax.nn.logsumexp(logsumexp, axis=0)[:M], jnp.sum(picked, axis=0)[:M]


def logit_gradients(
    hidden_MD,
    weight_VD,
    targets_M,
    logsumexp_M,
    dpicked_M,
    dlogsumexp_M,
    *,
    vocab_size: int,
    first_id=0,
    softcap: float = 0.0,
    tiles: Tiles | None = None,
    interpret: bool = False,
):
    """The gradient of hidden @ weight' [M, V] in the dtype of the hidden states.

    Args:
      logsumexp_M: over the whole vocabulary, not over these ids alone.
      dpicked_M, dlogsumexp_M: gradients of the target's logit and of the log-sum-exp.
      vocab_size, first_id, softcap: as in `forward`.
    """
    walk = _Walk.over('logit_gradients', hidden_MD, weight_VD, tiles)
    targets, limit = _own_ids(walk, targets_M, weight_VD, vocab_size, first_id)
    vectors = [walk.pad_rows(x) for x in (logsumexp_M, dpicked_M, dlogsumexp_M)]
    dtype = hidden_MD.dtype

    def block(
        hidden_ref,
        weight_ref,
        targets_ref,
        logsumexp_ref,
        dpicked_ref,
        dlogsumexp_ref,
        limit_ref,
        out_ref,
        **scratch,
    ):
        out_smem = scratch.pop('out_smem')

        def compute(thread, rows, each_tile):
            target, logsumexp, dpicked, dlogsumexp = (
                _load_row(ref, rows)
                for ref in (targets_ref, logsumexp_ref, dpicked_ref, dlogsumexp_ref)
            )
            across = functools.partial(_across, width=walk.vocab_tile)

            def use(first, products, carry):
                logits = _capped(products, softcap)
                ids = _ids(first, walk.vocab_tile)
                gradients = across(dlogsumexp) * jnp.exp2((logits - across(logsumexp)) * _LOG2E)
                gradients += jnp.where(ids == across(target), across(dpicked), 0.0)
                if softcap:
                    gradients *= 1 - jnp.square(logits * (1 / softcap))
                gradients = jnp.where(ids < limit_ref[0], gradients, 0.0)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_smem[thread] = gradients.astype(dtype)
                plgpu.commit_smem()
                columns = pl.ds(first, walk.vocab_tile)
                plgpu.copy_smem_to_gmem(out_smem.at[thread], out_ref.at[rows, columns])
                return carry

            each_tile(use, ())
            plgpu.wait_smem_to_gmem(0)

        walk.run(hidden_ref, weight_ref, compute, interpret=interpret, **scratch)

    (gradients,) = walk.launch(
        block,
        interpret=interpret,
        out_type=(jax.ShapeDtypeStruct((walk.rows, walk.vocab), dtype),),
        scratch_types=dict(out_smem=operand((_COMPUTE, _ROWS, walk.vocab_tile), dtype)),
    )(walk.hidden, walk.weight, targets, *vectors, limit)
    return gradients[: hidden_MD.shape[0], : weight_VD.shape[0]]


@dataclasses.dataclass(frozen=True)
class _Walk:
    """Rows times tiles of the vocabulary: what both kernels have in common."""

    hidden: jax.Array  # [rows, D], whole blocks
    weight: jax.Array  # [vocab, D], whole tiles
    tiles: Tiles

    @classmethod
    def over(cls, kernel: str, hidden_MD, weight_VD, tiles: Tiles | None) -> '_Walk':
        (M, D), V = hidden_MD.shape, weight_VD.shape[0]
        if reason := unsupported(hidden_MD.dtype, D):
            raise ValueError(f'cross_entropy: {reason}')
        tiles = tiles or Tiles.for_shape(kernel, M, V, D, hidden_MD.dtype)
        return cls(
            whole_tiles(hidden_MD, _BLOCK_ROWS, 0),
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
        """No more than there is work for."""
        return pl.cdiv(self.vocab // self.vocab_tile, self._tiles_a_split)

    def pad_rows(self, x_M):
        return whole_tiles(x_M, _BLOCK_ROWS, 0)

    def launch(self, block, *, scratch_types: dict, **options):
        slots, dtype = self.tiles.slots, self.hidden.dtype
        ring = dict(
            hidden_smem=operand((slots, _BLOCK_ROWS, _DEPTH), dtype),
            weight_smem=operand((slots, self.vocab_tile, _DEPTH), dtype),
            ready=plgpu.Barrier(num_arrivals=2, num_barriers=slots),
            free=plgpu.Barrier(num_arrivals=_COMPUTE, num_barriers=slots),
        )
        return launch(
            block,
            approx_math=True,
            scratch_types=ring | scratch_types,
            # The last is the fastest to change.
            grid=(self.splits, self.rows // _BLOCK_ROWS),
            grid_names=('split', 'row'),
            num_threads=_COMPUTE + 1,
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
        """compute(thread, its rows, each_tile) on each of the warpgroups that compute.

        each_tile(use, carry) is use(first id, products in registers, carry) over all tiles.
        """
        slots, depth = self.tiles.slots, self.hidden.shape[1] // _DEPTH
        first_tile = lax.axis_index('split') * self._tiles_a_split
        count = jnp.minimum(self.vocab // self.vocab_tile - first_tile, self._tiles_a_split)
        first_row = lax.axis_index('row') * _BLOCK_ROWS
        thread = lax.axis_index('warpgroup')

        def slot_of(step):
            return lax.rem(step, jnp.int32(slots))

        def copy():
            plgpu.set_max_registers(40, action='decrease')

            @pl.loop(0, count * depth)
            def _(step):
                slot = slot_of(step)
                tile = first_tile + lax.div(step, jnp.int32(depth))
                part = pl.ds(lax.rem(step, jnp.int32(depth)) * _DEPTH, _DEPTH)

                @pl.when(step >= slots)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                plgpu.copy_gmem_to_smem(
                    hidden_ref.at[pl.ds(first_row, _BLOCK_ROWS), part],
                    hidden_smem.at[slot],
                    ready.at[slot],
                )
                plgpu.copy_gmem_to_smem(
                    weight_ref.at[pl.ds(tile * self.vocab_tile, self.vocab_tile), part],
                    weight_smem.at[slot],
                    ready.at[slot],
                )

        def release(step):
            """Only what is waited for: no step refills the last slots."""

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
                        hidden_smem.at[slot, pl.ds(thread * _ROWS, _ROWS)],
                        weight_smem.at[slot].transpose((1, 0)),
                    )
                    # The product before this one is done: its slot may be filled again.
                    plgpu.wgmma_wait(1)
                    pl.when(index > 0)(lambda: release(step - 1))

                return acc_ref[...]

            products = pl.run_scoped(scope, plgpu.ACC((_ROWS, self.vocab_tile), jnp.float32))
            release(start + depth - 1)
            return products

        def each_tile(use, carry):
            def visit(tile, carry):
                return use((first_tile + tile) * self.vocab_tile, products_of(tile), carry)

            return lax.fori_loop(0, count, visit, carry)

        def work():
            plgpu.set_max_registers(232, action='increase')
            compute(thread, pl.ds(first_row + thread * _ROWS, _ROWS), each_tile)

        pl.when(thread == _COPY)(copy)
        pl.when(thread < _COMPUTE)(work)


def _own_ids(walk: _Walk, targets_M, weight_VD, vocab_size: int, first_id):
    """Targets counted from the first row of the weight, and [1] where padding starts."""
    V = weight_VD.shape[0]
    limit = jnp.minimum(vocab_size - first_id, V)
    targets = (targets_M - first_id).astype(jnp.int32)
    # The rows that fill the last tile are no ids; the next part of the vocabulary has those.
    targets = jnp.where(targets < V, targets, -1)
    return walk.pad_rows(targets), jnp.full((1,), limit, jnp.int32)


def _load_row(ref, rows):
    """One value a row, straight from memory: it is read once a block."""
    return plgpu.load(ref.at[rows], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def _across(x, width: int):
    return lax.broadcast_in_dim(x, (_ROWS, width), [0])


def _ids(first, width: int):
    return first + plgpu.broadcasted_iota(jnp.int32, (_ROWS, width), 1, layout=plgpu.Layout.WGMMA)


def _capped(x, softcap: float):
    """By exp2, within 1e-6 of the cap: the instruction for tanh is within 5e-4."""
    if not softcap:
        return x
    return softcap - 2 * softcap / (1 + jnp.exp2(x * (2 * _LOG2E / softcap)))


def _processors() -> int:
    """Of the GPU that a program is made for; of an H100 or H200 where that is not said."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    return (described.num_cores if described else None) or 132

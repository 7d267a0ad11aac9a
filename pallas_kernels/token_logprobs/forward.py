"""The forward kernel: each row's running maximum, sum and target logit stay in registers."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._compat import plgpu
from pallas_kernels.token_logprobs.tiles import COMPUTE, ROWS, Tiles
from pallas_kernels.token_logprobs.walk import (
    LOG2E,
    Walk,
    broadcast,
    cap,
    ids_of,
    load_row,
    own_ids,
)

# The start of a running maximum: finite, so that a row with only padding gets no NaN.
_LOWEST = -1e30


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

    Returns logsumexp [M] (-inf if all ids are padding) and picked [M] (0 if the target is not among
    these ids, -inf if it is padding), float32.

    Args:
      vocab_size: ids from here on are padding, of probability 0.
      first_id: the id of the weight's first row; may be traced.
      softcap: logits become cap * tanh(logits / cap); 0 is off.
    """
    walk = Walk.over('forward', hidden_MD, weight_VD, tiles)
    targets, limit = own_ids(walk, targets_M, weight_VD, vocab_size, first_id)
    layout = plgpu.Layout.WGMMA.reduce(1)

    def block(hidden_ref, weight_ref, targets_ref, limit_ref, sum_ref, picked_ref, **scratch):
        results_smem = scratch.pop('results_smem')

        def compute(thread, rows, each_tile):
            target = load_row(targets_ref, rows)
            fill = lambda value: plgpu.layout_cast(jnp.full(ROWS, value, jnp.float32), layout)  # noqa: E731

            def use(first, products, carry):
                largest, total, picked = carry
                logits = cap(products, softcap)
                ids = ids_of(first, walk.vocab_tile)
                logits = jnp.where(ids < limit_ref[0], logits, -jnp.inf)
                is_target = ids == broadcast(target, walk.vocab_tile)
                picked += jnp.sum(jnp.where(is_target, logits, 0.0), axis=1)
                new = jnp.maximum(largest, jnp.max(logits, axis=1))
                weights = jnp.exp2((logits - broadcast(new, walk.vocab_tile)) * LOG2E)
                total = total * jnp.exp2((largest - new) * LOG2E) + jnp.sum(weights, axis=1)
                return new, total, picked

            start = fill(_LOWEST), fill(0), fill(0)
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
        scratch_types=dict(results_smem=plgpu.SMEM((COMPUTE, 2, ROWS), jnp.float32)),
    )(walk.hidden, walk.weight, targets, limit)
    M = hidden_MD.shape[0]
    return jax.nn.logsumexp(logsumexp, axis=0)[:M], jnp.sum(picked, axis=0)[:M]

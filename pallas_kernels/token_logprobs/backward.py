"""The backward kernel: recomputes the products of the forward kernel and writes their gradient.

From that, XLA computes the gradients of the hidden states and of the weight.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels._compat import operand, pl, plgpu
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


def backward(
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
      logsumexp_M: over the whole vocabulary, not only over these ids.
      dpicked_M, dlogsumexp_M: gradients of the target's logit and of the log-sum-exp.
      vocab_size, first_id, softcap: as in `forward`.
    """
    walk = Walk.over('backward', hidden_MD, weight_VD, tiles)
    targets, limit = own_ids(walk, targets_M, weight_VD, vocab_size, first_id)
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
                load_row(ref, rows)
                for ref in (targets_ref, logsumexp_ref, dpicked_ref, dlogsumexp_ref)
            )
            across = functools.partial(broadcast, width=walk.vocab_tile)

            def use(first, products, carry):
                logits = cap(products, softcap)
                ids = ids_of(first, walk.vocab_tile)
                gradients = across(dlogsumexp) * jnp.exp2((logits - across(logsumexp)) * LOG2E)
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
        scratch_types=dict(out_smem=operand((COMPUTE, ROWS, walk.vocab_tile), dtype)),
    )(walk.hidden, walk.weight, targets, *vectors, limit)
    return gradients[: hidden_MD.shape[0], : weight_VD.shape[0]]

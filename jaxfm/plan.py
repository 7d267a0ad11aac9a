"""What a resolved config will need: parameters, FLOPs, bytes. Nothing here allocates."""

import math

import jax

from jaxfm.models import BlockConfig, TransformerConfig


def visible_keys(length: int, window: int, causal: bool) -> float:
    """Keys a query sees on average in a document of `length` tokens.

    Causal counts half of the square, as the field does: length / 2. Not causal is the other common
    convention, in which masked products count too.
    """
    reach = min(window, length) if window else length
    if not causal:
        return float(reach)
    # Below the diagonal: a triangle until the window is full, then a band.
    return reach - reach * reach / (2 * length)


def _block_matmul_params(block: BlockConfig, embed_dim: int) -> int:
    heads = 2 * block.num_heads + 2 * block.num_kv_heads
    mlp = (3 if block.gated else 2) * block.mlp_dim
    return embed_dim * (heads * block.head_dim + mlp)


def model_flops_per_token(config: TransformerConfig, length: int, causal: bool = True) -> float:
    """FLOPs of training on one token: forward and twice that backward, no recomputation.

    Counts matmuls alone: the weights that multiply (the output projection too, the embedding look-up
    not) and attention's two products over the visible keys of documents of `length` tokens.
    """
    matmul_params = config.padded_vocab_size * config.embed_dim
    attention = 0.0
    for segment in config.trunk:
        for block in segment.pattern:
            matmul_params += segment.repeats * _block_matmul_params(block, config.embed_dim)
            width = block.num_heads * block.head_dim
            keys = visible_keys(length, block.window, causal)
            attention += segment.repeats * 4 * width * keys
    return 3 * (2 * matmul_params + attention)


def num_parameters(shapes: dict[str, jax.ShapeDtypeStruct]) -> int:
    """Elements of all parameters."""
    return sum(math.prod(leaf.shape) for leaf in shapes.values())


def bytes_per_device(tree) -> int:
    """Bytes of a tree of arrays or ShapeDtypeStructs on the fullest device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def bytes_total(tree) -> int:
    """Bytes of one copy of a tree: what a checkpoint holds."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def human_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ('B', 'KiB', 'MiB', 'GiB'):
        if count < 1024:
            return f'{count:.4g} {unit}'
        count /= 1024
    return f'{count:.4g} TiB'

"""FLOPs of training on one token, counted from the config of a model."""

from jaxfm.models import BlockConfig, TransformerConfig
from jaxfm.optim.rules import is_vector


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


def _block_matmul_params(block: BlockConfig, config: TransformerConfig) -> int:
    heads, kv_heads = (n * block.head_dim for n in (block.num_heads, block.num_kv_heads))
    matrices = [  # the name that adapters know it by, inputs, outputs
        ('attention/q', config.embed_dim, heads),
        ('attention/k', config.embed_dim, kv_heads),
        ('attention/v', config.embed_dim, kv_heads),
        ('attention/out', heads, config.embed_dim),
        *[('mlp/gate_up', config.embed_dim, block.mlp_dim)] * (2 if block.gated else 1),
        ('mlp/down', block.mlp_dim, config.embed_dim),
    ]
    count = sum(inputs * outputs for _, inputs, outputs in matrices)
    if config.lora is None:
        return count
    adapted = [sides for name, *sides in matrices if name in config.lora.matrices]
    return count + config.lora.rank * sum(map(sum, adapted))


def model_flops_per_token(
    config: TransformerConfig, length: int, causal: bool = True, frozen: int = 0
) -> float:
    """FLOPs of training on one token: forward and twice that backward, no recomputation.

    Counts matmuls alone: the weights that multiply (the output projection too, not the embedding
    look-up) and attention's two products over the visible keys of documents of `length` tokens.
    The gradient of a frozen weight is not computed, that of every activation is.

    Args:
      frozen: elements of the weights that multiply and are not trained (`frozen_matmul_params`).
    """
    matmul_params = config.padded_vocab_size * config.embed_dim
    attention = 0.0
    for segment in config.trunk:
        for block in segment.pattern:
            matmul_params += segment.repeats * _block_matmul_params(block, config)
            width = block.num_heads * block.head_dim
            keys = visible_keys(length, block.window, causal)
            attention += segment.repeats * 4 * width * keys
    return 3 * (2 * matmul_params + attention) - 2 * frozen


def frozen_matmul_params(parts) -> int:
    """Elements of the weights that multiply and are not trained; a look-up is no product."""
    tied = 'head/table' not in parts.shapes
    return sum(
        leaf.size
        for path, leaf in parts.shapes.items()
        if not is_vector(parts.axes[path])
        and path not in parts.trainable
        and (tied or path != 'embedding/table')
    )

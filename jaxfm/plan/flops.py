"""Model FLOPs of training and of forward passes, computed from a model's config."""

from jaxfm.models import BlockConfig, TransformerConfig
from jaxfm.optim.rules import is_vector


def visible_keys(length: int, window: int, causal: bool) -> float:
    """The average number of keys that a query attends to in a document of `length` tokens.

    window: of sliding-window attention, in tokens; 0 means none. causal: count half of the square,
    length / 2 without a window, as is usual. causal=False is the other common convention, which
    counts masked products too.
    """
    reach = min(window, length) if window else length
    if not causal:
        return float(reach)
    # The visible area: a triangle until the window is full, then a band.
    return reach - reach * reach / (2 * length)


def _block_matmul_params(block: BlockConfig, config: TransformerConfig) -> int:
    heads, kv_heads = (n * block.head_dim for n in (block.num_heads, block.num_kv_heads))
    matrices = [  # (name in the LoRA config, inputs, outputs)
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
    """Training FLOPs per token: the forward pass, twice that backward, and no recomputation.

    Only matmuls count: all weight matrices, including the output projection but not the embedding
    look-up, and attention's two products over the visible keys of documents of `length` tokens.
    Gradients are computed for all activations, but not for frozen weights.

    Args:
      length: tokens of a document.
      causal: as in `visible_keys`.
      frozen: number of elements of frozen weight matrices, from `frozen_matmul_params`.
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


def forward_flops(config: TransformerConfig, length: int) -> float:
    """Model FLOPs of a forward pass over a document of `length` tokens; attention counts half.

    What tokens add behind others whose keys and values are kept is a difference of two lengths.
    """
    return model_flops_per_token(config, length) / 3 * length if length else 0.0


def frozen_matmul_params(parts) -> int:
    """The number of elements of frozen weight matrices, without an untied embedding."""
    tied = 'head/table' not in parts.shapes
    return sum(
        leaf.size
        for path, leaf in parts.shapes.items()
        if not is_vector(parts.axes[path])
        and path not in parts.trainable
        and (tied or path != 'embedding/table')
    )

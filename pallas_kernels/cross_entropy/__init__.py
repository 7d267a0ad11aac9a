"""Cross-entropy of hidden states through an unembedding, without the logits in memory."""

from pallas_kernels.cross_entropy.kernels import (
    Tiles,
    candidates,
    forward,
    logit_gradients,
    table_key,
    unsupported,
)

__all__ = ['Tiles', 'candidates', 'forward', 'logit_gradients', 'table_key', 'unsupported']

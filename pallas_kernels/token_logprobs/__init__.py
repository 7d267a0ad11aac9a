"""Log-sum-exp and target logits of hidden states, with gradients, never holding all logits."""

from pallas_kernels.token_logprobs import reference
from pallas_kernels.token_logprobs.backward import backward
from pallas_kernels.token_logprobs.forward import forward
from pallas_kernels.token_logprobs.tiles import candidates, choose_tiles, obstacle, table_key

__all__ = [
    'backward',
    'candidates',
    'choose_tiles',
    'forward',
    'obstacle',
    'reference',
    'table_key',
]

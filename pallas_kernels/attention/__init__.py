"""Attention with soft-cap, window and packed documents, which never materialises the scores."""

from pallas_kernels.attention import reference
from pallas_kernels.attention.backward import backward
from pallas_kernels.attention.forward import forward
from pallas_kernels.attention.tiles import candidates, choose_tiles, obstacle, table_key

__all__ = [
    'backward',
    'candidates',
    'choose_tiles',
    'forward',
    'obstacle',
    'reference',
    'table_key',
]

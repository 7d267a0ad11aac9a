"""Root mean square norm with an optional residual: one pass over the rows, forward and backward."""

from pallas_kernels.rms_norm import reference
from pallas_kernels.rms_norm.backward import backward
from pallas_kernels.rms_norm.forward import forward
from pallas_kernels.rms_norm.tiles import candidates, choose_tiles, obstacle, table_key

__all__ = [
    'backward',
    'candidates',
    'choose_tiles',
    'forward',
    'obstacle',
    'reference',
    'table_key',
]

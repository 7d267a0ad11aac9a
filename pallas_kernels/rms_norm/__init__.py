"""Root mean square norm with an optional residual: one pass over the rows, forward and backward."""

from pallas_kernels.rms_norm.backward import backward
from pallas_kernels.rms_norm.forward import forward
from pallas_kernels.rms_norm.tiles import Tiles, candidates, obstacle, table_key

__all__ = ['Tiles', 'backward', 'candidates', 'forward', 'obstacle', 'table_key']

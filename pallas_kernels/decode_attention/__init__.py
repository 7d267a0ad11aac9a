"""Decode attention: one query a sequence over paged keys and values."""

from pallas_kernels.decode_attention import reference
from pallas_kernels.decode_attention.kernel import forward, merge, obstacle
from pallas_kernels.decode_attention.tiles import Tiles, candidates, table_key

__all__ = ['Tiles', 'candidates', 'forward', 'merge', 'obstacle', 'reference', 'table_key']

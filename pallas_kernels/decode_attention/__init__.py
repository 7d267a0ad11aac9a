"""Decode attention: one query per sequence over paged keys and values."""

from pallas_kernels.decode_attention import reference
from pallas_kernels.decode_attention.forward import forward
from pallas_kernels.decode_attention.tiles import candidates, choose_tiles, obstacle, table_key

__all__ = ['candidates', 'choose_tiles', 'forward', 'obstacle', 'reference', 'table_key']

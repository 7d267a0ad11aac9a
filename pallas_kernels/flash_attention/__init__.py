"""Attention with soft-cap, window and packed documents, which never holds the scores."""

from pallas_kernels.flash_attention.backward import backward as backward
from pallas_kernels.flash_attention.forward import forward as forward
from pallas_kernels.flash_attention.forward import obstacle as obstacle

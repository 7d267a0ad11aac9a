"""Checks and benchmarks that need a GPU: kernels, training, decoding, determinism."""

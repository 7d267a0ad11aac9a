"""What only a GPU can prove: kernels right and fast, training, decoding, equal bits."""

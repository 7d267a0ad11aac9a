"""Pallas GPU kernels, each in its own folder with a reference; imports only jax."""

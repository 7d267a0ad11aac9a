"""Packing: which tokens go into which row of a batch."""

"""Packing: which tokens stand in which row of a batch."""

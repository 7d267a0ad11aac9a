"""Counts elements and bytes of parameters and states from their shapes; allocates nothing."""

import math

import jax


def num_parameters(shapes: dict[str, jax.ShapeDtypeStruct]) -> int:
    """The number of elements of all parameters."""
    return sum(math.prod(leaf.shape) for leaf in shapes.values())


def bytes_per_device(tree) -> int:
    """The bytes that a tree of arrays or ShapeDtypeStructs takes on each device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def bytes_total(tree) -> int:
    """The bytes of one unsharded copy of a tree: the size of a checkpoint."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

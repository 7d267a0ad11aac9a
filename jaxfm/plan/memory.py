"""Elements and bytes of parameters and states, counted from shapes; nothing here allocates."""

import math

import jax


def num_parameters(shapes: dict[str, jax.ShapeDtypeStruct]) -> int:
    """Elements of all parameters."""
    return sum(math.prod(leaf.shape) for leaf in shapes.values())


def bytes_per_device(tree) -> int:
    """Bytes of a tree of arrays or ShapeDtypeStructs on the fullest device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def bytes_total(tree) -> int:
    """Bytes of one copy of a tree: what a checkpoint holds."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

"""Decides which update rule a parameter follows, and the weight decay common to all optimizers.

The decision uses a parameter's logical axes, never its rank: stacked vectors are not a matrix.
"""

import optax


def is_vector(axes) -> bool:
    """Whether a parameter is a norm scale or a bias: no embed axis, and not part of an adapter."""
    return 'embed' not in axes and 'lora' not in axes


def is_hidden_matrix(axes) -> bool:
    """Whether a parameter is a matrix inside a block: not a vector, embedding, head or adapter."""
    return 'embed' in axes and not {'vocab', 'lora'} & set(axes)


def decay_matrices(weight_decay: float, axes) -> optax.GradientTransformation:
    """An optax transform that adds weight_decay * weight to the update of every matrix."""

    def mask(params):
        return {path: not is_vector(axes[path]) for path in params}

    return optax.add_decayed_weights(weight_decay, mask) if weight_decay else optax.identity()

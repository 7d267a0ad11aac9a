"""Which rule a parameter follows, and the weight decay that all optimizers share.

Rules come from the logical axes of a parameter, never from its rank: a stacked vector is no matrix.
"""

import optax


def is_vector(axes) -> bool:
    """Norm scales and biases: what has no embed axis and is no half of an adapter."""
    return 'embed' not in axes and 'lora' not in axes


def is_hidden_matrix(axes) -> bool:
    """A matrix that maps between hidden activations: not a vector, embedding, head or adapter."""
    return 'embed' in axes and not {'vocab', 'lora'} & set(axes)


def decay_matrices(weight_decay: float, axes) -> optax.GradientTransformation:
    """Adds weight_decay x weight to the update of every matrix."""

    def mask(params):
        return {path: not is_vector(axes[path]) for path in params}

    return optax.add_decayed_weights(weight_decay, mask) if weight_decay else optax.identity()

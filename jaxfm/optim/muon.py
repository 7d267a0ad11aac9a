"""Muon for the matrices inside blocks, each orthogonalised separately; AdamW for the rest."""

import functools

import jax
import jax.numpy as jnp
import optax

from jaxfm import sharding
from jaxfm.optim.adamw import AdamW
from jaxfm.optim.rules import decay_matrices, is_hidden_matrix

# Newton-Schulz coefficients of Jordan et al., "Muon" (2024): they bring all singular values near 1.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
# Axes along which a parameter stacks several matrices. q, k and v are separate parameters anyway.
_STACK_AXES = ('layers', 'gate_up')


class Muon(AdamW):
    """Muon (Jordan et al., 2024) for the matrices inside blocks, AdamW for everything else.

    The update of a matrix is its orthogonalised momentum times sqrt(max(1, outputs / inputs)).
    """

    def rule(self, path, axes):
        if not is_hidden_matrix(axes):
            return super().rule(path, axes)
        return f'muon, decay {self.config.weight_decay:g}'

    def _transform(self, axes):
        config = self.config
        muon = optax.chain(
            optax.trace(config.momentum, config.nesterov, jnp.dtype(config.moment_dtype)),
            _orthogonalize_matrices(axes, config.newton_schulz_steps),
            decay_matrices(config.weight_decay, axes),
            # The caller multiplies by the AdamW learning rate; both follow the same schedule.
            optax.scale(config.muon_learning_rate / config.learning_rate),
        )
        labels = {path: 'muon' if is_hidden_matrix(axes[path]) else 'adamw' for path in axes}
        return optax.partition({'muon': muon, 'adamw': self._adamw(axes)}, labels)


def _orthogonalize_matrices(axes, steps: int) -> optax.GradientTransformation:
    def update(updates, state, params=None):
        del params
        # optax.partition hides the parameters of other rules as MaskedNode.
        is_masked = lambda leaf: isinstance(leaf, optax.MaskedNode)  # noqa: E731
        return {
            path: leaf if is_masked(leaf) else orthogonalize_parameter(leaf, axes[path], steps)
            for path, leaf in updates.items()
        }, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def orthogonalize_parameter(update, axes, steps: int):
    """Orthogonalises every matrix of a parameter.

    The embed axis is one side of the matrix, and the other axes, flattened, are the other side.
    Each matrix is gathered onto its devices; stacked layers are spread over the `fsdp` axis if
    their number is divisible by it.
    """
    matrix_axes = [name for name in axes if name not in _STACK_AXES]
    order = [i for i, name in enumerate(axes) if name in _STACK_AXES]
    rest = [i for i, name in enumerate(axes) if name not in _STACK_AXES]
    stack_shape = tuple(update.shape[i] for i in order)
    whole = sharding.place_matrices(update, axes)
    moved = jnp.transpose(whole, order + rest)
    rows = 1  # number of inputs: embed if it is the first axis, else all axes before it
    split = 1 if matrix_axes[0] == 'embed' else len(matrix_axes) - 1
    for size in moved.shape[len(order) :][:split]:
        rows *= size
    matrices = jnp.reshape(moved, stack_shape + (rows, -1))
    scale = max(1.0, matrices.shape[-1] / matrices.shape[-2]) ** 0.5
    function = functools.partial(newton_schulz, steps=steps)
    for _ in order:
        function = jax.vmap(function)
    result = jnp.reshape(function(matrices) * scale, moved.shape)
    inverse = sorted(range(len(axes)), key=(order + rest).__getitem__)
    result = jnp.transpose(result, inverse).astype(update.dtype)
    return sharding.place_stored_matrices(result, axes)


def newton_schulz(matrix, steps: int):
    """Approximates the nearest semi-orthogonal matrix, by the quintic NEWTON_SCHULZ in float32."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).astype(jnp.float32)
    x = x / (jnp.linalg.norm(x) + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.T if tall else x

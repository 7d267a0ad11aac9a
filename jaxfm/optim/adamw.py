"""AdamW as an optax chain, over parameters in a flat dict {path: array}."""

import jax.numpy as jnp
import optax

from jaxfm.optim.rules import decay_matrices, is_vector
from jaxfm.optim.schedule import make_schedule


class AdamW:
    """AdamW (Loshchilov and Hutter, 2019), with weight decay on matrices only.

    `transform` gives the update direction, which the caller multiplies by -schedule(number of
    updates). `rules` is {path: description of the rule}, for the start-up table.

    Args:
      config: an OptimizerConfig.
      steps: of the phase, for the schedule.
      axes: {path: logical axes} of the trainable parameters.
    """

    def __init__(self, config, steps: int, axes: dict[str, tuple[str, ...]]):
        self.config = config
        self.schedule = make_schedule(config, steps)
        self.rules = {path: self.rule(path, names) for path, names in axes.items()}
        self.transform = self._transform(axes)

    def rule(self, path: str, axes) -> str:
        """A short description of the rule for one parameter."""
        decays = self.config.weight_decay and not is_vector(axes)
        return f'adamw, decay {self.config.weight_decay:g}' if decays else 'adamw, no decay'

    def _transform(self, axes) -> optax.GradientTransformation:
        return self._adamw(axes)

    def _adamw(self, axes) -> optax.GradientTransformation:
        config = self.config
        return optax.chain(
            optax.scale_by_adam(
                config.b1, config.b2, config.eps, mu_dtype=jnp.dtype(config.moment_dtype)
            ),
            decay_matrices(config.weight_decay, axes),
        )

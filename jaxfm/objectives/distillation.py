"""Distillation: the student's distributions become those of a teacher.

What tokens they are compared on is the source's choice: documents, the student's own samples, or
both in turn. The loss of the positions that loss_mask selects is that of TRL's GKDTrainer (1.16).
"""

import jax.numpy as jnp
from jax import lax

from jaxfm.objectives import DistillationConfig
from jaxfm.ops.divergence import divergence
from jaxfm.ops.logprobs import token_logprobs


class Distillation:
    """The objective of distillation. The train step gives it the teacher, a model like the student.

    Sums and weights, as in `NextToken`.
    """

    def __init__(self, config: DistillationConfig):
        self.config = config
        self.coefficients = {'distillation': 1.0}
        if config.hard:
            self.coefficients['hard'] = config.hard

    def weights(self, batch) -> dict:
        """{term: number of target tokens in the global batch}."""
        return dict.fromkeys(self.coefficients, jnp.sum(batch['loss_mask']))

    def __call__(self, model, batch, rng, teacher):
        """-> ({term: sum over tokens}, {metric: (sum, weight)}, {buffer: new value})."""
        del rng  # this objective uses no randomness
        config, mask_BT = self.config, batch['loss_mask']
        inputs = batch['tokens'], batch['positions'], batch['segment_ids']
        hidden_BTD, unembed = model(*inputs)[0], model.unembed()
        teacher_BTE = lax.stop_gradient(teacher(*inputs)[0])
        values_BT, mass_BT = divergence(
            hidden_BTD,
            unembed,
            teacher_BTE,
            teacher.unembed(),
            beta=config.beta,
            temperature=config.temperature,
            top_k=config.top_k,
        )
        sums, metrics = {'distillation': jnp.sum(values_BT * mask_BT)}, {}
        if config.top_k:
            metrics['teacher_mass'] = jnp.sum(mass_BT * mask_BT), jnp.sum(mask_BT)
        if config.hard:
            logprobs_BT, _ = token_logprobs(hidden_BTD, unembed, batch['targets'])
            sums['hard'] = -jnp.sum(logprobs_BT * mask_BT)
        return sums, metrics, {}

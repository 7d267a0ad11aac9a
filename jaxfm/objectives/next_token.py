"""Next-token cross-entropy, summed over the positions that loss_mask selects."""

import jax.numpy as jnp

from jaxfm.objectives import NextTokenConfig
from jaxfm.ops.logprobs import token_logprobs


class NextToken:
    """The objective of pre-training and SFT.

    It returns sums and weights, never means, so gradient accumulation and packing are exact.
    """

    def __init__(self, config: NextTokenConfig):
        self.coefficients = {'next_token': 1.0}
        if config.z_loss:
            self.coefficients['z_loss'] = config.z_loss

    def weights(self, batch) -> dict:
        """{term: number of target tokens in the global batch}."""
        tokens = jnp.sum(batch['loss_mask'])
        return dict.fromkeys(self.coefficients, tokens)

    def __call__(self, model, batch, rng):
        """-> ({term: sum over tokens}, {metric: (sum, weight)}, {buffer: new value})."""
        del rng  # this objective uses no randomness
        mask_BT = batch['loss_mask']
        hidden_BTD, _ = model(batch['tokens'], batch['positions'], batch['segment_ids'])
        logprobs_BT, logsumexp_BT = token_logprobs(hidden_BTD, model.unembed(), batch['targets'])
        sums = {'next_token': -jnp.sum(logprobs_BT * mask_BT)}
        if 'z_loss' in self.coefficients:
            sums['z_loss'] = jnp.sum(jnp.square(logsumexp_BT) * mask_BT)
        return sums, {}, {}

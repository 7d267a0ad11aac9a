"""Policy gradient: raises the log-probs of samples with a positive advantage, lowers the others'.

One objective with parts. GRPO, DAPO, GSPO and the others are presets of them
(`jaxfm.objectives`). The batch has, besides tokens and targets, for each target that a sample
consists of (loss_mask 1), all [B, T]:

    advantages           the advantage of its sample
    lengths              how many tokens its sample has
    sampler_logprobs     its log-prob under the policy that sampled it
    old_logprobs         the same, computed by the trainer (old_logprobs='recomputed')
    reference_logprobs   its log-prob under the reference (kl > 0)

A sample is a segment of a row; it may begin with a prompt, whose targets have the loss_mask 0.

Losses and gradients are those of TRL's GRPOTrainer and RLOOTrainer (1.16). Two keys mean something
else there: for CISPO, TRL's `epsilon_high` is our 1 + clip_high, as in the paper; for RLOO, TRL's
`beta` subtracts the KL from the rewards, our `kl` is a term of the loss.
"""

import jax
import jax.numpy as jnp

from jaxfm.objectives import PolicyGradientConfig
from jaxfm.objectives.metrics import Largest, Quantiles
from jaxfm.ops.logprobs import entropy, token_logprobs
from jaxfm.ops.segments import segment_sums


class PolicyGradient:
    """The objective of reinforcement learning.

    Its loss is negative where raising log-probs pays; the value means little, its gradient is the
    policy gradient.
    """

    def __init__(self, config: PolicyGradientConfig):
        self.config = config
        self.coefficients = {'policy': 1.0}
        if config.kl:
            self.coefficients['kl'] = config.kl
        if config.entropy:
            self.coefficients['entropy'] = -config.entropy

    def weights(self, batch) -> dict:
        """{term: number of tokens, or of samples, in the global batch}."""
        tokens = jnp.sum(batch['loss_mask'])
        # The fractions of a sample add up to 1, but for their rounding.
        samples = jnp.round(jnp.sum(_shares(batch)))
        of_policy = tokens if self.config.aggregation == 'token' else samples
        weights = {'policy': of_policy, 'kl': of_policy, 'entropy': tokens}
        return {term: weights[term] for term in self.coefficients}

    def __call__(self, model, batch, rng):
        """-> ({term: sum over tokens}, {metric: what it is made of}, {buffer: new value})."""
        del rng  # this objective uses no randomness
        hidden_BTD, _ = model(batch['tokens'], batch['positions'], batch['segment_ids'])
        unembed = model.unembed()
        logprobs_BT, _ = token_logprobs(hidden_BTD, unembed, batch['targets'])
        sums, metrics = self.terms(logprobs_BT, batch)
        if self.config.entropy:
            sums['entropy'] = jnp.sum(entropy(hidden_BTD, unembed) * batch['loss_mask'])
        return sums, metrics, {}

    def terms(self, logprobs_BT, batch) -> tuple[dict, dict]:
        """The sums and metrics that need the policy's log-probs [B, T] alone."""
        config, mask_BT = self.config, batch['loss_mask']

        def of_samples(values_BT):
            return jnp.where(mask_BT > 0, values_BT, 0.0)  # elsewhere they may be anything

        logprobs_BT = of_samples(logprobs_BT)
        sampler_BT = of_samples(batch['sampler_logprobs'])
        is_recomputed = config.old_logprobs == 'recomputed'
        old_BT = of_samples(batch['old_logprobs']) if is_recomputed else sampler_BT
        ratio_BT = jnp.exp(self._per(config.ratio, logprobs_BT - old_BT, batch))
        gains_BT, clipped_BT = self._gains(ratio_BT, logprobs_BT, of_samples(batch['advantages']))
        if config.importance != 'none':
            gains_BT *= self._importance(old_BT - sampler_BT, batch)
        weight_BT = self._token_weights(batch)
        sums = {'policy': -jnp.sum(gains_BT * weight_BT)}
        metrics = _compare(logprobs_BT, sampler_BT, mask_BT)
        metrics['clip_fraction'] = _mean(clipped_BT, mask_BT)
        if config.kl:
            reference_BT = of_samples(batch['reference_logprobs'])
            kl_BT = _divergence(logprobs_BT, reference_BT, config.kl_estimator)
            if config.kl_weighted:
                kl_BT *= ratio_BT
            sums['kl'] = jnp.sum(kl_BT * weight_BT)
            metrics['reference_kl'] = _mean(_divergence(logprobs_BT, reference_BT, 'k3'), mask_BT)
        return sums, metrics

    def _gains(self, ratio_BT, logprobs_BT, advantages_BT):
        """-> what each token adds to the objective, and whether its ratio was cut."""
        config, high = self.config, 1 + self.config.clip_high
        if config.clip == 'none':
            return ratio_BT * advantages_BT, jnp.zeros_like(ratio_BT)
        if config.clip == 'cispo':
            weight_BT = jax.lax.stop_gradient(jnp.minimum(ratio_BT, high))
            return weight_BT * advantages_BT * logprobs_BT, ratio_BT > high
        low = 1 - config.clip_low
        clipped_BT = jnp.clip(ratio_BT, low, high) * advantages_BT
        is_cut_BT = ((ratio_BT > high) & (advantages_BT > 0)) | (
            (ratio_BT < low) & (advantages_BT < 0)
        )
        if config.dual_clip:
            is_cut_BT |= (ratio_BT > config.dual_clip) & (advantages_BT < 0)
            ratio_BT = jnp.minimum(ratio_BT, config.dual_clip)
        return jnp.minimum(ratio_BT * advantages_BT, clipped_BT), is_cut_BT

    def _importance(self, log_ratio_BT, batch):
        """The weight of each token, from the batch alone, so it has no gradient."""
        config = self.config
        weight_BT = jnp.exp(self._per(config.importance_level, log_ratio_BT, batch))
        if config.importance == 'truncate':
            return jnp.minimum(weight_BT, config.importance_cap)
        is_inside = (weight_BT >= config.importance_floor) & (weight_BT <= config.importance_cap)
        return jnp.where(is_inside, weight_BT, 0.0)

    def _per(self, level: str, values_BT, batch):
        """Values of tokens -> themselves, or their sum or mean over the sample."""
        if level == 'token':
            return values_BT
        sums_BT = segment_sums(values_BT, batch['segment_ids'])
        if level == 'sequence_mean':
            sums_BT /= jnp.maximum(batch['lengths'], 1)
        return jnp.where(batch['loss_mask'] > 0, sums_BT, 0.0)  # a prompt has no length

    def _token_weights(self, batch):
        config = self.config
        if config.aggregation == 'sequence':
            return _shares(batch)
        length = config.length if config.aggregation == 'sum' else 1
        return batch['loss_mask'] / length


def _shares(batch):
    """[B, T]: what share of its sample a token is."""
    return batch['loss_mask'] / jnp.maximum(batch['lengths'], 1)


def _divergence(logprobs_BT, other_BT, estimator: str):
    """An estimate of KL(policy || other) from tokens that the policy has sampled."""
    log_ratio_BT = other_BT - logprobs_BT
    if estimator == 'k1':
        return -log_ratio_BT
    if estimator == 'k2':
        return jnp.square(log_ratio_BT) / 2
    return jnp.expm1(log_ratio_BT) - log_ratio_BT


def _compare(logprobs_BT, sampler_BT, mask_BT) -> dict:
    """How the policy differs from the one that sampled, before anything is cut."""
    log_ratio_BT = jax.lax.stop_gradient(logprobs_BT - sampler_BT)
    ratio_BT = jnp.exp(log_ratio_BT)
    return {
        'ratio': _mean(ratio_BT, mask_BT),
        'ratio_': Largest.of(ratio_BT, mask_BT),
        # How many times one of the two probabilities is the other, minus 1.
        'ratio_error_': Quantiles.of(jnp.expm1(jnp.abs(log_ratio_BT)), mask_BT),
        'sampler_kl': _mean(jnp.expm1(log_ratio_BT) - log_ratio_BT, mask_BT),
        # Of the samples' own tokens: an estimate, as long as the policy is the one that sampled.
        'entropy_estimate': _mean(-logprobs_BT, mask_BT),
    }


def _mean(values_BT, mask_BT):
    values_BT = jax.lax.stop_gradient(values_BT)
    return jnp.sum(values_BT * mask_BT), jnp.sum(mask_BT)

"""Preferences: raises the log-probs of chats that are wanted above those of others.

One objective with parts. DPO, IPO, KTO and SimPO are presets of them (`jaxfm.objectives`). The
batch has, besides tokens and targets, all [B, T]:

    sides                1 for each target that counts of a chat that is wanted, or is the better of
                         a pair; -1 for one of another; else 0
    pair_ids             the number of the document in its row: of a pair, both chats have it
    reference_logprobs   the log-prob of each target under the reference (unless reference='none')
    kl                   the same estimate everywhere (loss='kto')

A chat is a segment of a row. Losses and gradients are those of TRL's DPOTrainer, KTOTrainer and
CPOTrainer (1.16), whose `simpo_gamma` is our margin.
"""

import jax
import jax.numpy as jnp

from jaxfm.objectives import NO_REFERENCE, PreferenceConfig
from jaxfm.ops.logprobs import token_logprobs
from jaxfm.ops.segments import segment_sums


class Preference:
    """The objective of learning from preferences; its loss is a mean over pairs, or over chats."""

    def __init__(self, config: PreferenceConfig):
        self.config = config
        self.coefficients = {'preference': 1.0}
        if config.sft:
            self.coefficients['sft'] = config.sft

    def weights(self, batch) -> dict:
        """{term: number of pairs, chats or tokens in the global batch}."""
        weights = {
            # The shares of a pair add up to 1, but for their rounding.
            'preference': jnp.round(jnp.sum(self._shares(batch))),
            'sft': jnp.sum(batch['sides'] > 0, dtype=jnp.float32),
        }
        return {term: weights[term] for term in self.coefficients}

    def __call__(self, model, batch, rng):
        """-> ({term: sum over the batch}, {metric: (sum, weight)}, {buffer: new value})."""
        del rng  # this objective uses no randomness
        hidden_BTD, _ = model(batch['tokens'], batch['positions'], batch['segment_ids'])
        logprobs_BT, _ = token_logprobs(hidden_BTD, model.unembed(), batch['targets'])
        return *self.terms(logprobs_BT, batch), {}

    def terms(self, logprobs_BT, batch) -> tuple[dict, dict]:
        """The sums and metrics, from the policy's log-probs [B, T]."""
        config, mask_BT = self.config, batch['loss_mask']
        logprobs_BT = jnp.where(mask_BT > 0, logprobs_BT, 0.0)  # elsewhere they may be anything
        scores_BT = logprobs_BT
        if config.reference != NO_REFERENCE:
            scores_BT -= jnp.where(mask_BT > 0, batch['reference_logprobs'], 0.0)
        if config.logprobs == 'mean':
            scores_BT /= jnp.maximum(segment_sums(mask_BT, batch['segment_ids']), 1)
        shares_BT = self._shares(batch)
        chats_BT = segment_sums(scores_BT, batch['segment_ids'])  # the score of each chat
        if config.loss == 'kto':
            losses_BT = self._chat_losses(chats_BT, batch)
        else:
            margins_BT = segment_sums(scores_BT * batch['sides'], batch['pair_ids'])
            losses_BT = self._pair_losses(margins_BT)
        sums = {'preference': jnp.sum(losses_BT * shares_BT)}
        if config.sft:
            sums['sft'] = -jnp.sum(jnp.where(batch['sides'] > 0, logprobs_BT, 0.0))
        metrics = self._compare(chats_BT, logprobs_BT, batch)
        if config.loss == 'kto':
            metrics['kl'] = _mean(batch['kl'], shares_BT)
        else:
            is_right_BT = (margins_BT > 0).astype(jnp.float32)
            metrics['accuracy'] = _mean(is_right_BT, shares_BT)
            metrics['margin'] = _mean(config.beta * margins_BT, shares_BT)
        return sums, metrics

    def _pair_losses(self, margins_BT):
        """The loss of each pair, from the difference of its scores."""
        config = self.config
        if config.loss == 'squared':
            return jnp.square(margins_BT - 1 / (2 * config.beta))
        x_BT = config.beta * margins_BT

        def loss(x_BT):
            if config.loss == 'hinge':
                return jax.nn.relu(1 - x_BT)
            return -jax.nn.log_sigmoid(x_BT)

        if not config.label_smoothing:
            return loss(x_BT - config.margin)
        noise, sign = config.label_smoothing, -1 if config.smoothing == 'robust' else 1
        swapped_BT = noise * loss(config.margin - x_BT)
        scale = 1 - noise + sign * noise
        return ((1 - noise) * loss(x_BT - config.margin) + sign * swapped_BT) / scale

    def _chat_losses(self, chats_BT, batch):
        """The loss of each chat: how far it is from certain to be taken, or to be left."""
        config, sides_BT = self.config, batch['sides']
        x_BT = sides_BT * config.beta * (chats_BT - batch['kl'])
        weight_BT = jnp.where(sides_BT > 0, config.desirable_weight, config.undesirable_weight)
        return weight_BT * (1 - jax.nn.sigmoid(x_BT))

    def _shares(self, batch):
        """[B, T]: what share of its pair, or of its chat, a target is."""
        of = 'segment_ids' if self.config.loss == 'kto' else 'pair_ids'
        sizes_BT = segment_sums(batch['loss_mask'], batch[of])
        return batch['loss_mask'] / jnp.maximum(sizes_BT, 1)

    def _compare(self, chats_BT, logprobs_BT, batch) -> dict:
        """Rewards and log-probs of both kinds of chats, a mean over chats."""
        mask_BT, segments = batch['loss_mask'], batch['segment_ids']
        share_BT = mask_BT / jnp.maximum(segment_sums(mask_BT, segments), 1)
        totals_BT = segment_sums(logprobs_BT, segments)
        metrics = {}
        for name, side in (('chosen', 1), ('rejected', -1)):
            weight_BT = share_BT * (batch['sides'] == side)
            metrics[f'reward_{name}'] = _mean(self.config.beta * chats_BT, weight_BT)
            metrics[f'logprob_{name}'] = _mean(totals_BT, weight_BT)
        return metrics


def _mean(values_BT, weights_BT):
    return jnp.sum(jax.lax.stop_gradient(values_BT) * weights_BT), jnp.sum(weights_BT)

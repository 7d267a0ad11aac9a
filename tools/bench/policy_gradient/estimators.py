"""The estimators of the table, and what theory says of each.

Theory. With rewards r, G samples a group, s(y) the gradient of log p(y), and q the policy that
sampled:

- A baseline that does not depend on the sample leaves E[(r - b) s] as it is, because E[s] = 0. The
  mean of the group contains the sample itself, which takes away the share 1/G: the scale is
  (G - 1)/G. Both also hold for samples of q that are weighted by p(y)/q(y).
- Dividing by the standard deviation of the group gives prompts other weights, those with a small
  deviation larger ones. With rewards 0 and 1 and E[r] = m, the weight of a prompt is
  E[std] / (m (1 - m)) with a leave-one-out baseline (Liu et al. 2025, arXiv 2503.20783: bias by
  difficulty).
- The mean over the tokens of a sample follows the gradient of E[(r - b) / length] for a constant b,
  by which good samples had better be short and bad ones long (the same paper: bias by length).
- Without p/q, or with p/q of each token alone, samples of q give the gradient of something else.
- Cutting leaves out a part of E_q[p/q (r - b) s], which is the true gradient: of samples that p
  likes more than q does (truncated, masked), or less (masked); with PPO, of good samples that p
  likes more and of bad ones that it likes less. What is missing agrees with the true gradient on
  average, as the tests hold, so the scale shrinks.
"""

import dataclasses

import numpy as np

from jaxfm.objectives import OBJECTIVES, PolicyGradientConfig
from tools.bench.policy_gradient.world import (
    COMPLETIONS,
    DIFFICULTIES,
    LENGTH,
    World,
    probabilities,
)

GROUP = 8  # samples of a prompt
_SAMPLES = len(DIFFICULTIES) * GROUP


@dataclasses.dataclass(frozen=True)
class Estimator:
    """One row of the table."""

    name: str
    config: PolicyGradientConfig
    # Where the advantages come from: our own, of groups; or what is listed in `credit`, which
    # depends on nothing but the completion, so that all there is can be computed exactly.
    credit: str = 'group'
    scale: float | None = None  # if theory says so: how long the mean is, along the true gradient
    stays_unbiased: bool = False  # also for samples of another policy


def credit(world: World, sampler_PXV: np.ndarray, kind: str) -> np.ndarray:
    """[P, Y, T]: how much better each completion is than expected, at each token."""
    before_PYT, after_PYT = world.values()
    rewards_PYT = np.broadcast_to(world.rewards_PY[..., None], before_PYT.shape)
    if kind == 'reward':
        return rewards_PYT
    if kind == 'prompt':  # what a leave-one-out baseline becomes with many samples
        mean_P = (probabilities(sampler_PXV) * world.rewards_PY).sum(axis=1)
        return rewards_PYT - mean_P[:, None, None]
    if kind.startswith('learned'):
        before_PYT, after_PYT = _with_errors(world, before_PYT, after_PYT)
    # Of a value head, with the lambda 1 or 0 of GAE.
    return (after_PYT if kind.endswith('token') else rewards_PYT) - before_PYT


def _with_errors(world: World, before_PYT: np.ndarray, after_PYT: np.ndarray):
    """The values that a value head might have learned: each prefix has an error of its own.

    Its standard deviation is half of that of the rewards. The end of a completion has no error.
    """
    noise = np.random.default_rng(2).normal(size=world.logits_PXV.shape[:2])
    chances_PY = probabilities(world.logits_PXV)
    mean_P1 = (chances_PY * world.rewards_PY).sum(axis=1, keepdims=True)
    variance_P = (chances_PY * np.square(world.rewards_PY - mean_P1)).sum(axis=1)
    errors_PX = noise * np.sqrt(variance_P)[:, None] / 2
    errors_PYT = errors_PX[:, COMPLETIONS.prefixes_YT] * COMPLETIONS.mask_YT
    next_PYT = np.concatenate([errors_PYT[..., 1:], np.zeros_like(errors_PYT[..., :1])], axis=2)
    return before_PYT + errors_PYT, after_PYT + next_PYT


def _plain(**parts) -> PolicyGradientConfig:
    """REINFORCE with importance sampling of whole samples, and the given parts.

    The mean over its tokens gives the ratio of a sample the weight 1, not that of its length.
    """
    plain = dict(baseline='none', ratio='sequence', clip='none', aggregation='sequence')
    return PolicyGradientConfig(**(plain | parts))


def _by_token(**parts) -> PolicyGradientConfig:
    """The same, where each token has a term of its own."""
    return _plain(**(dict(ratio='token', aggregation='sum') | parts))


def _leave_one_out(**parts) -> PolicyGradientConfig:
    return _plain(baseline='leave_one_out', **parts)


def _importance(kind: str, level: str) -> PolicyGradientConfig:
    """Importance sampling by a weight that is cut outside [0.5, 2]; the ratio itself is 1."""
    floor = 0.5 if kind == 'mask' else 0.0
    return _by_token(
        old_logprobs='recomputed', importance=kind, importance_level=level, importance_floor=floor
    )


def _preset(name: str, scale: float | None = None, **parts) -> Estimator:
    return Estimator(name, OBJECTIVES[name].schema(**parts), scale=scale)


# p/q of the sample as a weight without a gradient, so that every token can have its own advantage.
_WEIGHTED = _by_token(ratio='sequence', clip='cispo', clip_high=1e9)

BASELINES = (
    Estimator('no baseline', _plain(), 'group', 1.0, True),
    Estimator('mean of the batch', _plain(baseline='batch'), 'group', 1 - 1 / _SAMPLES, True),
    Estimator('mean of the group', _plain(baseline='group'), 'group', 1 - 1 / GROUP, True),
    Estimator('leave one out', _leave_one_out(), 'group', 1.0, True),
)
# Each changes one thing of `leave one out`.
PIECES = (
    Estimator('std of the group', _leave_one_out(scale='group')),
    Estimator('std of the batch', _leave_one_out(scale='batch')),
    Estimator('mean over the tokens of a sample', _leave_one_out(ratio='token')),
    Estimator('mean over all tokens', _leave_one_out(ratio='token', aggregation='token')),
    Estimator('ratio of the sample, summed over tokens', _leave_one_out(aggregation='sum')),
)
PRESETS = (
    _preset('rloo', 1.0),
    _preset('dr_grpo', (1 - 1 / GROUP) / LENGTH, length=LENGTH),
    _preset('grpo'),
    _preset('dapo'),
    _preset('gspo'),
    _preset('cispo'),
    _preset('reinforce_plus_plus'),
)
VALUES = (
    Estimator('no baseline (exact)', _plain(), 'reward', 1.0, True),
    Estimator('value of the prompt', _plain(), 'prompt', 1.0, True),
    Estimator('exact values, lambda 1', _WEIGHTED, 'exact prefix', 1.0, True),
    Estimator('exact values, lambda 0', _WEIGHTED, 'exact token', 1.0, True),
    Estimator('values with errors, lambda 1', _WEIGHTED, 'learned prefix', 1.0, True),
    Estimator('values with errors, lambda 0', _WEIGHTED, 'learned token'),
)
# All with the value of the prompt as the baseline.
CORRECTIONS = (
    Estimator('p/q of the sample', _plain(), 'prompt', 1.0, True),
    Estimator('p/q of each token', _by_token(), 'prompt', 1.0),
    Estimator('geometric mean of p/q', _by_token(ratio='sequence_mean'), 'prompt', 1.0),
    Estimator('no correction', _by_token(old_logprobs='recomputed'), 'prompt', 1.0),
    Estimator('PPO clip of tokens', _by_token(clip='ppo'), 'prompt', 1.0),
    Estimator('PPO clip of samples', _plain(clip='ppo'), 'prompt', 1.0),
    Estimator('truncated at 2, tokens', _importance('truncate', 'token'), 'prompt', 1.0),
    Estimator('truncated at 2, samples', _importance('truncate', 'sequence'), 'prompt', 1.0),
    Estimator('masked outside 0.5..2, tokens', _importance('mask', 'token'), 'prompt', 1.0),
    Estimator('masked outside 0.5..2, samples', _importance('mask', 'sequence'), 'prompt', 1.0),
)

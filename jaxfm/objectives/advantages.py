"""Advantages: how much better a sample is than could be expected, from the rewards of a batch."""

import numpy as np

from jaxfm.objectives import PolicyGradientConfig

# Added to a standard deviation, so that rewards that hardly differ do not become large.
_EPSILON = 1e-4


def advantages(rewards_PG: np.ndarray, config: PolicyGradientConfig) -> np.ndarray:
    """Rewards [P, G] of G samples of each of P prompts -> advantages [P, G], float32.

    Samples of a prompt whose rewards are all equal have the advantage 0, to the last bit, if the
    baseline is one of their prompt. Standard deviations are of the rewards, before a baseline is
    subtracted, and divide by their number minus 1.

    Raises:
      ValueError: a baseline or a scale needs at least two samples of each prompt, or of all.
    """
    rewards_PG = np.asarray(rewards_PG, np.float64)
    parts = {config.baseline, config.scale}
    if rewards_PG.shape[1] < 2 and parts & {'group', 'leave_one_out'}:
        raise ValueError('a baseline or scale of the group needs at least 2 samples of each prompt')
    if rewards_PG.size < 2 and 'batch' in parts:
        raise ValueError('a baseline or scale of the batch needs at least 2 samples')
    centred_PG = _subtract_baseline(rewards_PG, config.baseline)
    if config.scale == 'group':
        centred_PG /= rewards_PG.std(axis=1, ddof=1, keepdims=True) + _EPSILON
    elif config.scale == 'batch':
        centred_PG /= rewards_PG.std(ddof=1) + _EPSILON
    return centred_PG.astype(np.float32)


def _subtract_baseline(rewards_PG: np.ndarray, baseline: str) -> np.ndarray:
    if baseline == 'none':
        return rewards_PG.copy()
    if baseline == 'batch':
        return rewards_PG - rewards_PG.mean()
    centred_PG = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    centred_PG[np.ptp(rewards_PG, axis=1) == 0] = 0.0
    samples = rewards_PG.shape[1]
    return centred_PG * samples / (samples - 1) if baseline == 'leave_one_out' else centred_PG

"""Advantages: how much better a sample is than could be expected, from the rewards of a batch."""

import numpy as np

from jaxfm.objectives import PolicyGradientConfig

# Added to a standard deviation, so that rewards that hardly differ do not become large.
_EPSILON = 1e-4


def advantages(rewards_PG: np.ndarray, config: PolicyGradientConfig) -> np.ndarray:
    """Rewards [P, G] of G samples of each of P prompts -> advantages [P, G], float32.

    Samples of a prompt whose rewards are all equal have the advantage 0, to the last bit, if the
    baseline is one of their prompt. Standard deviations are of the rewards, before a baseline is
    subtracted, and divide by their number minus 1. A reward that is NaN is none: the others are
    as if the sample were not there, and its advantage is 0.

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
        centred_PG /= _deviations(rewards_PG)[:, None] + _EPSILON
    elif config.scale == 'batch':
        centred_PG /= _deviations(rewards_PG.reshape(1, -1)) + _EPSILON
    return np.nan_to_num(centred_PG).astype(np.float32)


def _subtract_baseline(rewards_PG: np.ndarray, baseline: str) -> np.ndarray:
    if baseline == 'none':
        return rewards_PG.copy()
    if baseline == 'batch':
        return rewards_PG - _means(rewards_PG.reshape(1, -1))
    centred_PG = rewards_PG - _means(rewards_PG)[:, None]
    centred_PG[_are_equal(rewards_PG)] = 0.0
    counts_P1 = np.sum(~np.isnan(rewards_PG), axis=1, keepdims=True)
    if baseline == 'leave_one_out':  # a sample without others is as good as its baseline
        centred_PG *= counts_P1 / np.maximum(counts_P1 - 1, 1)
    return centred_PG


def _are_equal(rewards_PG: np.ndarray) -> np.ndarray:
    """[P]: whether no two rewards of a prompt differ."""
    is_there = ~np.isnan(rewards_PG)
    lowest_P = np.min(rewards_PG, axis=1, initial=np.inf, where=is_there)
    return lowest_P >= np.max(rewards_PG, axis=1, initial=-np.inf, where=is_there)


def _means(rewards_PG: np.ndarray) -> np.ndarray:
    counts_P = np.sum(~np.isnan(rewards_PG), axis=1)
    return np.nansum(rewards_PG, axis=1) / np.maximum(counts_P, 1)


def _deviations(rewards_PG: np.ndarray) -> np.ndarray:
    counts_P = np.sum(~np.isnan(rewards_PG), axis=1)
    squares_P = np.nansum((rewards_PG - _means(rewards_PG)[:, None]) ** 2, axis=1)
    return np.sqrt(squares_P / np.maximum(counts_P - 1, 1))

"""Curriculum: asks prompts more often that the model solves at times, by their pass rates so far.

A prompt that is always or never solved has no gradient, but may have one later. So its weight is
lower, not 0, and it comes again. Which prompts are drawn depends on the seed, the number of the
draw and the recorded pass rates alone.
"""

import base64
import math
import zlib

import numpy as np

from jaxfm.rollout import CurriculumConfig

# A pass rate is one byte, so that those of a million prompts fit into the manifest of a checkpoint.
_UNITS = 254
_NEVER = 255


class Curriculum:
    """The pass rates of all prompts, and draws from them.

    Args:
      num_prompts: of the task.
      seed: of the phase.
    """

    def __init__(self, config: CurriculumConfig, num_prompts: int, seed: int):
        self._config, self._seed = config, seed
        self._rates = np.full(num_prompts, _NEVER, np.uint8)

    def draw(self, first: int, count: int, taken: set[int]) -> list[int]:
        """-> the places of `count` prompts, without repetition as long as there are others.

        Args:
          first: the number of the first of them, which tells this draw from others.
          taken: places that come only if nothing else is left: their samples are under way.
        """
        bands = self._bands()
        weights = np.where(bands['medium'] | bands['unasked'], 1.0, self._config.floor)
        # The largest of log-weights with Gumbel noise are a weighted draw without repetition
        # (Efraimidis and Spirakis 2006).
        keys = np.log(weights)
        keys += np.random.default_rng([self._seed, first]).gumbel(size=len(keys))
        keys[[*taken]] -= 1e9
        order = np.argsort(-keys, kind='stable')
        return np.resize(order, count).tolist()

    def update(self, place: int, rewards: list[float]) -> None:
        """Notes the rewards of a prompt's samples; NaN is none. If all are, none has passed."""
        num_known = sum(not math.isnan(reward) for reward in rewards)
        passed = sum(reward >= self._config.passing for reward in rewards) / max(num_known, 1)
        old, rate = int(self._rates[place]), _UNITS * passed
        if old != _NEVER:
            rate = old + self._config.newest * (rate - old)
        self._rates[place] = round(rate)

    def shares(self) -> dict[str, float]:
        """{band: share of the prompts}."""
        return {band: float(np.mean(is_in)) for band, is_in in self._bands().items()}

    def _bands(self) -> dict[str, np.ndarray]:
        """{band: which prompts are in it}: every prompt is in one."""
        rates, is_asked = self._rates / _UNITS, self._rates != _NEVER
        is_hard = is_asked & (rates < self._config.low)
        is_easy = is_asked & (rates > self._config.high)
        medium = is_asked & ~is_hard & ~is_easy
        return {'unasked': ~is_asked, 'hard': is_hard, 'medium': medium, 'easy': is_easy}

    def get_state(self) -> str:
        """The pass rates, as text."""
        return base64.b64encode(zlib.compress(self._rates.tobytes(), level=1)).decode()

    def set_state(self, state: str) -> None:
        """Continues from what `get_state` has returned for the same prompts."""
        rates = np.frombuffer(zlib.decompress(base64.b64decode(state)), np.uint8)
        self._rates = rates.copy()

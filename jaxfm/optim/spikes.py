"""Judges the losses of a phase: which are spikes, far above those of the steps before them.

A loss is a spike if it is above mean + sigmas * sigma of the last `window` applied steps. Step k is
judged by the steps up to k - 2, because at most two are in flight: when step k is dispatched, the
host has not seen the loss of step k - 1. So the limit does not depend on when the host looked, and
a resumed run judges as an uninterrupted one does.
"""

import collections
import dataclasses
import math
from typing import Any

import jax
import numpy as np

from jaxfm import sharding
from jaxfm.optim import SpikesConfig

FEWEST = 32  # losses; with fewer, no step is judged
# Smallest sigma, as a share of the mean: losses that hardly vary are no measure of what is normal.
_FLOOR = 1e-3


@dataclasses.dataclass(frozen=True)
class Spike:
    """A step whose loss is a spike. position: of the source, after the batch of that step."""

    step: int
    loss: float
    limit: float
    position: Any
    last_good: int = 0  # the `last_good` of its phase
    rewinds: int = 0  # of the phase before it

    def values(self, policy: str) -> dict[str, Any]:
        """The values for an `event` record."""
        told = {'spike/step': self.step, 'spike/loss': self.loss, 'spike/limit': self.limit}
        return told | {'spike/policy': policy}


class Rewind(Exception):
    """The run must go back to before a spike, and continue with the data after it."""

    def __init__(self, spike: Spike):
        super().__init__(f'the loss of step {spike.step} is a spike')
        self.spike = spike


class Spikes:
    """The losses of one phase, for its training loop; `get_state` goes into checkpoints.

    Attributes:
      count: the spikes of the phase so far, including those that a rewind has undone.
      rewinds: how often the phase has gone back.
      last_good: the last step that applied an update and was no spike. The loss of a step shows the
        weights before it, so it is not known whether later checkpoints have good weights.
    """

    def __init__(self, config: SpikesConfig):
        self.config = config
        self.count = self.rewinds = self.last_good = 0
        self._positions: dict[int, Any] = {}
        self._set_losses(())

    def begin(self, step: int, position: Any) -> jax.Array | None:
        """Call this before a step is dispatched -> the limit to give it; None for no limit.

        step: the state's step after it. position: of the source, after the batch of this step.
        """
        self._positions = {step - 1: self._positions.get(step - 1), step: position}
        return sharding.scalar(self.limit(step)) if self.config.policy == 'skip' else None

    def limit(self, step: int) -> float:
        """The largest loss of a step that is no spike; infinite with too few losses to judge by."""
        losses = [loss for known, loss in self._losses if known <= step - 2]
        losses = losses[-self.config.window :]
        if len(losses) < min(FEWEST, self.config.window) or self.config.policy == 'off':
            return math.inf
        # Correctly rounded sums: the same on every host, whatever its processor.
        mean = math.fsum(losses) / len(losses)
        variance = math.fsum((loss - mean) ** 2 for loss in losses) / len(losses)
        sigma = max(math.sqrt(variance), _FLOOR * abs(mean))
        return float(np.float32(mean + self.config.sigmas * sigma))

    def judge(self, step: int, loss: float, is_finite: bool, is_applied: bool) -> Spike | None:
        """Notes the loss of the next step -> the spike, if it is one.

        is_finite: whether loss and gradient are; if not, the step is skipped, and is no spike.
        """
        limit = self.limit(step)
        if is_applied:
            self._losses.append((step, loss))
        if not is_finite or loss <= limit:
            self.last_good = step if is_applied else self.last_good
            return None
        self.count += 1
        return Spike(step, loss, limit, self._positions[step], self.last_good, self.rewinds)

    def get_state(self) -> dict[str, Any]:
        """The state to save in a checkpoint, as JSON."""
        losses = [list(pair) for pair in self._losses]
        return {
            'losses': losses,
            'count': self.count,
            'rewinds': self.rewinds,
            'last_good': self.last_good,
        }

    def set_state(self, state: dict[str, Any] | None) -> None:
        """Continues from a checkpoint; None: one of before spikes were judged."""
        state = state or {'losses': (), 'count': 0, 'rewinds': 0}
        self.count, self.rewinds = state['count'], state['rewinds']
        self._set_losses(state['losses'])
        self.last_good = state.get('last_good', 0)

    def go_back(self, state: dict[str, Any] | None) -> None:
        """Counts a rewind, to a checkpoint of this phase, or to the beginning of the phase."""
        self.rewinds += 1
        self._set_losses(state['losses'] if state else ())
        self.last_good = state.get('last_good', 0) if state else 0

    def _set_losses(self, losses) -> None:
        # One more than the window: the last one is too new to judge the next step by.
        pairs = [(step, loss) for step, loss in losses]
        self._losses = collections.deque(pairs, maxlen=self.config.window + 1)

"""Kills the process of a run at a place of a step, as SIGKILL from outside might by chance.

A config that calls `install` is killed if the environment says so: KILL_AT=generate@5.
"""

import os
import signal

from jaxfm import train
from jaxfm.rollout.source import Rollouts
from jaxfm.sampling.engine import Sampler

VARIABLE = 'KILL_AT'


def install() -> None:
    """Patches what the place needs; nothing without the variable."""
    if wanted := os.environ.get(VARIABLE):
        place, step = wanted.split('@')
        _PLACES[place](int(step))


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _generate(at: int) -> None:
    """When some tokens of the step's samples are there."""
    original = Sampler.step

    def step(self):
        events = original(self)
        if self.version == at and events and self.has_work:
            _die()
        return events

    Sampler.step = step


def _logprobs(at: int) -> None:
    """When log-probs of the step's batch are being computed."""
    original = Rollouts.next

    def next(self, params, step):
        if step == at:
            score = self._score
            self._score = lambda *arguments: (score(*arguments), _die())
        return original(self, params, step)

    Rollouts.next = next


def _train(at: int) -> None:
    """When the update that leads to the step is being computed."""
    original = train.see

    def see(loop, updates, step, metrics):
        if step == at:
            _die()
        return original(loop, updates, step, metrics)

    train.see = see


_PLACES = {'generate': _generate, 'logprobs': _logprobs, 'train': _train}

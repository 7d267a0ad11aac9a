"""Batches of samples and batches of documents, in a random order: generalised distillation's data.

Which one a step gets depends on the seed and on the number of the step in the phase alone.
"""

from collections.abc import Callable

import numpy as np

from jaxfm.data.loader import Batches
from jaxfm.errors import ConfigError
from jaxfm.rollout.source import Rollouts


class Alternation:
    """Takes each batch from one of two sources; `jaxfm.train.Source` is its interface.

    Args:
      statistics: of the documents, for the report.
      share: of the steps that get samples, on average.
    """

    def __init__(
        self, on_policy: Rollouts, off_policy: Batches, statistics: dict, share: float, seed: int
    ):
        self._on_policy, self._off_policy, self._statistics = on_policy, off_policy, statistics
        self._share, self._seed = share, seed
        self._number = 0  # of the next batch
        self._last = on_policy

    @property
    def _next(self) -> Rollouts | Batches:
        draw = np.random.default_rng([self._seed, self._number]).random()
        return self._on_policy if draw < self._share else self._off_policy

    @property
    def bucket(self) -> str:
        """What the time of the next batch is charged to."""
        return self._next.bucket

    @property
    def tokens(self) -> int:
        """Inputs of the last batch, over all hosts."""
        return self._last.tokens

    def next(self, params, step: int) -> dict:
        """The batch of a step; raises what the two sources raise."""
        source = self._next
        batch = source.next(params, step)
        self._number, self._last = self._number + 1, source
        return batch

    def in_turn(self, train_step: Callable, evaluators: dict) -> dict:
        """As in `Rollouts`."""
        return self._on_policy.in_turn(train_step, evaluators)

    def prepare(self, params: dict | None) -> None:
        """Loads what the samples need."""
        self._on_policy.prepare(params)

    def progress(self) -> dict[str, float]:
        """What both have delivered."""
        return self._on_policy.progress() | self._off_policy.progress()

    @property
    def statistics(self) -> dict[str, int | float | str]:
        """What is asked, and what the documents are, for the report."""
        documents = {f'off_policy/{name}': value for name, value in self._statistics.items()}
        return self._on_policy.statistics | documents

    def get_state(self) -> dict:
        """The number of the next batch, and the positions of both, as JSON."""
        states = {name: source.get_state() for name, source in self._sources.items()}
        return {'next_batch': self._number} | states

    def set_state(self, state: dict) -> None:
        """Continues from a state. Raises ConfigError if it is a position in other data."""
        if not state.keys() >= self._sources.keys():
            raise ConfigError(
                'the data changed since the checkpoint: it was not a rollout_mixture; restore it, '
                'or start a new run in another --workdir from these weights with --config.init_from'
            )
        for name, source in self._sources.items():
            source.set_state(state[name])
        self._number = state['next_batch']

    @property
    def _sources(self) -> dict[str, Rollouts | Batches]:
        return {'on_policy': self._on_policy, 'off_policy': self._off_policy}

    def close(self) -> None:
        """Ends what works ahead, and frees what the samples need."""
        for source in self._sources.values():
            source.close()

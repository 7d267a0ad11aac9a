"""What all evaluators share: their context and their cadence."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Context:
    """What a run gives to each of its evaluators."""

    name: str  # of the evaluator: its metrics are eval/<name>/...
    merge: Callable[[dict], Any]  # {path: array} -> model
    dataset: Any  # of the evaluator's phase: held-out tokens and documents, tokenizer, chat
    sampler: Any
    mesh: Any
    seed: int
    samples_directory: Path | None  # None on processes that write no files


class Periodic:
    """The cadence of an evaluator.

    Args:
      every: steps between two runs; 0 means only at the end of each phase.
      at_start: whether to run on the weights of step 0 too.
    """

    def __init__(self, every: int, at_start: bool):
        self._every, self._at_start = every, at_start

    def is_due(self, step: int, last: int) -> bool:
        """Whether to run at `step`. last: the last step of the phase, at which it always runs."""
        if step in (0, last):
            return step == last or self._at_start
        return bool(self._every) and step % self._every == 0

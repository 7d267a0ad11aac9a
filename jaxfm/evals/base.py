"""What every evaluator is given, when it runs, and the interval of a share."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Context:
    """What a run offers its evaluators."""

    name: str  # of the evaluator: its metrics are eval/<name>/...
    merge: Callable[[dict], Any]  # {path: array} -> model
    dataset: Any  # of the evaluator's phase: held-out tokens and documents, tokenizer, chat
    sampler: Any
    mesh: Any
    seed: int
    samples_directory: Path | None  # None where this process writes nothing


class Periodic:
    """The cadence that every evaluator has.

    Args:
      every: steps between two runs; 0 is only at the end of each phase.
      at_start: also on the weights of step 0.
    """

    def __init__(self, every: int, at_start: bool):
        self._every, self._at_start = every, at_start

    def is_due(self, step: int, last: int) -> bool:
        """Every so many steps, at the start of the run if asked, when a phase ends (at `last`)."""
        if step in (0, last):
            return step == last or self._at_start
        return bool(self._every) and step % self._every == 0


def wilson_interval(successes: float, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson, 1927): sensible at 0, at 1, for small n."""
    share = successes / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)

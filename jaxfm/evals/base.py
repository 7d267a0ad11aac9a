"""What all evaluators share: their context, their cadence, and confidence intervals."""

import dataclasses
import math
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


def wilson_interval(successes: float, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion (Wilson, 1927).

    Unlike the normal approximation, it is valid for small samples and for proportions of 0 and 1.
    """
    share = successes / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)

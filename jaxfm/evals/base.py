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


class Evaluator:
    """What every evaluator has: when it runs, and what nobody need say of it."""

    def __init__(self, config):
        self._every, self._at_start = config.every, config.at_start

    def is_due(self, step: int, last: int) -> bool:
        """Every so many steps, at the start of the run if asked, when a phase ends (at `last`)."""
        if step in (0, last):
            return step == last or self._at_start
        return bool(self._every) and step % self._every == 0

    def contamination(self, dataset) -> dict[str, float]:
        """How much of what it asks stands in the training text of a phase; {} is not known."""
        del dataset
        return {}


def wilson_interval(successes: float, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson, 1927): sensible at 0, at 1, for small n."""
    share = successes / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)

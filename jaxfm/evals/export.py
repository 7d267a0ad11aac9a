"""Export in the slot of an evaluator: every so many steps, and when a phase ends."""

import time
from pathlib import Path

from jaxfm.evals.base import Periodic
from jaxfm.pretrained.huggingface.export import Exporter


class PeriodicExport(Periodic):
    """Writes the weights to <directory>/<step>.

    Args:
      every: steps; a phase's last weights are written as well.
    """

    def __init__(self, every: int, exporter: Exporter, directory: Path):
        super().__init__(every, at_start=False)
        self._exporter, self._directory = exporter, directory

    def run(self, params, step: int) -> dict[str, float]:
        """-> how long it took."""
        start = time.monotonic()
        self._exporter.write(params, self._directory / str(step))
        return {'seconds': time.monotonic() - start}

"""Export of the weights as an evaluator: every so many steps, and at the end of each phase."""

import time
from pathlib import Path

from jaxfm.evals.base import Periodic
from jaxfm.pretrained.huggingface.export import Exporter


class PeriodicExport(Periodic):
    """Writes the weights to <directory>/<step>.

    Args:
      every: steps between two exports; the last weights of each phase are always exported.
    """

    def __init__(self, every: int, exporter: Exporter, directory: Path):
        super().__init__(every, at_start=False)
        self._exporter, self._directory = exporter, directory

    def run(self, params, step: int) -> dict[str, float]:
        """Exports the weights -> {'seconds': how long it took}."""
        start = time.monotonic()
        self._exporter.write(params, self._directory / str(step))
        return {'seconds': time.monotonic() - start}

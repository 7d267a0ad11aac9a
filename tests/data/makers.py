"""Batches that a maker makes, for tests of what works ahead and of the loop."""

from jaxfm.data import pipeline
from jaxfm.data.loader import Batches


class Made(Batches):
    """The batches of a maker with `make()`, `get_state()` and `set_state(state)`."""

    def __init__(self, maker, put=None, tokens=0):
        super().__init__({'made': 1.0}, batch_size=1, rows=None, put=put)
        self.sequence_length = tokens
        self._maker, self._position = maker, maker.get_state()
        self._position_keys = frozenset(self._position)

    def _open(self, position):
        return pipeline.open_batches(pipeline.Streamed(self._maker), position, self._put)

    def _to_position(self, state):
        return state

    def identity(self):
        return {}

    def delivered(self):
        return {'batches': next(iter(self._position.values()))}

"""Batches of the host made ahead and put on the devices, while the step before them runs."""

import queue
import threading

from jaxfm import sharding


class Prefetch:
    """A source that works ahead: makes batches and puts them on the devices in one thread.

    Only for sources that ignore params (datasets). `get_state` is the position after the batch that
    was delivered last, never of what waits in the queue.
    """

    def __init__(self, source, mesh, batch_size: int, depth: int = 2):
        self._source, self._mesh, self._batch_size = source, mesh, batch_size
        self._depth = depth
        self._state = source.get_state()
        self._thread = None

    def _work(self, batches: queue.Queue, stopped: threading.Event):
        try:
            while not stopped.is_set():
                batch = sharding.put(self._source.next(None, None), self._mesh, self._batch_size)
                self._offer(batches, stopped, (batch, self._source.get_state()))
        except BaseException as error:  # raised again in the loop, where it can be handled
            self._offer(batches, stopped, (error, None))

    @staticmethod
    def _offer(batches: queue.Queue, stopped: threading.Event, item):
        """Waits for room, but not longer than anybody wants the item."""
        while not stopped.is_set():
            try:
                return batches.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _start(self):
        self._batches = queue.Queue(maxsize=self._depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=self._work, args=(self._batches, self._stopped), daemon=True, name='prefetch'
        )
        self._thread.start()

    def next(self, params, step):
        """The next batch, on the devices."""
        if self._thread is None:
            self._start()
        batch, state = self._batches.get()
        if state is None:
            self.close()
            raise batch
        self._state = state
        return batch

    def get_state(self):
        return self._state

    def progress(self):
        """What the source says of the state, not of where it has worked ahead to."""
        return self._source.progress(self._state)

    def set_state(self, state):
        self.close()
        self._source.set_state(state)
        self._state = state

    def close(self):
        """Stops the thread; the next call of `next` starts it again where `get_state` says."""
        if self._thread is not None:
            self._stopped.set()
            self._thread.join()
            self._thread = None
            self._source.set_state(self._state)

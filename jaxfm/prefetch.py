"""Prefetch: builds batches on the host and transfers them to the devices during earlier steps."""

import queue
import threading

from jaxfm import sharding


class Prefetch:
    """Wraps a source; one thread builds its batches ahead of time and puts them on the devices.

    Only for sources that ignore params (datasets). `get_state` returns the position after the last
    delivered batch; batches that wait in the queue do not count.

    Args:
      source: gives local rows as host arrays.
      batch_size: the global number of rows.
      depth: the number of batches that may wait in the queue.
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
        except BaseException as error:  # `next` raises it again, in the training loop
            self._offer(batches, stopped, (error, None))

    @staticmethod
    def _offer(batches: queue.Queue, stopped: threading.Event, item):
        """Puts an item into the queue; waits for room, but gives up once `stopped` is set."""
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
        """The source's progress at the last delivered batch, not at the last prefetched one."""
        return self._source.progress(self._state)

    def set_state(self, state):
        self.close()
        self._source.set_state(state)
        self._state = state

    def close(self):
        """Stops the thread. The next call of `next` restarts it at the position of `get_state`."""
        if self._thread is not None:
            self._stopped.set()
            self._thread.join()
            self._thread = None
            self._source.set_state(self._state)

"""Where a rollout gets its samples from: an engine that runs in the step, or ahead in a thread.

`InStep` samples when it is asked. `Ahead` has a thread that drives the engine while the loop
trains, with a copy of the newest weights that the loop has lent. New weights reach the engine
between two of its steps: samples that are running go on with them, on keys and values that the new
weights compute anew. So each token is from exactly one version of the weights, which is recorded.

The thread drives the engine and nothing else. Judging stays in the loop, because what limits its
time is a signal, and only the main thread gets signals.

With several devices, the programs of two threads must not meet: one device may begin with the one's
and another with the other's, and then their collectives wait for each other for ever. So the loop
and the thread take turns, and whoever has the turn has ended its programs when it gives it up.
Between processes there is no such order, so `Rollouts` refuses to work ahead in several.
"""

import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator

import jax

from jaxfm.sampling.complete import complete
from jaxfm.sampling.engine import Sampler
from jaxfm.sampling.request import Completion, Request

Completions = dict[str, list[Completion]]  # {id of a request: its samples}


class InStep:
    """Samples when it is asked, with the weights of the step. Its methods are those of `Ahead`.

    complete: (sampler, requests, params, version) -> the samples of the requests.
    """

    def __init__(self, sampler: Sampler, complete: Callable[..., Completions] = complete):
        self._sampler, self._complete, self._lent = sampler, complete, None
        # So far, for sampling; and in which the loop waited for samples of the thread.
        self.seconds = {'generate': 0.0, 'idle': 0.0}
        self.is_shared = False  # with a thread, on devices whose programs must not meet

    def lend(self, params, step: int) -> None:
        self._lent = params, step

    def order(self, requests: list[Request]) -> list[Request]:
        return requests

    def take(self, order: list[Request]) -> Completions:
        began = time.monotonic()
        done = self._complete(self._sampler, order, *self._lent)
        self.seconds['generate'] += time.monotonic() - began
        return done

    def claim(self) -> None:
        """Nothing: there is nobody else."""

    def close(self) -> None:
        self._sampler.release()


class Turns:
    """Who may use the devices: the loop, or the thread beside it. The loop goes first."""

    def __init__(self):
        self._changed = threading.Condition()
        self._is_taken = self._is_of_loop = self._is_wanted = False

    def take(self) -> None:
        """Waits for the loop's turn; nothing if it has it."""
        if self._is_of_loop:
            return
        with self._changed:
            self._is_wanted = True  # or the thread might take one turn after the other
            self._changed.wait_for(lambda: not self._is_taken)
            self._is_taken, self._is_of_loop, self._is_wanted = True, True, False

    def give(self) -> None:
        """Ends the loop's turn, if it has it."""
        if self._is_of_loop:
            with self._changed:
                self._is_taken = self._is_of_loop = False
                self._changed.notify_all()

    @contextlib.contextmanager
    def of_thread(self) -> Iterator[None]:
        """A turn of the thread."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._is_taken or self._is_wanted))
            self._is_taken = True
        try:
            yield
        finally:
            with self._changed:
                self._is_taken = False
                self._changed.notify_all()

    def around(self, function: Callable) -> Callable:
        """The function, in a turn of the loop, which ends when what it returns is computed."""

        def call(*arguments):
            self.take()
            try:
                return jax.block_until_ready(function(*arguments))
            finally:
                self.give()

        return call


class InTurn:
    """An evaluator that measures in a turn of the loop."""

    def __init__(self, evaluator, turns: Turns):
        self.is_due, self.run = evaluator.is_due, turns.around(evaluator.run)


@dataclasses.dataclass(eq=False)
class Order:
    """Requests whose samples are taken together, and what is there of them."""

    requests: list[Request]
    samples: dict[tuple[str, int], Completion] = dataclasses.field(default_factory=dict)
    missing: int = 0  # samples that have not ended

    def __post_init__(self):
        for request in self.requests:
            indices = range(request.sample_index, request.sample_index + request.n)
            self.samples |= {(request.id, i): Completion(request.id, i) for i in indices}
        self.missing = len(self.samples)

    def completions(self) -> Completions:
        found = {request.id: [] for request in self.requests}
        for (id, _), completion in self.samples.items():
            found[id].append(completion)
        return found


class Ahead:
    """Samples in a thread, with a copy of the weights that the loop lends.

    What is ordered goes to the engine at once, so that the samples of one order fill the rows that
    those of another leave empty. An order never waits for newer weights: who orders decides how far
    ahead that is.

    Args:
      copy: ({path: array}, the last copy or None) -> a copy, which stays when the original is
        donated. The last copy is of no use any more, so there need not be room for two.
      mesh: of the engine.
    """

    def __init__(self, sampler: Sampler, copy: Callable[[dict, dict | None], dict], mesh):
        self._sampler, self._copy, self._mesh = sampler, copy, mesh
        self.turns = Turns()
        self.is_shared = mesh.size > 1  # as of `InStep`
        self.seconds = {'generate': 0.0, 'idle': 0.0}  # as of `InStep`
        self._params: dict | None = None
        self._changed = threading.Condition()
        self._new: collections.deque[Order] = collections.deque()
        self._running: dict[tuple[str, int], Order] = {}  # only the thread knows it
        self._error: BaseException | None = None
        self._is_closing = False
        self._thread: threading.Thread | None = None

    def lend(self, params, step: int) -> None:
        """Gives the engine a copy of these weights, between two of its steps."""
        self.turns.take()
        self._params = self._copy(params, self._params)
        self._sampler.lend(self._params, step, restore=True)
        if self.is_shared:
            jax.block_until_ready(self._params)
        self.turns.give()
        if self._thread is None:
            self._is_closing = False
            self._thread = threading.Thread(target=self._run, name='rollout', daemon=True)
            self._thread.start()

    def order(self, requests: list[Request]) -> Order:
        """Has requests sampled; `take` waits for them."""
        order = Order(requests)
        with self._changed:
            self._new.append(order)
            self._changed.notify_all()
        return order

    def take(self, order: Order) -> Completions:
        """The samples of an order, once all have ended. Raises what the thread has met."""
        began = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: self._error or not order.missing)
            if self._error:
                raise self._error
        self.seconds['idle'] += time.monotonic() - began
        return order.completions()

    def claim(self) -> None:
        """The loop uses the devices from now on, to the end of the train step."""
        if self.is_shared:
            self.turns.take()

    def close(self) -> None:
        """Ends the thread within a step of the engine, and frees all that it holds.

        Orders that were not taken are lost.
        """
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self.turns.give()
        if self._thread is not None:
            self._thread.join()
        self._thread = self._error = self._params = None
        self._new.clear()
        self._sampler.release()

    def _run(self) -> None:
        error = None
        try:
            with jax.set_mesh(self._mesh):
                while self._wait():
                    self._step()
        except BaseException as raised:  # the loop raises it
            error = raised
        for id, index in self._running:
            self._sampler.cancel(id, index)
        self._running.clear()
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _wait(self) -> bool:
        """Waits for work; False if there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closing or self._new or self._running)
            return not self._is_closing

    def _step(self) -> None:
        with self.turns.of_thread():
            began = time.monotonic()
            while self._new:
                order = self._new[0]
                for request in order.requests:
                    self._sampler.add(request)
                self._running |= dict.fromkeys(order.samples, order)
                self._new.popleft()
            events = self._sampler.step()
            if self.is_shared:
                self._sampler.wait()
            self.seconds['generate'] += time.monotonic() - began
        ended = []
        for event in events:
            key = event.id, event.sample_index
            self._running[key].samples[key].add(event)
            if event.finish_reason:
                ended.append(self._running.pop(key))
        with self._changed:
            for order in ended:
                order.missing -= 1
            self._changed.notify_all()

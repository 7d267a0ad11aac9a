"""Where the time of a run goes: throughput, MFU, the time still to come.

All on the monotonic clock: a clock that is set during a run changes nothing.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

# A step after a long evaluation must not move the estimate much, a lasting change must.
_SMOOTHING = 0.7


class StepClock:
    """Counts tokens and seconds between two logs; what is not a training step stands aside.

    total_steps: of the run. peak_flops: of all devices together. now: seconds, monotonic.
    flops_per_step, to be set: model FLOPs of one global step. MFU needs both FLOPs.
    """

    def __init__(
        self,
        total_steps: int,
        peak_flops: float | None = None,
        now: Callable[[], float] = time.monotonic,
    ):
        self._total_steps = total_steps
        self.flops_per_step: float | None = None
        self._peak_flops = peak_flops
        self._now = now
        self._started = self._window_started = now()
        self._earlier_seconds = 0.0
        self._tokens = self._steps = 0
        self._window_tokens = self._window_steps = 0
        self._window_aside = 0.0
        self._inside: str | None = None
        self._step_seconds: float | None = None
        self._between_at_start = 0.0
        self.seconds: Counter[str] = Counter()

    def step(self, tokens: int) -> None:
        """One more training step has been asked for, of so many tokens over all hosts."""
        if not self._steps:
            self._between_at_start = self._between
        self._window_steps += 1
        self._window_tokens += tokens
        self._steps += 1
        self._tokens += tokens

    @contextlib.contextmanager
    def aside(self, bucket: str) -> Iterator[None]:
        """Time that is no training step: init, compile, eval, checkpoint_save, checkpoint_restore.

        Inside another one, it belongs to the outer.
        """
        if self._inside:
            yield
            return
        started, self._inside = self._now(), bucket
        try:
            yield
        finally:
            elapsed = self._now() - started
            self._inside = None
            self.seconds[bucket] += elapsed
            self._window_aside += elapsed

    def log(self, step: int) -> dict[str, float]:
        """The values of the window since the last log, for a `perf` record; a new window begins.

        Call it when the last step that was asked for has ended, or the window is too short.
        """
        now = self._now()
        seconds = max(now - self._window_started - self._window_aside, 1e-9)
        steps, tokens = self._window_steps, self._window_tokens
        self._window_started, self._window_aside = now, 0.0
        self._window_steps = self._window_tokens = 0
        values = {'perf/elapsed_seconds': self.elapsed, 'perf/total_tokens': self._tokens}
        if not steps:
            return values
        self.seconds['step'] += seconds
        if steps < self._steps or steps > 1:  # the very first step is no measure of the others
            self._smooth(seconds / steps)
        values['perf/tokens_per_second'] = tokens / seconds
        values['perf/step_seconds'] = seconds / steps
        if self.flops_per_step and self._peak_flops:
            values['perf/mfu'] = self.flops_per_step * steps / seconds / self._peak_flops
        if (eta := self.eta(step)) is not None:
            values['perf/eta_seconds'] = eta
        return values

    def eta(self, step: int) -> float | None:
        """Seconds from `step` to the end; None before the first log of more than one step.

        Steps at their recent speed, evaluation and saving at their average cost so far, without
        what came before the first step.
        """
        if self._step_seconds is None:
            return None
        between = (self._between - self._between_at_start) / self._steps
        return max(self._total_steps - step, 0) * (self._step_seconds + between)

    @property
    def _between(self) -> float:
        return self.seconds['eval'] + self.seconds['checkpoint_save']

    @property
    def elapsed(self) -> float:
        """Seconds of this run, over all its processes so far, without the time between them."""
        return self._earlier_seconds + self._now() - self._started

    @property
    def total_tokens(self) -> int:
        return self._tokens

    def get_state(self) -> dict[str, Any]:
        """JSON for the checkpoint."""
        return {'tokens': self._tokens, 'elapsed_seconds': self.elapsed}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where a checkpoint left off; speeds are measured anew."""
        self._tokens = state['tokens']
        self._earlier_seconds = state['elapsed_seconds']
        self._started = self._now()

    def _smooth(self, step_seconds: float) -> None:
        last = step_seconds if self._step_seconds is None else self._step_seconds
        self._step_seconds = _SMOOTHING * last + (1 - _SMOOTHING) * step_seconds

"""Where the time of a run goes: throughput, MFU, the time still to come.

All on the monotonic clock: a clock that is set during a run changes nothing.
"""

import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxfm.metrics import goodput

# A step after a long evaluation must not move the estimate much, a lasting change must.
_SMOOTHING = 0.7
_IMPORTED = time.monotonic()


class StepClock:
    """Counts tokens and steps between two logs, and says of every second of a run where it went.

    total_steps: of the run. peak_flops: of all devices together. now: seconds, monotonic.
    started: when the process was, on the same clock; None is now.
    flops_per_step, to be set: model FLOPs of one global step. MFU needs both FLOPs.
    seconds: {bucket of `goodput.BUCKETS`: seconds of all processes}, up to the last turn of events.
    """

    def __init__(
        self,
        total_steps: int,
        peak_flops: float | None = None,
        now: Callable[[], float] = time.monotonic,
        started: float | None = None,
    ):
        self._total_steps = total_steps
        self.flops_per_step: float | None = None
        self._peak_flops = peak_flops
        self._now = now
        self._turned = now() if started is None else started
        self._bucket = self._ground = 'init'  # ground: where time goes that does not stand aside
        self.seconds: Counter[str] = Counter()
        self._restored_seconds = 0.0
        self._tokens = self._steps = 0
        self._window_tokens = self._window_steps = 0
        self._window_started = 0.0
        self._step_seconds: float | None = None
        self._between_at_start = 0.0

    def step(self, tokens: int) -> None:
        """One more training step has been asked for, of so many tokens over all hosts."""
        if not self._steps:
            self._between_at_start = self._between
        self._window_steps += 1
        self._window_tokens += tokens
        self._steps += 1
        self._tokens += tokens

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """The loop runs: time is that of steps. What was before it is `init`, after it `other`."""
        self._ground = 'step'
        self._turn_to('step')
        try:
            yield
        finally:
            self._ground = 'other'
            self._turn_to('other')

    @contextlib.contextmanager
    def aside(self, bucket: str) -> Iterator[None]:
        """Time that is no training step: data_wait, compile, eval, checkpoint_save and _restore.

        Inside another one, it belongs to the outer.
        """
        if self._bucket != self._ground:
            yield
            return
        self._turn_to(bucket)
        try:
            yield
        finally:
            self._turn_to(self._ground)

    def log(self, step: int) -> dict[str, float]:
        """The values of the window since the last log, for a `perf` record; a new window begins.

        Call it when the last step that was asked for has ended, or the window is too short.
        """
        account = self.account()
        # Waiting for data counts: a run that starves must not look fast.
        training = account['step'] + account['data_wait']
        seconds = max(training - self._window_started, 1e-9)
        steps, tokens = self._window_steps, self._window_tokens
        self._window_started = training
        self._window_steps = self._window_tokens = 0
        values = {'perf/elapsed_seconds': sum(account.values()), 'perf/total_tokens': self._tokens}
        values |= goodput.values(account)
        if not steps:
            return values
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

    def account(self) -> dict[str, float]:
        """Seconds of every bucket, over all processes of this run so far, not between them."""
        self._turn_to(self._bucket)
        return {bucket: self.seconds[bucket] for bucket in goodput.BUCKETS}

    @property
    def elapsed(self) -> float:
        """Seconds of this run: the sum of its account."""
        return sum(self.account().values())

    @property
    def total_tokens(self) -> int:
        return self._tokens

    def get_state(self) -> dict[str, Any]:
        """JSON for the checkpoint."""
        return {'tokens': self._tokens, 'seconds': self.account()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where a checkpoint left off, beside what this process took so far.

        Speeds are measured anew.
        """
        self._tokens = state['tokens']
        self.seconds.update(state['seconds'])  # of a Counter: adds
        self._restored_seconds = sum(state['seconds'].values())
        self._window_started = self.seconds['step'] + self.seconds['data_wait']

    def waste(self, elapsed: float) -> float:
        """An earlier process was seen at `elapsed`: what it did since its checkpoint is wasted.

        Returns those seconds, which are time of this run too.
        """
        lost = max(elapsed - self._restored_seconds, 0.0)
        self.seconds['wasted'] += lost
        return lost

    def _turn_to(self, bucket: str) -> None:
        """The time since the last turn belongs to the bucket until now; from now on to this one."""
        now = self._now()
        self.seconds[self._bucket] += now - self._turned
        self._turned, self._bucket = now, bucket

    def _smooth(self, step_seconds: float) -> None:
        last = step_seconds if self._step_seconds is None else self._step_seconds
        self._step_seconds = _SMOOTHING * last + (1 - _SMOOTHING) * step_seconds


def process_start() -> float:
    """When this process was started, on the monotonic clock; `exec` does not make it younger."""
    if not sys.platform.startswith('linux'):
        return _IMPORTED
    fields = Path('/proc/self/stat').read_text().rpartition(')')[2].split()
    since_boot = int(fields[19]) / os.sysconf('SC_CLK_TCK')  # `starttime` of proc_pid_stat(5)
    return time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)

"""Measures where the time of a run goes: throughput, MFU, time remaining.

It uses the monotonic clock, so setting the system clock during a run has no effect.
"""

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxfm.metrics import goodput

# One unusual step (say, after a long evaluation) must not move the estimate much, but a lasting
# change must.
_SMOOTHING = 0.7
_IMPORTED = time.monotonic()
_STAT = Path('/proc/self/stat')


class StepClock:
    """Counts tokens and steps between two logs, and charges every second of a run to a bucket.

    total_steps: of the run. peak_flops: FLOP/s of all devices together. now: a monotonic clock, in
    seconds. started: when the process started, on that clock; None means now.

    The caller sets `flops_per_token`, the model FLOPs of training on a token. MFU needs it and
    peak_flops. `seconds` is {bucket of `goodput.BUCKETS`: seconds}, over this process and the
    earlier ones of the run, up to the last change of bucket.
    """

    def __init__(
        self,
        total_steps: int,
        peak_flops: float | None = None,
        now: Callable[[], float] = time.monotonic,
        started: float | None = None,
    ):
        self._total_steps = total_steps
        self.flops_per_token: float | None = None
        self._peak_flops = peak_flops
        self._now = now
        self._turned = now() if started is None else started
        self._bucket = self._ground = 'init'  # ground: the bucket for time not charged elsewhere
        self.seconds: Counter[str] = Counter()
        self._restored_seconds = 0.0
        self._tokens = self._steps = 0
        self._window_tokens = self._window_steps = 0
        self._window_started = 0.0
        self._step_seconds: float | None = None
        self._between_at_start = 0.0

    def step(self, tokens: int) -> None:
        """Counts one dispatched training step. tokens: of the global batch."""
        if not self._steps:
            self._between_at_start = self._between
        self._window_steps += 1
        self._window_tokens += tokens
        self._steps += 1
        self._tokens += tokens

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """A context for the training loop: time is charged to `step`, and to `other` afterwards."""
        self._ground = 'step'
        self._turn_to('step')
        try:
            yield
        finally:
            self._ground = 'other'
            self._turn_to('other')

    @contextlib.contextmanager
    def aside(self, bucket: str) -> Iterator[None]:
        """A context that charges its time to another bucket, such as `eval` or `data_wait`.

        If contexts are nested, all of the time goes to the outer one.
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
        """The values for a `perf` record of the window since the last log; starts a new window.

        Call it after the last dispatched step has finished, or the measured time is too short.
        """
        account = self.account()
        training = self._training_seconds
        seconds = max(training - self._window_started, 1e-9)
        steps, tokens = self._window_steps, self._window_tokens
        self._window_started = training
        self._window_steps = self._window_tokens = 0
        values = {'perf/elapsed_seconds': sum(account.values()), 'perf/total_tokens': self._tokens}
        values |= goodput.values(account)
        if not steps:
            return values
        if steps < self._steps or steps > 1:  # the very first step says little about later ones
            self._smooth(seconds / steps)
        values['perf/tokens_per_second'] = tokens / seconds
        values['perf/step_seconds'] = seconds / steps
        if self.flops_per_token and self._peak_flops:
            values['perf/mfu'] = self.flops_per_token * tokens / seconds / self._peak_flops
        if (eta := self.eta(step)) is not None:
            values['perf/eta_seconds'] = eta
        return values

    def eta(self, step: int) -> float | None:
        """Seconds from `step` to the end of the run; None until a log has measured a second step.

        It assumes the recent step time, plus the average cost per step of evaluation and saving so
        far, without what happened before the first step.
        """
        if self._step_seconds is None:
            return None
        between = (self._between - self._between_at_start) / self._steps
        return max(self._total_steps - step, 0) * (self._step_seconds + between)

    @property
    def _training_seconds(self) -> float:
        # Waiting for data counts, so that a data-starved run does not look fast.
        return sum(self.seconds[bucket] for bucket in ('step', 'data_wait', 'generate'))

    @property
    def _between(self) -> float:
        return self.seconds['eval'] + self.seconds['checkpoint_save']

    def account(self) -> dict[str, float]:
        """{bucket: seconds} over all processes of this run so far, without gaps between them."""
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
        """The state to save in a checkpoint, as JSON."""
        return {'tokens': self._tokens, 'seconds': self.account()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Adds the tokens and seconds of a checkpoint to what this process has used so far.

        Step times are measured anew.
        """
        self._tokens = state['tokens']
        self.seconds.update(state['seconds'])  # Counter.update adds
        self._restored_seconds = sum(state['seconds'].values())
        self._window_started = self._training_seconds

    def go_back(self, state: dict[str, Any] | None) -> None:
        """Returns to the state of a checkpoint, or to the beginning; the time since is `wasted`."""
        state = state or {'tokens': 0, 'seconds': {}}
        elapsed = self.elapsed
        self.seconds = Counter(state['seconds'])
        self.seconds['wasted'] += elapsed - sum(state['seconds'].values())
        self._tokens = state['tokens']
        self._steps = self._window_tokens = self._window_steps = 0
        self._window_started = self._training_seconds

    def waste(self, elapsed: float) -> float:
        """Charges the time that an earlier process lost after its checkpoint to `wasted`.

        elapsed: the last value of perf/elapsed_seconds that the process recorded. Returns the lost
        seconds, which also count as time of this run.
        """
        lost = max(elapsed - self._restored_seconds, 0.0)
        self.seconds['wasted'] += lost
        return lost

    def _turn_to(self, bucket: str) -> None:
        """Charges the time since the last change to the old bucket and switches to `bucket`."""
        now = self._now()
        self.seconds[self._bucket] += now - self._turned
        self._turned, self._bucket = now, bucket

    def _smooth(self, step_seconds: float) -> None:
        last = step_seconds if self._step_seconds is None else self._step_seconds
        self._step_seconds = _SMOOTHING * last + (1 - _SMOOTHING) * step_seconds


def process_start() -> float:
    """When this process was started, in seconds of the monotonic clock; `exec` keeps it.

    Without /proc (macOS): when this module was imported.
    """
    try:
        fields = _STAT.read_bytes().rpartition(b')')[2].split()
    except OSError:
        return _IMPORTED
    since_boot = int(fields[19]) / os.sysconf('SC_CLK_TCK')  # `starttime` of proc_pid_stat(5)
    return time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)

"""Goodput: which buckets the wall time of a run went to, and how often to save a checkpoint.

Every second of every process of a run belongs to exactly one bucket, so the buckets add up to the
time of the run. `StepClock` measures them, checkpoints store them, and `perf` records report them.
"""

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path

from jaxfm.errors import DataError
from jaxfm.metrics.writers import read_records

BUCKETS = (
    'init',  # from the start of the process to the training loop
    'compile',  # the first step of a loop, until it is compiled and dispatched
    'data_wait',  # the loop waits for a batch; devices may still be computing the previous step
    'generate',  # the loop samples a batch from the model, and has it judged
    'step',
    'eval',
    'checkpoint_save',  # only while it blocks the loop
    'checkpoint_restore',
    'wasted',  # after a checkpoint at which the run resumed, or to which it went back
    'other',  # after the loop, such as the final samples
)
PREFIX = 'goodput/'  # of metric names in records
_DAY = 24 * 60 * 60


def name_of(bucket: str) -> str:
    """The metric name of a bucket's seconds in records."""
    return f'{PREFIX}{bucket}_seconds'


def values(account: Mapping[str, float]) -> dict[str, float]:
    """The values for a record: the seconds of each bucket, and the share of what trains.

    That is the steps, and sampling the batches of those that learn from samples.
    """
    elapsed = sum(account.values())
    ratio = (account['step'] + account['generate']) / elapsed if elapsed else 0.0
    return {name_of(bucket): account[bucket] for bucket in BUCKETS} | {f'{PREFIX}ratio': ratio}


def last_elapsed(path: str | Path, position: int) -> float:
    """perf/elapsed_seconds of the last `perf` record after a byte position; 0 if there is none.

    path: of metrics.jsonl. A process that ends normally writes none after its last checkpoint.
    """
    elapsed = 0.0
    # Records after the last checkpoint may be damaged; the caller cuts them off next.
    with contextlib.suppress(DataError):
        for record in read_records(path, position):
            if record['kind'] == 'perf':
                elapsed = record.get('perf/elapsed_seconds', elapsed)
    return elapsed


def checkpoint_every(
    blocking_seconds: float, save_seconds: float, step_seconds: float, failures_per_day: float
) -> int:
    """The number of steps between two saves that wastes the least time.

    Young's first-order optimum (J. W. Young, CACM 17(9), 1974): each save costs the time it blocks
    training, and each failure costs half an interval on average. The higher-order terms of J. T.
    Daly (Future Generation Computer Systems 22(3), 2006) matter only if saves block for much of the
    time between failures.

    Args:
      blocking_seconds: how long a save blocks training.
      save_seconds: from the start of a save until it is durable; saves must not overlap.
      step_seconds: time of one training step.
    """
    seconds = math.sqrt(2 * blocking_seconds * _DAY / failures_per_day)
    return max(1, round(seconds / step_seconds), math.ceil(save_seconds / step_seconds))

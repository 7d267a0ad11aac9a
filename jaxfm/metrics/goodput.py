"""Where the wall time of a run went, and how often to save so that little of it is lost.

Every second of every process of a run is in one bucket, so the buckets add up to the time of the
run. The clock keeps them, checkpoints carry them, `perf` records tell them.
"""

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path

from jaxfm.errors import DataError
from jaxfm.metrics.writers import read_records

BUCKETS = (
    'init',  # from the start of a process to its loop
    'compile',  # the first step of a loop, until it is compiled and asked for
    'data_wait',  # the loop waits for a batch, though the devices may yet compute the step before
    'step',
    'eval',
    'checkpoint_save',  # as long as it holds up the loop
    'checkpoint_restore',
    'wasted',  # after the last checkpoint of a process that died, whatever it did
    'other',  # outside the loop, such as the last samples
)
PREFIX = 'goodput/'  # of the names in records
_DAY = 24 * 60 * 60


def name_of(bucket: str) -> str:
    """What records call the seconds of a bucket."""
    return f'{PREFIX}{bucket}_seconds'


def values(account: Mapping[str, float]) -> dict[str, float]:
    """{bucket: seconds so far} as values of a record, with the share of training steps."""
    elapsed = sum(account.values())
    ratio = account['step'] / elapsed if elapsed else 0.0
    return {name_of(bucket): account[bucket] for bucket in BUCKETS} | {f'{PREFIX}ratio': ratio}


def last_elapsed(path: str | Path, position: int) -> float:
    """The seconds of the run in the last `perf` record after a position of metrics.jsonl; else 0.

    A process that ends in order writes none after its last checkpoint.
    """
    elapsed = 0.0
    # What no checkpoint vouches for may be broken, and is cut off after this.
    with contextlib.suppress(DataError):
        for record in read_records(path, position):
            if record['kind'] == 'perf':
                elapsed = record.get('perf/elapsed_seconds', elapsed)
    return elapsed


def checkpoint_every(
    blocking_seconds: float, save_seconds: float, step_seconds: float, failures_per_day: float
) -> int:
    """Steps between two saves that waste the least time, by what was measured.

    Young's first-order optimum (J. W. Young, CACM 17(9), 1974): a save costs what it blocks, a
    failure costs half an interval. The further terms of J. T. Daly (Future Generation Computer
    Systems 22(3), 2006) matter only where a save blocks for a good part of the time between
    failures.

    Args:
      blocking_seconds: how long training stands still for a save.
      save_seconds: from its start until it is durable; the next one must not begin earlier.
    """
    seconds = math.sqrt(2 * blocking_seconds * _DAY / failures_per_day)
    return max(1, round(seconds / step_seconds), math.ceil(save_seconds / step_seconds))

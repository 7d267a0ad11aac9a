"""Where the wall time of a run went.

Every second of every process of a run is in one bucket, so the buckets add up to the time of the
run. The clock keeps them, checkpoints carry them, `perf` records tell them.
"""

from collections.abc import Mapping

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


def name_of(bucket: str) -> str:
    """What records call the seconds of a bucket."""
    return f'{PREFIX}{bucket}_seconds'


def values(account: Mapping[str, float]) -> dict[str, float]:
    """{bucket: seconds so far} as values of a record, with the share of training steps."""
    elapsed = sum(account.values())
    ratio = account['step'] / elapsed if elapsed else 0.0
    return {name_of(bucket): account[bucket] for bucket in BUCKETS} | {f'{PREFIX}ratio': ratio}

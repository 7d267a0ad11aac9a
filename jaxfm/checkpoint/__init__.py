"""Checkpoints: the state of a run on storage, committed whole or not at all, verified when read.

`checkpointer` saves the train state with the position of its source and its clocks, in a thread
(`saver`); `reader` restores it where it fits (`fit`); `store` says how checkpoints lie on storage;
`arrays` writes and reads them with TensorStore; `fingerprint` recognises them on any mesh; `verify`
reads a step back; `survey` shows what is there.
"""

from pydantic import Field

from jaxfm.schema import Group


class LocalConfig(Group):
    """A fast tier beside the durable one: disks of the hosts, each with what its process holds."""

    # A directory of each host, for any number of runs.
    directory: str
    # Steps between two saves there.
    every: int = Field(default=100, ge=1)
    keep: int = Field(default=1, ge=1)


class CheckpointConfig(Group):
    """Where checkpoints go, how many stay, and what happens when that fails."""

    # A directory or s3://bucket/prefix; '' is `checkpoints` inside the work directory of the run.
    directory: str = ''
    # Steps between two saves; 0 saves only at the end and when a signal stops the run.
    every: int = Field(default=1000, ge=0)
    # The newest committed checkpoints that stay; older ones are deleted.
    keep: int = Field(default=2, ge=1)
    # A save or a restore that takes longer has failed. A request that gets no answer gives up much
    # earlier.
    timeout_seconds: float = Field(default=1800, gt=0)
    # Saves in a row that may fail before the run stops; each of them is told and counted.
    max_failures: int = Field(default=3, ge=1)
    # A run that has given no sign of life for so long may be replaced by another one.
    lease_seconds: float = Field(default=30, gt=0)
    local: LocalConfig | None = None

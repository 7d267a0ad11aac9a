"""Checkpoints: a run's state on storage, committed atomically and verified on every read.

`checkpointer` saves the train state, the data position and the clocks; `saver` does the writing in
a background thread. `reader` restores a step, after `fit` has compared names, shapes and dtypes.
`store` defines the layout on storage, `arrays` reads and writes arrays with TensorStore,
`fingerprint` hashes arrays independently of the mesh, `verify` checks a whole step, and `survey`
lists what is stored.
"""

from pydantic import Field

from jaxfm.schema import Group


class LocalConfig(Group):
    """A fast tier on each host's own disk, in addition to the durable one.

    Each process saves the shards that it holds.
    """

    # A directory on each host; several runs may share it.
    directory: str
    # Steps between two local saves.
    every: int = Field(default=100, ge=1)
    keep: int = Field(default=2, ge=2)


class CheckpointConfig(Group):
    """Where checkpoints go, how often to save, how many to keep, and how failures are handled."""

    # A directory or s3://bucket/prefix; '' means `checkpoints` inside the run's work directory.
    directory: str = ''
    # Steps between two saves; 0 saves only at the end and when a signal stops the run.
    every: int = Field(default=1000, ge=0)
    # How many of the newest committed checkpoints to keep; older ones are deleted. The newest one
    # may hold the result of an update that ruined the weights, so at least one more is kept.
    keep: int = Field(default=2, ge=2)
    # A save or restore that takes longer than this fails. A single request that gets no answer
    # gives up much earlier.
    timeout_seconds: float = Field(default=1800, gt=0)
    # Consecutive failed saves after which the run stops; each failure is logged and counted.
    max_failures: int = Field(default=3, ge=1)
    # Another run may take over when the holder of the lease has not renewed it for this long.
    lease_seconds: float = Field(default=30, gt=0)
    # Of a run with adapters, also save the frozen weights that they adapt. Otherwise these are read
    # again from `init_from`, which must stay as it is.
    include_frozen: bool = False
    local: LocalConfig | None = None

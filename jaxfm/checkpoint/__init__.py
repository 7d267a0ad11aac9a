"""Checkpoints: the state of a run on storage, committed whole or not at all.

`checkpointer` saves and restores the train state with the position of its source and its clocks.
"""

from pydantic import Field

from jaxfm.schema import Group


class CheckpointConfig(Group):
    """Where checkpoints go and how many stay."""

    # A directory; '' is `checkpoints` inside the work directory of the run.
    directory: str = ''
    # Steps between two saves; 0 saves only at the end and when a signal stops the run.
    every: int = Field(default=1000, ge=0)
    # The newest committed checkpoints that stay; older ones are deleted.
    keep: int = Field(default=2, ge=1)

"""What a run measures: its records, clocks, console and report.

`writers` keeps metrics.jsonl, the truth; `clock` counts tokens and time, `goodput` says what for;
`console` tells a person; `report` draws the finished run from the files alone. This room imports
nothing of ours but errors.
"""

from pydantic import Field

from jaxfm.schema import Group


class MetricsConfig(Group):
    """How often the run says how it goes."""

    # Steps between two train records; the first and the last step are always logged.
    log_every: int = Field(default=10, ge=1)

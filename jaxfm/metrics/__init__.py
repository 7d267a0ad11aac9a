"""What a run measures: its records, clocks and console.

`writers` keeps metrics.jsonl, the truth; `clock` counts tokens and time, `goodput` says what for;
`console` tells a person. This room imports nothing of ours but errors.
"""

from pydantic import Field

from jaxfm.schema import Group


class MetricsConfig(Group):
    """How often the run says how it goes."""

    # Steps between two train records; the first and the last step are always logged.
    log_every: int = Field(default=10, ge=1)
    # Failures of the whole job a day, all hosts together: for these the report recommends a
    # checkpoint.every, once saves were measured; 0 is no recommendation.
    failures_per_day: float = Field(default=1.0, ge=0)

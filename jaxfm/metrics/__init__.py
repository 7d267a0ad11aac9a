"""What a run measures: its records, clocks and console.

`writers` keeps metrics.jsonl, the truth; `clock` counts tokens and time, `goodput` says what for;
`console` tells a person. This room imports no other but storage.
"""

from pydantic import Field

from jaxfm.registry import Registry, one_of
from jaxfm.schema import Group

# What hears the records beside metrics.jsonl and the console: built as `Sink(group, workdir)`.
SINKS = Registry({}, base=Group)


class MetricsConfig(Group):
    """How often the run says how it goes."""

    # Steps between two train records; the first and the last step are always logged.
    log_every: int = Field(default=10, ge=1)
    # Failures of the whole job a day, all hosts together: for these the report recommends a
    # checkpoint.every, once saves were measured; 0 is no recommendation.
    failures_per_day: float = Field(default=1.0, ge=0)
    # By any name: writers of your own, each as `dict(name='module:Class', ...)`.
    sinks: dict[str, one_of(SINKS)] = {}

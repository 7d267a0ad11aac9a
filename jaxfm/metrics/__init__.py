"""What a run measures: records, clocks and the console.

`writers` writes metrics.jsonl, from which everything else is derived. `clock` counts tokens and
time, `goodput` defines the buckets that time is charged to, `devices` knows the peak FLOP/s of
devices, and `console` shows progress. It imports no other package except storage.
"""

from pydantic import Field

from jaxfm.registry import Registry, one_of
from jaxfm.schema import Group

# Other receivers of the records, besides metrics.jsonl and the console; built as
# `Sink(group, workdir)`.
SINKS = Registry({}, base=Group)


class MetricsConfig(Group):
    """How often a run logs, and where its records go."""

    # Steps between two train records; the first and the last step are always logged.
    log_every: int = Field(default=10, ge=1)
    # Expected failures of the whole job per day, over all hosts. From this and the measured time of
    # saves, the report recommends a checkpoint.every; 0 turns the recommendation off.
    failures_per_day: float = Field(default=1.0, ge=0)
    # Your own sinks, {any name: dict(name='module:Class', ...)}.
    sinks: dict[str, one_of(SINKS)] = {}


def is_detail(name: str) -> bool:
    """Whether a metric is a count or a cost of an evaluation: no line and no plot shows those."""
    kind, _, rest = name.partition('/')
    return kind == 'eval' and rest.partition('/')[2].startswith(('samples/', 'cost/'))

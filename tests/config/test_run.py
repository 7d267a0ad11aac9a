"""What a config says of its phases."""

import pytest

from jaxfm.config.run import RunConfig
from tests.config.test_messages import MODEL, PHASES, RUN


@pytest.mark.parametrize(
    'values, names, steps',
    [
        (RUN, [''], 100),
        (PHASES, ['first', 'second'], 200),
        # It samples from a model, and trains nothing.
        ({'init_from': 'earlier', 'model': MODEL}, [], 0),
    ],
    ids=['one', 'two', 'none'],
)
def test_phases_are_those_listed_or_the_run_itself_or_none(values, names, steps):
    config = RunConfig(**values | {'model': {'name': 'transformer'} | MODEL})
    assert [phase.name for phase in config.all_phases] == names
    assert config.total_steps == steps

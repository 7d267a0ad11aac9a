"""What the checks of kernels share: the interpreter with its race detector."""

import pytest

from pallas_kernels._compat import interpreted_races


@pytest.fixture
def interpreter():
    """A clean interpreter; a test in which it has seen a race fails."""
    with interpreted_races() as found:
        yield found
        assert not found(), 'the interpreter has found a race (printed above)'

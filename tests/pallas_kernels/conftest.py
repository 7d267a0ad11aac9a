import pytest


@pytest.fixture(autouse=True)
def _quick_programs(quick_programs):
    """For every test of a kernel."""

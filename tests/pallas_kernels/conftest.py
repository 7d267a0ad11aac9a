"""What the checks of kernels share: the interpreter with its race detector, and the compiler."""

import importlib.util

import pytest

from pallas_kernels._compat import interpreted_races


@pytest.fixture
def interpreter():
    """A clean interpreter; a test in which it has seen a race fails."""
    with interpreted_races() as found:
        yield found
        assert not found(), 'the interpreter has found a race (printed above)'


@pytest.fixture(scope='session')
def gpu_compiler():
    """Skips where the compiler for GPUs is not installed."""
    for package in ('jax_cuda13_plugin', 'nvidia'):
        if importlib.util.find_spec(package) is None:
            pytest.skip('no compiler for GPUs: pip install -e ".[gpu_compiler]"')

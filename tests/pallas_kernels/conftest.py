"""Kernels are interpreted as CPU programs, which are large, run once, and take long to compile."""

import jax
import pytest

OPTION = 'jax_disable_most_optimizations'


@pytest.fixture(autouse=True)
def quick_programs(request):
    """Programs that compile quickly, except where the machine code for a GPU is judged."""
    before = jax.config.read(OPTION)
    jax.config.update(OPTION, 'gpu_compiler' not in request.fixturenames)
    yield
    jax.config.update(OPTION, before)

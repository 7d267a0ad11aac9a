"""The session keeps its own promises."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

ROOT = Path(__file__).resolve().parent.parent

SKIPPING = """
import pytest

def test_that_skips():
    pytest.skip('no such service')

@pytest.mark.gpu
def test_on_a_gpu():
    pass

@pytest.mark.xfail
def test_that_is_expected_to_fail():
    assert False
"""


def run_pytest(directory, source, **environment):
    """The last line of pytest over one file of tests, under the repository's conftest."""
    conftest = Path(__file__).with_name('conftest.py').read_text()
    (directory / 'conftest.py').write_text(conftest)
    (directory / 'test_planted.py').write_text(source)
    (directory / 'pytest.ini').write_text('[pytest]\nmarkers = gpu\n')
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', str(directory)]
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, cwd=ROOT
    )
    return result.stdout


def test_there_are_eight_cpu_devices():
    assert [device.platform for device in jax.devices()] == ['cpu'] * 8


def test_rank_promotion_raises():
    with pytest.raises(ValueError, match='rank'):
        jnp.zeros((2, 3)) + jnp.zeros(3)


def test_a_skip_says_why(tmp_path):
    assert '2 skipped, 1 xfailed' in run_pytest(tmp_path, SKIPPING)


def test_a_skip_is_an_error_under_the_switch_except_on_a_gpu(tmp_path):
    output = run_pytest(tmp_path, SKIPPING, JAXFM_NO_SKIP='1')
    assert 'no such service' in output
    assert '1 failed, 1 skipped, 1 xfailed' in output


def test_a_module_that_skips_is_an_error_under_the_switch(tmp_path):
    source = "import pytest\npytest.importorskip('no_such_module')\n"
    output = run_pytest(tmp_path, source, JAXFM_NO_SKIP='1')
    assert 'nothing may skip here' in output
    assert '1 error' in output

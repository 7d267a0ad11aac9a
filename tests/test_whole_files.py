"""A session with several workers survives the death of one."""

import subprocess
import sys

from tests.conftest import ROOT
from tests.runs import PATIENCE

CONFTEST = """
import pytest

@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from tests.whole_files import WholeFiles
    return WholeFiles(config, log)
"""
GOOD = """
import time

def test_first(): time.sleep(0.05)
def test_second(): time.sleep(0.05)
"""
DEADLY = """
import os
import time
import pytest

@pytest.mark.parametrize('number', range(5))
def test_number(number):
    time.sleep(0.1)
    if number == 3:
        os.kill(os.getpid(), 9)
"""


def test_all_other_tests_run_once_if_a_worker_dies_in_the_last_file(tmp_path):
    (tmp_path / 'conftest.py').write_text(CONFTEST)
    for number in range(4):
        (tmp_path / f'test_{number}.py').write_text(GOOD)
    (tmp_path / 'test_last.py').write_text(DEADLY)
    (tmp_path / 'pytest.ini').write_text('[pytest]\n')
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-n', '2', '-p', 'no:cacheprovider'],
        cwd=tmp_path,
        env={'PATH': '', 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert "crashed while running 'test_last.py::test_number[3]'" in done.stdout, done.stderr
    assert '1 failed, 12 passed' in done.stdout

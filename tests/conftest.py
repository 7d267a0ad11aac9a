"""The strict session: eight CPU devices, rank promotion raises, warnings are errors.

JAXFM_NO_SKIP=1, set by .ci/run, makes every skip an error, except of tests marked `gpu`. Tests so
marked run with `-m gpu`, alone, because the others need the CPU devices.
"""

import os
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent


def _wants_gpu(config) -> bool:
    return config.getoption('markexpr').strip() == 'gpu'


def pytest_configure(config):
    if not _wants_gpu(config):
        os.environ['JAX_PLATFORMS'] = 'cpu'  # for the processes that tests start
        jax.config.update('jax_platforms', 'cpu')
        jax.config.update('jax_num_cpu_devices', 8)
    jax.config.update('jax_numpy_rank_promotion', 'raise')


def pytest_runtest_setup(item):
    if item.get_closest_marker('gpu'):
        if not _wants_gpu(item.config):
            pytest.skip('needs a GPU: run with -m gpu')
        if jax.default_backend() != 'gpu':
            pytest.skip(f'needs a GPU: the devices here are {jax.default_backend()}')


def _forbid_skip(report):
    """Turns the report of a skip into one of a failure; an expected failure is no skip."""
    is_skip = report.skipped and not hasattr(report, 'wasxfail')
    if is_skip and os.environ.get('JAXFM_NO_SKIP') == '1':
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = 'failed'
        report.longrepr = f'{report.nodeid}: nothing may skip here (JAXFM_NO_SKIP=1), but: {reason}'


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if not item.get_closest_marker('gpu'):
        _forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    report = yield
    _forbid_skip(report)
    return report


@pytest.fixture(scope='session')
def shared_data() -> Path:
    """The directory of shared corpora and evaluation sets, beside or in the repository."""
    for directory in (ROOT / 'shared' / 'data', ROOT.parent / 'shared' / 'data'):
        if directory.is_dir():
            return directory
    pytest.skip('no shared/data in the repository or beside it')

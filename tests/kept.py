"""What a test session keeps for the next one, in the user's cache directory, never in git.

Compiled programs: many tests spend half of their time in XLA's compiler.

Ids of kernel tests that passed: these tests take a quarter of the time of the suite, and most
changes do not touch kernels. A session that runs all tests leaves out kernel tests that have passed
with the same sources, package versions and Python. A session that names tests runs all of them.

JAXFM_TEST_COLD=1 ignores all of this.
"""

import atexit
import hashlib
import os
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import jax

from jaxfm.run import cache

ROOT = Path(__file__).resolve().parent.parent
KERNEL_TESTS = 'tests/pallas_kernels'
# Everything in the repository that kernel tests import or depend on.
KERNEL_SOURCES = (
    'pallas_kernels',
    KERNEL_TESTS,
    'tests/conftest.py',
    'tools/deviceless.py',
    'tools/hlo.py',
    'tools/traffic.py',
    'jaxfm/ops',
    'jaxfm/sharding.py',
)
KERNEL_PACKAGES = (
    'jax',
    'jaxlib',
    'numpy',
    'ml_dtypes',
    'jax-cuda13-plugin',
    'jax-cuda13-pjrt',
    'nvidia-cuda-nvcc',
    'nvidia-nvvm',
    'nvidia-cuda-nvdisasm',
)


def is_cold() -> bool:
    return os.environ.get('JAXFM_TEST_COLD') == '1'


def directory() -> Path:
    """Where sessions keep files; JAXFM_TEST_CACHE overrides it."""
    return Path(os.environ.get('JAXFM_TEST_CACHE') or cache.cache_directory() / 'tests')


def keep_compiled_programs() -> None:
    """Turns on jax's compilation cache for this session and the processes that it starts."""
    if is_cold() and 'JAXFM_TEST_CACHE' not in os.environ:
        # The workers of this session inherit the variable and share the directory.
        os.environ['JAXFM_TEST_CACHE'] = tempfile.mkdtemp(prefix='jaxfm-tests-')
        atexit.register(shutil.rmtree, os.environ['JAXFM_TEST_CACHE'], ignore_errors=True)
    compiled = directory() / 'compiled'
    compiled.mkdir(parents=True, exist_ok=True)
    cache.keep_compiled_programs(compiled, min_seconds=0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def link_compiled_programs(path: Path) -> None:
    """Links `path`, the compilation cache of runs, to the programs kept by sessions."""
    path.parent.mkdir(parents=True)
    path.symlink_to(directory() / 'compiled')


class KernelTests:
    """A pytest plugin that leaves out kernel tests that have passed, and records new ones."""

    def __init__(self):
        self.path = directory() / 'kernels' / _digest_of_kernels()
        self.known = set(self.path.read_text().splitlines()) if self.path.exists() else set()
        self._passed, self._failed = set(), set()

    def pytest_collection_modifyitems(self, config, items) -> None:
        if not _is_over_everything(config):
            return
        known = [item for item in items if item.nodeid in self.known]
        config.hook.pytest_deselected(items=known)
        items[:] = [item for item in items if item.nodeid not in self.known]

    def pytest_runtest_logreport(self, report) -> None:
        if report.nodeid.startswith(KERNEL_TESTS):
            if not report.passed:
                self._failed.add(report.nodeid)
            elif report.when == 'call':
                self._passed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        new = sorted(self._passed - self._failed - self.known)
        if new and not is_cold():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, 'a') as file:  # several workers append to it
                file.write(''.join(f'{line}\n' for line in new))

    def pytest_terminal_summary(self, terminalreporter, config) -> None:
        if self.known and _is_over_everything(config):
            terminalreporter.write_line(
                f'{len(self.known)} kernel tests were left out: they passed before with the same '
                'sources and versions (JAXFM_TEST_COLD=1 runs them)'
            )


def _is_over_everything(config) -> bool:
    """Whether the session runs all tests: none is named on the command line."""
    return not is_cold() and config.args == config.getini('testpaths')


def _digest_of_kernels() -> str:
    digest = hashlib.sha256(sys.version.encode())
    for name in KERNEL_PACKAGES:
        digest.update(f'{name} {_version(name)}\n'.encode())
    for source in KERNEL_SOURCES:
        path = ROOT / source
        for file in sorted(path.rglob('*')) if path.is_dir() else [path]:
            if file.suffix in ('.py', '.json'):
                digest.update(f'{file.relative_to(ROOT)}\n'.encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return 'absent'

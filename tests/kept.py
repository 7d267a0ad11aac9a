"""What test sessions keep for the next one, in the user's cache directory, never in the repository.

Compiled programs: half of the time of many tests is XLA's. JAXFM_TEST_COLD=1 starts with none.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import jax

IS_COLD = os.environ.get('JAXFM_TEST_COLD') == '1'


def directory() -> Path:
    """Where sessions keep things; JAXFM_TEST_CACHE names another place."""
    default = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'jaxfm' / 'tests'
    return Path(os.environ.get('JAXFM_TEST_CACHE') or default)


def keep_compiled_programs() -> None:
    """Turns jax's compilation cache on for this session and the processes that it starts."""
    if IS_COLD and 'JAXFM_TEST_CACHE' not in os.environ:
        # The workers of this session inherit it and share it.
        os.environ['JAXFM_TEST_CACHE'] = tempfile.mkdtemp(prefix='jaxfm-tests-')
        atexit.register(shutil.rmtree, os.environ['JAXFM_TEST_CACHE'], ignore_errors=True)
    compiled = directory() / 'compiled'
    compiled.mkdir(parents=True, exist_ok=True)
    jax.config.update('jax_compilation_cache_dir', str(compiled))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def link_compiled_programs(path: Path) -> None:
    """Gives runs whose cache directory holds `path` the same programs."""
    path.parent.mkdir(parents=True)
    path.symlink_to(directory() / 'compiled')

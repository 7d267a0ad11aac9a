"""The user's cache directory, and the compiled programs in it."""

import os
import uuid
from pathlib import Path

import jax
from jax._src import lru_cache


def cache_directory() -> Path:
    """The directory of compiled programs and tokenised data. It may be deleted at any time."""
    home = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(home) / 'jaxfm'


def keep_compiled_programs(directory: Path, min_seconds: float) -> None:
    """Makes JAX keep programs that took `min_seconds` to compile, for later processes to load."""
    lru_cache.LRUCache.put = _put
    jax.config.update('jax_compilation_cache_dir', str(directory))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', min_seconds)


def _put(self, key: str, value: bytes) -> None:
    """Replaces JAX's method, which writes the file in place and never replaces it.

    If a process were killed while it writes, all later ones would warn and compile again, and two
    writers at once could leave a mixture of two programs. The file is not synced: after a power cut
    the program is compiled again.
    """
    path = Path(self.path, f'{key}{lru_cache._CACHE_SUFFIX}')
    if not path.exists():
        temporary = path.with_name(f'.{uuid.uuid4().hex}.tmp')
        temporary.write_bytes(value)
        temporary.replace(path)

"""The user's cache directory, and the compiled programs in it."""

import hashlib
import os
import platform
import re
import uuid
from pathlib import Path

import jax
from jax._src import lru_cache

# Fields of /proc/cpuinfo on x86 and on Arm.
KIND_OF_PROCESSOR = (
    *('vendor_id', 'cpu family', 'model', 'flags'),
    *('CPU implementer', 'CPU variant', 'CPU part', 'Features'),
)


def cache_directory() -> Path:
    """The directory of compiled programs and tokenised data. It may be deleted at any time."""
    home = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(home) / 'jaxfm'


def keep_compiled_programs(directory: Path, min_seconds: float) -> None:
    """Makes JAX keep programs that took `min_seconds` to compile, for later processes to load.

    They lie in a subdirectory for this kind of processor. XLA compiles for all instructions that
    the processor has, but JAX does not look at the processor when it loads a program, which may
    kill the process on another machine with the same home directory.
    """
    lru_cache.LRUCache.put = _put
    jax.config.update('jax_compilation_cache_dir', str(directory / _kind_of_processor()))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', min_seconds)


def _kind_of_processor(cpuinfo: Path = Path('/proc/cpuinfo')) -> str:
    """A name that differs between processors with different instructions."""
    try:
        first = cpuinfo.read_text('utf-8').partition('\n\n')[0]
    except OSError:  # not Linux: a name for each machine
        first = ''
    fields = dict(re.findall(r'^(.+?)\s*: (.*)$', first, re.MULTILINE))
    kind = [fields.get(name) for name in KIND_OF_PROCESSOR]
    if not any(kind):
        kind = [platform.machine(), platform.processor(), platform.node()]
    return hashlib.sha256(repr(kind).encode()).hexdigest()[:16]


_put_in_place = lru_cache.LRUCache.put


def _put(self, key: str, value: bytes) -> None:
    """Replaces JAX's method, which writes the file in place and never replaces it.

    If a process were killed while it writes, all later ones would warn and compile again, and two
    writers at once could leave a mixture of two programs. The file is not synced: after a power cut
    the program is compiled again. With jax_compilation_cache_max_size, JAX takes a lock and evicts,
    so its method stays.
    """
    if self.eviction_enabled:
        return _put_in_place(self, key, value)
    path = Path(self.path, f'{key}{lru_cache._CACHE_SUFFIX}')
    if not path.exists():
        temporary = path.with_name(f'.{uuid.uuid4().hex}.tmp')
        try:
            temporary.write_bytes(value)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

"""Results from real GPUs: the fastest tile sizes, and the kernels that passed their tests.

Both are JSON files in the repository, which the benchmarks write.
"""

import functools
import hashlib
import json
import re
from pathlib import Path

import jax

DIRECTORY = Path(__file__).parent


def find(directory: Path, device_kind: str, **key) -> dict | None:
    """The tiles of the entry in `directory/tiles.json` for this device and key, or None.

    An entry is {"device", ..., "tiles": {...}, "measured": {"date", "microseconds"}}, where ... is
    the key (dtype, head_dim, a bucket of the size).
    """
    for entry in entries(directory):
        rest = {name: entry[name] for name in entry if name not in ('tiles', 'measured')}
        if rest == {'device': short_kind(device_kind), **key}:
            return entry['tiles']
    return None


def look_up(file: str, **key) -> dict | None:
    """`find` in the table next to a kernel's source file, for `target_device`."""
    return find(Path(file).parent, target_device().device_kind, **key)


def entries(directory: Path, name: str = 'tiles.json') -> list[dict]:
    """All entries of a table; empty if there is no such file."""
    return _read(Path(directory) / name)


def proof(op: str, device_kind: str) -> dict | None:
    """The entry of proven.json, if the kernel's current source is proven on that kind of device.

    It is {"op", "device", "date", "versions", "source": `source_digest`, "speed_over_xla": the
    lowest of all shapes, or null}.

    Args:
      op: the kernel's folder.
    """
    for entry in entries(DIRECTORY, 'proven.json'):
        same_kind = short_kind(entry['device']) == short_kind(device_kind)
        if entry['op'] == op and same_kind and entry['source'] == source_digest(op):
            return entry
    return None


@functools.cache
def source_digest(op: str) -> str:
    """Digest of a kernel's source (its folder and the shared modules), for which proofs hold."""
    digest = hashlib.sha256()
    shared = [DIRECTORY / name for name in ('_compat.py', '_padding.py')]
    for path in (*sorted((DIRECTORY / op).glob('*.py')), *shared):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def target_device() -> jax.sharding.AbstractDevice | jax.Device:
    """The device that programs are compiled for: the current mesh's, otherwise the default one."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    return described or jax.local_devices(backend=jax.default_backend())[0]


def short_kind(device_kind: str) -> str:
    """'NVIDIA H100 80GB HBM3' -> 'H100', the name of a device in tables."""
    found = re.search(r'\b(?:GH200|[ABHL]\d{2,3})\b', device_kind)
    return found[0] if found else device_kind


@functools.cache
def _read(path: Path) -> list[dict]:
    return json.loads(path.read_text('utf-8')) if path.exists() else []

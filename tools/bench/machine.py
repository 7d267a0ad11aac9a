"""The machine and versions that a result was measured with."""

import datetime
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from jaxfm.process import num_cores


def about(packages: tuple[str, ...]) -> dict[str, Any]:
    """Date, machine and versions, for every result."""
    return {
        'date': datetime.date.today().isoformat(),
        'cpu': _cpu(),
        'cores': num_cores(),
        'python': platform.python_version(),
        'versions': {name: importlib.metadata.version(name) for name in packages},
    }


def _cpu() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text('utf-8').splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(': ')[2] for line in lines if line.startswith('model name')), '')

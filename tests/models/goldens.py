"""Reads tests/goldens with numpy only; their README describes the contents."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

DIRECTORY = Path(__file__).resolve().parent.parent / 'goldens'
FAMILIES = sorted(path.parent.name for path in DIRECTORY.glob('*/config_v4.json'))
DTYPES = {
    'F32': np.float32,
    'F64': np.float64,
    'I32': np.int32,
    'U16': np.uint16,
    'U8': np.uint8,
    'BOOL': np.bool_,
}


@dataclass(frozen=True)
class Golden:
    """One directory: a checkpoint in Hugging Face's layout, and PyTorch's results for it."""

    name: str

    @property
    def path(self) -> Path:
        return DIRECTORY / self.name

    @cached_property
    def about(self) -> dict:
        return json.loads((self.path / 'golden.json').read_text())

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        return read_safetensors(self.path / 'golden.safetensors')

    def parameters(self, kind: str) -> dict[str, np.ndarray]:
        """`gradient` or `after` of every parameter, by HF name."""
        start = f'{kind}/'
        return {k.removeprefix(start): v for k, v in self.arrays.items() if k.startswith(start)}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of one file; supports only the dtypes in the goldens."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], 'little')
    header = json.loads(data[8 : 8 + size])
    header.pop('__metadata__', None)
    arrays = {}
    for name, entry in header.items():
        start, end = (8 + size + offset for offset in entry['data_offsets'])
        array = np.frombuffer(data[start:end], DTYPES[entry['dtype']])
        arrays[name] = array.reshape(entry['shape'])
    return arrays

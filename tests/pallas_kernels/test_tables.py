"""Tables of tile sizes and proofs: their content and lookups."""

import json

import pytest

from pallas_kernels import _tables
from pallas_kernels._tables import find, proof, short_kind


@pytest.mark.parametrize(
    'kind, short',
    [
        ('NVIDIA H100 80GB HBM3', 'H100'),
        ('NVIDIA H200', 'H200'),
        ('NVIDIA GH200 480GB', 'GH200'),
        ('NVIDIA A100-SXM4-40GB', 'A100'),
        ('cpu', 'cpu'),
    ],
)
def test_a_table_knows_a_device_by_a_short_name(kind, short):
    assert short_kind(kind) == short


def test_an_entry_is_found_by_its_whole_key(tmp_path):
    entry = {
        'device': 'H200',
        'dtype': 'bfloat16',
        'head_dim': 128,
        'tiles': {'rows': 64},
        'measured': {'date': '2026-11-27', 'microseconds': 12.5},
    }
    (tmp_path / 'tiles.json').write_text(json.dumps([entry]))
    key = dict(dtype='bfloat16', head_dim=128)
    assert find(tmp_path, 'NVIDIA H200', **key) == {'rows': 64}
    assert find(tmp_path, 'NVIDIA H100 80GB HBM3', **key) is None
    assert find(tmp_path, 'NVIDIA H200', **key | {'head_dim': 64}) is None
    assert find(tmp_path, 'NVIDIA H200', dtype='bfloat16') is None


def test_a_kernel_without_a_table_has_no_entries(tmp_path):
    assert find(tmp_path, 'NVIDIA H200', dtype='bfloat16') is None


def test_what_is_proven_says_when_and_on_what():
    for entry in _tables.entries(_tables.DIRECTORY, 'proven.json'):
        assert {'op', 'device', 'date', 'versions', 'speed_over_xla'} <= entry.keys()
        # Fails if the kernel has changed since: prove it again, or remove the entry.
        assert proof(entry['op'], entry['device']) == entry
    assert proof('no such op', 'NVIDIA H200') is None

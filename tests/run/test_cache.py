"""Compiled programs are written whole or not at all, and loaded by the same kind of processor."""

import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax._src.lru_cache import LRUCache
from jax.experimental.compilation_cache import compilation_cache

from jaxfm.run.cache import _kind_of_processor, keep_compiled_programs

pytestmark = pytest.mark.usefixtures('compilation_cache_as_before')


@pytest.fixture
def directory(tmp_path):
    compilation_cache.reset_cache()
    keep_compiled_programs(tmp_path, min_seconds=0)
    return tmp_path


def compile_anew():
    jax.jit(lambda x: jnp.sin(x) + 1).lower(jnp.ones(3)).compile()


def test_a_program_that_was_not_written_to_its_end_is_not_kept(directory, monkeypatch):
    whole = Path.write_bytes

    def write_a_part(path, value):
        whole(path, value[:100])
        raise OSError('killed')

    monkeypatch.setattr(Path, 'write_bytes', write_a_part)
    with pytest.warns(UserWarning, match='killed'):
        compile_anew()
    monkeypatch.undo()
    assert not list(directory.glob('*/*-cache'))
    with warnings.catch_warnings(action='error'):
        compile_anew()
        compile_anew()
    assert len(list(directory.glob('*/jit__lambda-*-cache'))) == 1


def test_a_program_that_is_kept_already_is_not_written_again(directory):
    compile_anew()
    [kept] = directory.glob('*/jit__lambda-*-cache')
    before = kept.stat().st_ino
    LRUCache(str(kept.parent), max_size=-1).put(kept.name.removesuffix('-cache'), b'other')
    assert kept.stat().st_ino == before
    assert not list(directory.glob('*/.*.tmp'))


X86 = """processor\t: {number}
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 1
cpu MHz\t\t: {mhz}
flags\t\t: fpu {flags}

"""
ARM = """processor\t: {number}
BogoMIPS\t: {mhz}
Features\t: fp {flags}
CPU implementer\t: 0x41
CPU part\t: 0xd40
"""


@pytest.mark.parametrize('text', [X86, ARM, 'unknown {flags}'], ids=['x86', 'Arm', 'other'])
def test_processors_with_other_instructions_have_other_names(text, tmp_path):
    cpuinfo = tmp_path / 'cpuinfo'

    def name(number, mhz, flags):
        cpuinfo.write_text(text.format(number=number, mhz=mhz, flags=flags))
        return _kind_of_processor(cpuinfo)

    assert name(0, 2445.4, 'avx2') == name(1, 3100, 'avx2')
    if text.startswith('processor'):
        assert name(0, 2445.4, 'avx2') != name(0, 2445.4, 'avx2 avx512f')
    else:
        assert name(0, 1, 'avx2') == _kind_of_processor(tmp_path / 'absent')


def test_programs_of_another_processor_are_not_loaded(directory, monkeypatch):
    compile_anew()
    monkeypatch.setattr('jaxfm.run.cache._kind_of_processor', lambda: 'another')
    compilation_cache.reset_cache()
    keep_compiled_programs(directory, min_seconds=0)
    compile_anew()
    assert list((directory / 'another').glob('jit__lambda-*-cache'))

"""Compiled programs are written whole, or not at all."""

import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax._src.lru_cache import LRUCache
from jax.experimental.compilation_cache import compilation_cache

from jaxfm.run.cache import keep_compiled_programs

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
    assert not list(directory.glob('*-cache'))
    with warnings.catch_warnings(action='error'):
        compile_anew()
        compile_anew()
    assert len(list(directory.glob('jit__lambda-*-cache'))) == 1


def test_a_program_that_is_kept_already_is_not_written_again(directory):
    compile_anew()
    [kept] = directory.glob('jit__lambda-*-cache')
    before = kept.stat().st_ino
    LRUCache(str(directory), max_size=-1).put(kept.name.removesuffix('-cache'), b'other')
    assert kept.stat().st_ino == before
    assert not list(directory.glob('.*.tmp'))

"""The command that compiles a run's train step: what it refuses, and how."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tools import deviceless

SMOKE = ['--config', 'configs/llama_1b.py:smoke']


@pytest.mark.parametrize(
    'arguments, code, message',
    [
        ([], 64, 'no run given'),
        ([*SMOKE, '--devices', '0'], 64, 'at least 1, got 0'),
        ([*SMOKE, '--devices', 'four'], 64, 'invalid int value'),
        (
            [*SMOKE, '--config.mesh.fsdp=2', '--devices', '4'],
            78,
            'must equal the number of devices',
        ),
        ([*SMOKE, '--phase', 'sft'], 78, "no phase 'sft' to compile"),
        (
            ['--config', 'configs/distill.py:smoke', '--phase', 'distill'],
            78,
            'config.phases[1].objective.teacher: a step with a teacher cannot be compiled here',
        ),
        (['--config', 'configs/nothing.py'], 66, 'configs/nothing.py'),
    ],
    ids=lambda value: str(value)[-24:],
)
@pytest.mark.usefixtures('gpu_compiler')
def test_a_command_that_cannot_be_run_says_why(arguments, code, message, capsys):
    assert deviceless.main(arguments) == code
    assert message in capsys.readouterr().err


def test_without_the_compiler_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    assert deviceless.main(SMOKE) == 66
    assert "pip install -e '.[compiler]'" in capsys.readouterr().err


@pytest.mark.usefixtures('gpu_compiler', 'compilation_cache_as_before')
def test_programs_without_a_device_are_not_kept(tmp_path):
    """JAX could not read them back; it warned, and a warning is an error in these tests."""
    zeros = jnp.zeros(8)
    jax.config.update('jax_compilation_cache_dir', str(tmp_path))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    compilation_cache.reset_cache()
    deviceless.compile(lambda x: x + 1, zeros)
    assert not [path for path in tmp_path.rglob('*') if path.is_file()]
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0

"""What devices exchange in a train step of configs/llama_1b.py, in the program of four H200.

Tests on CPU devices cannot see this: there a collective in the wrong dtype, or one too many, gives
the same numbers.
"""

import dataclasses

import jax
import pytest

from jaxfm import sharding
from jaxfm.config.load import load_config
from jaxfm.errors import human_bytes
from jaxfm.models import transformer
from tools import deviceless, hlo, traffic

pytestmark = pytest.mark.usefixtures('gpu_compiler')

# Fewer tokens: the weights are the same, and so is what is exchanged of them for a microbatch.
SHORT = ['data.sequence_length=512', 'data.batch_size=32', 'optimizer.accumulate=2']


@dataclasses.dataclass
class Gate:
    """A compiled step, and what is wrong with it."""

    program: deviceless.StepProgram
    needs: list[traffic.Need]
    problems: list[str]

    def sent(self, kind: str) -> dict[str, int]:
        """{dtype: bytes that a device sends in collectives of a kind that have large arrays}."""
        found = hlo.collectives(self.program.text).items()
        large = [item for item in found if item[0].size >= traffic.LARGE]
        return {d: sent for (k, d), (_, sent) in traffic.sums(large).items() if k == kind}


def compile_llama(*overrides: str) -> Gate:
    config = load_config('configs/llama_1b.py', overrides)
    phase = deviceless.plan_phase(config, 4)
    return judge(deviceless.compile_step(phase), phase, config)


def judge(program, phase, config) -> Gate:
    with jax.set_mesh(phase.mesh):
        needs = traffic.list_needs(phase, config.model)
    return Gate(program, needs, deviceless.problems(program, phase, config))


def test_four_gpus_exchange_what_theory_asks_for_and_keep_no_gathered_weight(capsys, monkeypatch):
    judged = []
    problems = deviceless.problems
    monkeypatch.setattr(deviceless, 'problems', lambda *a: judged.append(a) or problems(*a))
    # 256 x 4096 tokens in 8 microbatches: 8 rows a device at a time.
    assert deviceless.main(['--config', 'configs/llama_1b.py', '--devices', '4']) == 0
    shown = capsys.readouterr().out
    assert '4 x NVIDIA H200, fsdp 4' in shown and 'as they should be' in shown
    assert 'mlp/gate_up, backward' in shown and 'reduce-scatter' in shown
    gate = judge(*judged[0])
    assert gate.problems == []
    assert gate.sent('all-gather').keys() == {'bf16'}
    assert gate.sent('reduce-scatter').keys() == {'bf16'}
    assert gate.sent('all-reduce') == {}
    asked = sum(need.sent for need in gate.needs)
    sent = sum(each.sent * n for each, n in hlo.collectives(gate.program.text).items())
    assert sent == pytest.approx(asked, rel=0.05)
    with capsys.disabled():
        print(
            f'\nllama_1b on 4 H200: {human_bytes(gate.program.peak)} of '
            f'{human_bytes(deviceless.MEMORY)} a device, which sends {human_bytes(sent)} a step '
            f'(theory {human_bytes(asked)}); compiled in {gate.program.seconds:.0f} s'
        )


def test_gradients_are_reduced_in_float32_if_asked_and_without_remat_no_gathered_weight_is_kept():
    gate = compile_llama(*SHORT, 'model.remat=none', 'model.gradient_reduce_dtype=float32')
    assert gate.problems == []
    assert gate.sent('all-gather').keys() == {'bf16'}
    assert gate.sent('reduce-scatter').keys() == {'f32'}
    assert gate.sent('all-reduce') == {}


def test_tensor_parallelism_sums_activations_alone_and_float8_matmuls_exchange_no_more():
    float8 = 'model.matmul_dtype=float8'
    gate = compile_llama(*SHORT, 'mesh.tensor=2', 'mesh.fsdp=2', float8)
    assert gate.problems == []
    asked = {need.what for need in gate.needs if need.collective.kind == 'all-reduce'}
    assert 'outputs of attention and MLP' in asked
    assert gate.sent('all-reduce').keys() == {'bf16'}


def test_the_gate_sees_weights_that_are_gathered_before_they_are_cast(monkeypatch):
    def swapped(weight, axes, compute_dtype):
        return jax.reshard(weight, sharding.used_spec(axes)).astype(compute_dtype)

    monkeypatch.setattr(sharding, '_cast_and_gather', swapped)
    problems = compile_llama(*SHORT).problems
    assert any('all-gather of 33,554,432 elements in f32' in problem for problem in problems)
    assert any('all-gather in f32: a device sends' in problem for problem in problems)


def test_the_gate_sees_gathered_weights_that_a_remat_policy_lets_be_saved(monkeypatch):
    monkeypatch.setattr(transformer, '_WEIGHT_MOVES', ())
    problems = compile_llama(*SHORT, 'model.remat=none').problems
    assert any('mlp/gate_up is kept whole for all layers' in problem for problem in problems)

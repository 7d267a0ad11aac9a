"""Compiles for NVIDIA GPUs on a machine without one, and inspects the result.

    python -m tools.deviceless --config configs/llama_1b.py --devices 4 [--config.a.b=value ...]

compiles the train step of a run for that many H200s. It prints the collectives of the program next
to those that theory requires, and the memory per device. It exits with 1 if they differ, if the
program keeps gathered weights, or if it needs more memory than a device has.

The compiler comes with the extra `compiler`; no driver, cuDNN or cuBLAS is needed. Kernels are
compiled to machine code (registers, spills, shared memory, instructions), train steps to the HLO
that XLA would run (collectives, memory). On a device, XLA would autotune tile sizes and libraries;
here it cannot, so everything that depends on them is an estimate.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from jaxfm import sharding
from jaxfm.command_line import Parser
from jaxfm.config.load import load_config, split_arguments
from jaxfm.config.run import RunConfig, check_on_mesh
from jaxfm.errors import ConfigError, MissingInputError, RunError, UsageError, human_bytes
from jaxfm.run.phase import Phase, make_phases
from jaxfm.run.run import model_maker
from tools import hlo, traffic

# A GpuTargetConfigProto. On a GPU, `xla_client.get_topology_for_devices(jax.devices())` has the
# true one as `target_config`.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""
MEMORY = int(re.search(r'device_memory_size: (\d+)', H200)[1])  # bytes
_DEVICE = AbstractDevice(device_kind='NVIDIA H200', platform='gpu', num_cores=132)


@dataclasses.dataclass(frozen=True)
class KernelCode:
    """What the assembler reports about one kernel."""

    registers: int  # per thread
    spilled_bytes: int  # stores and loads
    smem_bytes: int  # per block
    is_serialized: bool  # the assembler found a hazard: each WGMMA waits for the previous one
    sass: str

    @property
    def uses_tensor_cores(self) -> bool:
        return 'HGMMA' in self.sass


def devices(count: int = 1) -> list:
    """H200s that exist only for the compiler."""
    topology = topologies.get_topology_desc(
        platform='cuda', target_config=H200, topology=f'1x1x{count}'
    )
    return list(topology.devices)


@contextlib.contextmanager
def target():
    """A context in which traced code sees an H200 as its target device."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=_DEVICE)):
        yield


def compile(function, *arrays):
    """Compiles jax.jit(function) for one H200, given arrays or shapes of arrays."""
    mesh = jax.sharding.Mesh(devices(), ('device',))
    place = NamedSharding(mesh, P())
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in arrays]
    with target():
        return compile_lowered(jax.jit(function).trace(*shapes).lower())


def compile_lowered(lowered, **options):
    """Compiles without autotuning, which would need a device.

    The program is not kept in JAX's compilation cache, which could not read it back without one.

    options: XLA compiler options, e.g. xla_gpu_enable_triton_gemm=False to use only cuBLAS.
    """
    name = 'jax_persistent_cache_min_compile_time_secs'
    before = getattr(jax.config, name)
    jax.config.update(name, float('inf'))
    try:
        return lowered.compile(compiler_options={'xla_gpu_autotune_level': 0, **options})
    finally:
        jax.config.update(name, before)


def compile_kernels(function, *arrays) -> list[KernelCode]:
    """The machine code of every Mosaic kernel in the function, in the order of compilation."""
    with tempfile.TemporaryDirectory() as directory:
        os.environ['MOSAIC_GPU_DUMP_TO'] = directory
        try:
            compile(function, *arrays)
        finally:
            del os.environ['MOSAIC_GPU_DUMP_TO']
        names = sorted(Path(directory).glob('*.ptxas'))
        return [_read_code(path) for path in names]


def _read_code(path: Path) -> KernelCode:
    assembler = path.read_text('utf-8')
    spills = re.search(r'(\d+) bytes spill stores, (\d+) bytes spill loads', assembler)
    resources = path.with_suffix('.resources.txt').read_text('utf-8')
    return KernelCode(
        registers=int(re.search(r'Used (\d+) registers', assembler)[1]),
        spilled_bytes=int(spills[1]) + int(spills[2]),
        smem_bytes=int(re.search(r'smem_scratch_bytes=(\d+)', resources)[1]),
        is_serialized='wgmma.mma_async instructions are serialized' in assembler,
        sass=path.with_suffix('.sass_ctrl').read_text('utf-8'),
    )


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """A train step as XLA would run it. Bytes are per device."""

    text: str  # HLO
    seconds: float  # of compilation
    arguments: int
    outputs: int
    aliased: int  # the part of the outputs that reuses the memory of arguments
    temporaries: int

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries


def plan_phase(config: RunConfig, count: int, name: str = '') -> Phase:
    """A phase of a run, by default the first, on `count` H200s.

    Raises:
      ConfigError: the run has no such phase, or cannot be split over `count` devices.
      MissingInputError: the compiler is not installed.
    """
    if importlib.util.find_spec('jax_cuda13_plugin') is None:
        raise MissingInputError(
            "the compiler for GPUs is not installed: pip install -e '.[compiler]'"
        )
    sizes = sharding.mesh_shape(dict(config.mesh), count)
    check_on_mesh(config, sizes)
    mesh = sharding.make_mesh(sizes, devices(count))
    phases = make_phases(config, model_maker(config.model), mesh)
    chosen = [phase for phase in phases if name in ('', phase.name)]
    if not chosen:
        names = ', '.join(phase.name for phase in phases) or 'none'
        raise ConfigError(f'config has no phase {name!r} to compile; its phases: {names}')
    if chosen[0].has_teacher:
        raise ConfigError(
            f'{chosen[0].where}.objective.teacher: a step with a teacher cannot be compiled here, '
            'because its shapes are not in the config; choose another phase or objective'
        )
    parts = chosen[0].parts
    shapes = {path: leaf.shape for path, leaf in parts.shapes.items()}
    sharding.check_weights(shapes, parts.axes, mesh)
    return chosen[0]


def compile_step(phase: Phase) -> StepProgram:
    """Compiles the train step of a phase from `plan_phase`; allocates no arrays."""
    with jax.set_mesh(phase.mesh):
        lowered = phase.train_step().lower(phase.abstract_state(), phase.abstract_batch())
    started = time.monotonic()
    compiled = compile_lowered(lowered)
    memory = compiled.memory_analysis()
    return StepProgram(
        text=compiled.as_text(),
        seconds=time.monotonic() - started,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
    )


def problems(program: StepProgram, phase: Phase, config: RunConfig) -> list[str]:
    """Sentences about wrong collectives, saved weights and memory; empty if all is well."""
    with jax.set_mesh(phase.mesh):
        needs = traffic.list_needs(phase, config.model)
    sentences = traffic.differences(hlo.collectives(program.text), needs)
    sentences += traffic.saved_weights(hlo.list_carried(program.text), phase)
    if program.peak > MEMORY:
        sentences.append(f'{human_bytes(program.peak)} per device exceed {human_bytes(MEMORY)}')
    return sentences


def main(argv: list[str]) -> int:
    """Runs one command line; returns its exit code."""
    jax.config.update('jax_platforms', 'cpu')  # even if there is a GPU: nothing runs
    try:
        flags, overrides = parse(argv)
        config = load_config(flags.config, overrides)
        phase = plan_phase(config, flags.devices, flags.phase)
        program = compile_step(phase)
        _show(program, phase, config)
        wrong = problems(program, phase, config)
    except RunError as error:
        print(f'error: {error}', file=sys.stderr)
        return error.exit_code
    for sentence in wrong:
        print(f'problem: {sentence}')
    if not wrong:
        print('collectives, saved weights and memory are as they should be')
    return 1 if wrong else 0


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Command line -> (flags, overrides of the config)."""
    argument, overrides, rest = split_arguments(argv)

    parser = Parser(prog='python -m tools.deviceless', description=__doc__.partition('\n')[0])
    parser.add_argument('--devices', type=int, default=1, help='number of H200s, in one node')
    parser.add_argument('--phase', default='', help='name of the phase, if there are several')
    flags = parser.parse_args(rest)
    flags.config = argument
    if argument is None:
        raise UsageError('no run given: pass --config=FILE, e.g. --config=configs/llama_1b.py')
    if flags.devices < 1:
        raise UsageError(f'--devices must be at least 1, got {flags.devices}')
    return flags, overrides


def _show(program: StepProgram, phase: Phase, config: RunConfig) -> None:
    split = [f'{axis} {size}' for axis, size in phase.mesh.shape.items() if size > 1]
    print(f'{phase.mesh.size} x NVIDIA H200, {", ".join(split) or "one device"}')
    print(f'compiled in {program.seconds:.1f} s')
    print(
        f'memory per device: {human_bytes(program.peak)} of {human_bytes(MEMORY)} '
        f'(arguments {human_bytes(program.arguments)}, outputs {human_bytes(program.outputs)}, '
        f'of which {human_bytes(program.aliased)} alias arguments, temporaries '
        f'{human_bytes(program.temporaries)})'
    )
    with jax.set_mesh(phase.mesh):
        needs = traffic.list_needs(phase, config.model)
    _print_table(
        ('what', 'collective', 'dtype', 'elements', 'devices', 'times', 'sent per device'),
        [
            (need.what, *_row(need.collective), f'{need.times:,}', human_bytes(need.sent))
            for need in needs
        ],
        'theory, per step',
    )
    found = hlo.collectives(program.text)
    _print_table(
        ('collective', 'dtype', 'elements', 'devices', 'times', 'sent per device'),
        [
            (*_row(each), f'{times:,}', human_bytes(times * each.sent))
            for each, times in sorted(found.items(), key=lambda item: -item[1] * item[0].sent)
        ],
        'compiled, per step',
    )
    asked = traffic.sums((need.collective, need.times) for need in needs)
    sent = traffic.sums(found.items())
    rows = []
    for key in sorted(asked.keys() | sent.keys()):
        (times, is_sent), (_, wanted) = sent.get(key, (0, 0)), asked.get(key, (0, 0))
        ratio = f'{is_sent / wanted:.3f}' if wanted else '-'
        rows.append((*key, f'{times:,}', human_bytes(is_sent), human_bytes(wanted), ratio))
    titles = ('collective', 'dtype', 'times', 'sent per device', 'theory', 'ratio')
    _print_table(titles, rows, 'compiled against theory')


def _row(collective: hlo.Collective) -> tuple[str, ...]:
    each = collective
    return each.kind, each.dtype, f'{each.size:,}', str(each.devices)


def _print_table(titles, rows, caption: str) -> None:
    table = Table(title=caption, title_justify='left', box=None)
    for title in titles:
        is_text = title in ('what', 'collective', 'dtype')
        table.add_column(title, justify='left' if is_text else 'right')
    for row in rows:
        table.add_row(*row)
    Console(width=1000, soft_wrap=True, highlight=False).print(table)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

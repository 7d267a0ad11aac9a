"""Compiles for NVIDIA GPUs on a machine that has none, and reads what came out.

The compiler comes with the extra `gpu_compiler`; no driver, cuDNN or cuBLAS is needed. Kernels go
down to machine code (registers, spills, shared memory, instructions), whole train steps to the HLO
that XLA would run (collectives, memory).
"""

import contextlib
import dataclasses
import os
import re
import tempfile
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

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
_DEVICE = AbstractDevice(device_kind='NVIDIA H200', platform='gpu', num_cores=132)


@dataclasses.dataclass(frozen=True)
class KernelCode:
    """What the assembler says of one kernel."""

    registers: int  # a thread
    spilled_bytes: int  # stores and loads
    smem_bytes: int  # a block
    is_serialized: bool  # each WGMMA waits for the one before: the assembler found a hazard
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
    """Code that asks which device it is traced for is told an H200."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=_DEVICE)):
        yield


def compile(function, *arrays):
    """The executable of jax.jit(function) on one H200 for arrays or shapes of arrays."""
    mesh = jax.sharding.Mesh(devices(), ('device',))
    place = NamedSharding(mesh, P())
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in arrays]
    with target():
        return compile_lowered(jax.jit(function).trace(*shapes).lower())


def compile_lowered(lowered):
    """Without measurements of alternatives, for which there is no device."""
    return lowered.compile(compiler_options={'xla_gpu_autotune_level': 0})


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
    assembler = path.read_text()
    spills = re.search(r'(\d+) bytes spill stores, (\d+) bytes spill loads', assembler)
    resources = path.with_suffix('.resources.txt').read_text()
    return KernelCode(
        registers=int(re.search(r'Used (\d+) registers', assembler)[1]),
        spilled_bytes=int(spills[1]) + int(spills[2]),
        smem_bytes=int(re.search(r'smem_scratch_bytes=(\d+)', resources)[1]),
        is_serialized='wgmma.mma_async instructions are serialized' in assembler,
        sass=path.with_suffix('.sass_ctrl').read_text(),
    )

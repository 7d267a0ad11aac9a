"""Chooses the implementation of an op and says why.

mosaic: our kernel (pallas_kernels), on a Hopper GPU. interpret: the same kernel in a slow simulator
that also detects races. xla: plain jnp, everywhere. cudnn, fa3: the libraries of NVIDIA and of
the FlashAttention 3 authors, for attention only.
"""

import dataclasses
import logging
import re
from collections.abc import Mapping

from jaxfm.ops import IMPLEMENTATIONS
from pallas_kernels import _tables

log = logging.getLogger('jaxfm')

# Matches device kinds of compute capability 9.0, such as 'NVIDIA H100 80GB HBM3'.
HOPPER = re.compile(r'\b(H100|H200|H800|H20|GH200)\b')
# Implementations that need an NVIDIA GPU.
NEED_GPU = ('cudnn', 'fa3', 'mosaic')
NEED_HOPPER = ('fa3', 'mosaic')


@dataclasses.dataclass(frozen=True)
class Device:
    """The device that a program is compiled for, which need not be present."""

    platform: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Choice:
    """An implementation, and the reason for choosing it."""

    name: str
    reason: str


def target() -> Device:
    """The device kind of the current mesh, or the default device without a mesh."""
    device = _tables.target_device()
    return Device(device.platform or '', device.device_kind)


def choose(
    op: str, implementation: str | None, unsupported: Mapping[str, str] | None = None
) -> str:
    """The name that `decide` chooses. For None, logs the choice and its reason once per op.

    The screen shows them on a machine with a GPU, log.txt everywhere.
    """
    choice = decide(op, implementation, unsupported)
    if implementation is None and (op, choice.name) not in _told:
        _told.add((op, choice.name))
        extra = None if target().platform == 'gpu' else {'shown': True}
        log.info('%s runs as %s: %s', op, choice.name, choice.reason, extra=extra)
    return choice.name


_told: set[tuple[str, str]] = set()


def decide(
    op: str, implementation: str | None, unsupported: Mapping[str, str] | None = None
) -> Choice:
    """The named implementation, or for None the best one that is proven and supports the call.

    Args:
      unsupported: {implementation: why it cannot run this call, and what to use instead}, apart
      from device requirements. An entry for 'mosaic' also covers 'interpret'.

    Raises:
      ValueError: the named implementation does not exist or cannot run.
    """
    known, unsupported = IMPLEMENTATIONS[op], unsupported or {}
    if implementation is None:
        return _best(op, unsupported)
    if implementation not in known:
        raise ValueError(
            f'{op} has no implementation {implementation!r}; it has {", ".join(known)}'
        )
    obstacle = _wrong_device(implementation, known) or _obstacle(implementation, unsupported)
    if obstacle:
        raise ValueError(f'{op} cannot run as {implementation!r}: {obstacle}')
    return Choice(implementation, 'it was requested by name')


def _best(op: str, unsupported: Mapping[str, str]) -> Choice:
    """Our kernel if it is proven correct and no slower than XLA on this GPU, else XLA."""
    if 'mosaic' not in IMPLEMENTATIONS[op]:
        return Choice('xla', 'the project has no kernel for this op')
    device = target()
    proof = _tables.proof(op, device.kind)
    if not HOPPER.search(device.kind):
        return Choice('xla', f'the kernel needs a Hopper GPU, this is {_describe(device)}')
    if proof is None:
        return Choice('xla', f'the kernel is not proven on {device.kind}')
    if obstacle := _obstacle('mosaic', unsupported):
        return Choice('xla', obstacle)
    speed = proof['speed_over_xla']
    if speed is None or speed < 1:
        measured = 'was never timed' if speed is None else f"runs at {speed:.2f} of XLA's speed"
        return Choice('xla', f'the kernel is proven on {device.kind}, but {measured}')
    return Choice('mosaic', f'proven on {device.kind} on {proof["date"]}')


def _obstacle(implementation: str, unsupported: Mapping[str, str]) -> str | None:
    return unsupported.get('mosaic' if implementation == 'interpret' else implementation)


def _wrong_device(implementation: str, known: tuple[str, ...]) -> str | None:
    """Why the device cannot run it, and what to use instead; None if it can."""
    device = target()
    if implementation not in NEED_GPU:
        return None
    if implementation in NEED_HOPPER:
        is_right, wanted = HOPPER.search(device.kind), 'a Hopper GPU (H100, H200, H800, H20, GH200)'
    else:
        is_right, wanted = device.platform == 'gpu', 'an NVIDIA GPU'
    if is_right:
        return None
    instead = "use 'xla'"
    if implementation == 'mosaic' and 'interpret' in known:
        instead += ", or 'interpret' to simulate the kernel"
    return f'it needs {wanted}, but the device is {_describe(device)}; {instead}'


def _describe(device: Device) -> str:
    same = device.kind == device.platform
    return device.kind if same else f'{device.kind} ({device.platform})'

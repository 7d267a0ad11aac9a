"""Which implementation of an op runs, and why.

mosaic: our kernel (pallas_kernels), on a Hopper GPU. interpret: the same kernel simulated, slow,
with a search for races. xla: plain jnp, everywhere. cudnn, fa3: libraries of NVIDIA and of the
authors of FlashAttention 3, for attention alone.
"""

import dataclasses
import logging
import re
from collections.abc import Mapping

from jaxfm.ops import IMPLEMENTATIONS
from pallas_kernels import _tables

log = logging.getLogger('jaxfm')

# The parts of a device kind that say compute capability 9.0: 'NVIDIA H100 80GB HBM3'.
HOPPER = re.compile(r'\b(H100|H200|H800|H20|GH200)\b')
# These need an NVIDIA GPU of any kind.
NEED_GPU = ('cudnn', 'fa3', 'mosaic')
NEED_HOPPER = ('fa3', 'mosaic')


@dataclasses.dataclass(frozen=True)
class Device:
    """What a program is made for, which need not be here."""

    platform: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Choice:
    """An implementation, and why it is that one."""

    name: str
    reason: str


def target() -> Device:
    """The device of the mesh that is set, else the default one."""
    device = _tables.target_device()
    return Device(device.platform or '', device.device_kind)


def choose(
    op: str, implementation: str | None, unsupported: Mapping[str, str] | None = None
) -> str:
    """The name of `decide`'s choice; the log says once what None has come to and why."""
    choice = decide(op, implementation, unsupported)
    if implementation is None and (op, choice.name) not in _told:
        _told.add((op, choice.name))
        log.info('%s runs as %s: %s', op, choice.name, choice.reason)
    return choice.name


_told: set[tuple[str, str]] = set()


def decide(
    op: str, implementation: str | None, unsupported: Mapping[str, str] | None = None
) -> Choice:
    """The implementation that is named; for None the best one that is proven and can do it.

    Args:
      unsupported: {implementation: why it cannot do what is asked and what would be right}, as far
      as that does not depend on the device; 'interpret' can do what 'mosaic' can.

    Raises:
      ValueError: the one that is named cannot run.
    """
    known, unsupported = IMPLEMENTATIONS[op], unsupported or {}
    if implementation is None:
        return _best(op, unsupported)
    if implementation not in known:
        raise ValueError(f'{op} has no implementation {implementation!r}, only {", ".join(known)}')
    obstacle = _wrong_device(implementation, known) or _obstacle(implementation, unsupported)
    if obstacle:
        raise ValueError(f'{op} cannot run as {implementation!r}: {obstacle}')
    return Choice(implementation, 'it is asked for by name')


def _best(op: str, unsupported: Mapping[str, str]) -> Choice:
    """Our kernel where it is right and not slower on a GPU like this one, else XLA."""
    if 'mosaic' not in IMPLEMENTATIONS[op]:
        return Choice('xla', 'there is no kernel of ours')
    device = target()
    proof = _tables.proof(op, device.kind)
    if not HOPPER.search(device.kind):
        return Choice('xla', f'the kernel is for Hopper GPUs, this is {_describe(device)}')
    if proof is None:
        return Choice('xla', f'the kernel is not proven on {device.kind}')
    if obstacle := _obstacle('mosaic', unsupported):
        return Choice('xla', obstacle)
    speed = proof['speed_over_xla']
    if speed is None or speed < 1:
        measured = 'never timed' if speed is None else f'at {speed:.2f} of the speed of XLA'
        return Choice('xla', f'the kernel is proven on {device.kind}, but {measured}')
    return Choice('mosaic', f'proven on {device.kind} on {proof["date"]}')


def _obstacle(implementation: str, unsupported: Mapping[str, str]) -> str | None:
    return unsupported.get('mosaic' if implementation == 'interpret' else implementation)


def _wrong_device(implementation: str, known: tuple[str, ...]) -> str | None:
    """Why the device cannot run it, and what would be right here."""
    device = target()
    if implementation not in NEED_GPU:
        return None
    if implementation in NEED_HOPPER:
        is_right, wanted = HOPPER.search(device.kind), 'a Hopper GPU (H100, H200, H800, H20, GH200)'
    else:
        is_right, wanted = device.platform == 'gpu', 'an NVIDIA GPU'
    if is_right:
        return None
    instead = "say 'xla'"
    if implementation == 'mosaic' and 'interpret' in known:
        instead += ", or 'interpret' to simulate the kernel"
    return f'it needs {wanted}, and the device is {_describe(device)}; {instead}'


def _describe(device: Device) -> str:
    same = device.kind == device.platform
    return device.kind if same else f'{device.kind} ({device.platform})'

"""Collectives that a train step needs in theory, and where a compiled step differs from them.

In theory, a sharded weight is all-gathered in the compute dtype for every microbatch. In blocks
this happens twice, because gathered weights are not kept for the backward pass. The weight's
gradient is reduce-scattered in `model.gradient_reduce_dtype`. A tied table is used twice. Vectors
are replicated, and their gradients are all-reduced. Splitting inside a layer (heads, MLP,
vocabulary) costs all-reduces of activations.
"""

import dataclasses
import math
from collections import defaultdict

from jaxfm import sharding
from jaxfm.errors import human_bytes
from jaxfm.models.transformer import compute_dtype
from tools.hlo import Array, Collective

TOLERANCE = 0.05  # relative, for the bytes of one kind and dtype
LARGE = sharding.LARGE_PARAMETER
_NAMES = {'bfloat16': 'bf16', 'float32': 'f32'}  # names in HLO


@dataclasses.dataclass(frozen=True)
class Need:
    """A collective that theory requires."""

    what: str
    collective: Collective
    times: int  # per step
    is_spared: bool = False  # XLA may avoid it

    @property
    def sent(self) -> int:
        """Bytes that a device sends per step."""
        return self.times * self.collective.sent


def list_needs(phase, model) -> list[Need]:
    """The collectives of a phase's train step, except those that send less than 1 KiB in total."""
    needs = [*_of_weights(phase, model), *_of_activations(phase, model)]
    return [need for need in needs if need.sent >= 1024]


def _of_weights(phase, model):
    parts, mesh, microbatches = phase.parts, phase.mesh, phase.config.optimizer.accumulate
    ways, rows = sharding.axis_size(sharding.STORED, 'embed', mesh), sharding.batch_shards(mesh)
    used = _NAMES[compute_dtype(model).name]
    summed = used if model.gradient_reduce_dtype == 'compute' else 'f32'
    for path, axes in parts.axes.items():
        copies = parts.shapes[path].shape[0] if axes[0] == 'layers' else 1
        size = math.prod(used_shape(parts, path, mesh)) // copies
        is_vector = len(axes) - (axes[0] == 'layers') < 2
        for use in _uses(path, model):
            times = copies * microbatches
            is_gathered = 'embed' in axes and ways > 1
            if is_gathered:
                passes = ('forward', 'backward') if axes[0] == 'layers' else ('forward',)
                for each in passes:
                    gather = Collective('all-gather', used, size, ways)
                    yield Need(f'{use}, {each}', gather, times)
            if path not in parts.trainable:
                continue
            dtype = 'f32' if is_vector else summed
            if is_gathered:
                scatter = Collective('reduce-scatter', dtype, size, ways)
                # Both gradients of a tied table may be added before they are exchanged.
                is_spared = use == 'look-up' and model.tie_embeddings
                yield Need(f'{use}, gradient', scatter, times, is_spared)
            copies_of_shard = rows // ways if is_gathered else rows
            if copies_of_shard > 1:
                part = size // ways if is_gathered else size
                total = Collective('all-reduce', dtype, part, copies_of_shard)
                yield Need(f'{use}, gradient', total, times)


def _uses(path: str, model) -> list[str]:
    """A label for each place where a parameter is used."""
    if path == 'embedding/table' and model.tie_embeddings:
        return ['look-up', 'output']
    names = {'embedding/table': 'look-up', 'head/table': 'output'}
    return [names.get(path, '/'.join(path.split('/')[-2:]))]


def _of_activations(phase, model):
    ways = sharding.axis_size(sharding.ACTIVATIONS, 'mlp', phase.mesh)
    if ways == 1:
        return
    data, microbatches = phase.config.data, phase.config.optimizer.accumulate
    rows = data.batch_size // microbatches // sharding.batch_shards(phase.mesh)
    size = rows * data.sequence_length * model.embed_dim
    total = Collective('all-reduce', _NAMES[compute_dtype(model).name], size, ways)
    layers = model.num_layers * microbatches
    yield Need('rows that are looked up', total, microbatches)
    yield Need('outputs of attention and MLP', total, 2 * layers)
    if model.remat == 'full':
        yield Need('outputs of attention, once more', total, layers)
    yield Need('gradients of the inputs of attention and MLP', total, 2 * layers)
    yield Need('gradient of the final hidden states', total, microbatches)


def used_shape(parts, path: str, mesh) -> tuple[int, ...]:
    """The shape of a weight on one device while it is used, including stacked layers."""
    sizes = zip(parts.shapes[path].shape, parts.axes[path], strict=True)
    return tuple(size // sharding.axis_size(sharding.USED, name, mesh) for size, name in sizes)


def sums(counted) -> dict[tuple[str, str], tuple[int, int]]:
    """{(kind, dtype): (times, bytes that a device sends)} of (collective, times) pairs."""
    found = defaultdict(lambda: (0, 0))
    for each, times in counted:
        before = found[each.kind, each.dtype]
        found[each.kind, each.dtype] = before[0] + times, before[1] + times * each.sent
    return dict(found)


def differences(found: dict[Collective, int], needs: list[Need]) -> list[str]:
    """Sentences about collectives of the program that differ from theory; empty if none do."""
    asked = [(need.collective, need.times) for need in needs]
    is_sent, should_be = sums(found.items()), sums(asked)
    spared = sums((need.collective, need.times) for need in needs if need.is_spared)
    sentences = []
    for each, times in found.items():
        similar = [o for o, _ in asked if (o.kind, o.dtype) == (each.kind, each.dtype)]
        if each.size >= LARGE and not any(other.size >= LARGE for other in similar):
            sentences.append(
                f'{times} x {each.kind} of {each.size:,} elements in {each.dtype}: '
                'theory requires none that large'
            )
    total = sum(sent for _, sent in should_be.values())
    for key in sorted(is_sent.keys() | should_be.keys()):
        (_, sent), (_, wanted) = is_sent.get(key, (0, 0)), should_be.get(key, (0, 0))
        least = wanted - spared.get(key, (0, 0))[1]
        # Theory does not cover every small transfer, so the total sets a minimum tolerance.
        allowed = TOLERANCE * max(wanted, TOLERANCE * total)
        if not least - allowed <= sent <= wanted + allowed:
            sentences.append(
                f'{" in ".join(key)}: a device sends {human_bytes(sent)} per step, theory requires '
                f'{human_bytes(wanted)}'
            )
    return sentences


def saved_weights(carried: list[Array], phase) -> list[str]:
    """Sentences about gathered weights of all layers that a loop keeps for the backward pass.

    It examines only loops over layers: with unrolled layers it finds nothing.
    """
    parts, mesh = phase.parts, phase.mesh
    shapes = {_form(each.shape) for each in carried}
    return [
        f'{path} is kept whole for all layers: {used_shape(parts, path, mesh)} on every device'
        for path, axes in parts.axes.items()
        if axes[0] == 'layers'
        and 'embed' in axes
        and sharding.axis_size(sharding.STORED, 'embed', mesh) > 1
        and _form(used_shape(parts, path, mesh)) in shapes
    ]


def _form(shape) -> tuple[int, ...]:
    """The dimensions above 1, sorted, to compare shapes regardless of their order."""
    return tuple(sorted(size for size in shape if size > 1))

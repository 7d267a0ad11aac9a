"""Parses optimised HLO: which collectives a program runs, how often, and what its loops carry.

The input is `compiled.as_text()`. A collective appears as one instruction or as a -start/-done
pair. The body of a while loop runs as often as its trip count, with which XLA annotates the loop.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator

KINDS = ('all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'collective-permute')
_BITS = {'pred': 8, 'bf16': 16, 's4': 4, 'u4': 4}  # else as in the name: f32, f8e4m3fn, u8

_COMPUTATION = re.compile(r'^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) .*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%(?P<name>[\w.-]+) = (?P<rest>.*)$')
_ARRAY = re.compile(r'\b(pred|bf16|[fsuc]\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]')
_CALLED = re.compile(r'\b(?:calls|to_apply|body|true_computation|false_computation)=%([\w.-]+)')
_BRANCHES = re.compile(r'\bbranch_computations=\{([^}]*)\}')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of the program; the shape is that of one device's part."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        bits = _BITS.get(self.dtype) or int(re.search(r'\d+', self.dtype)[0])
        return self.size * bits // 8


@dataclasses.dataclass(frozen=True)
class Collective:
    """An array exchanged within groups of devices; a combined instruction counts as several.

    `size` is the number of elements of the whole array, before a scatter or after a gather.
    """

    kind: str
    dtype: str
    size: int
    devices: int  # in a group

    @property
    def sent(self) -> int:
        """Bytes that a device sends, by the ring algorithm."""
        whole = Array(self.dtype, (self.size,)).num_bytes
        if self.kind == 'collective-permute':
            return whole
        rounds = 2 if self.kind == 'all-reduce' else 1
        return whole * rounds * (self.devices - 1) // self.devices


@dataclasses.dataclass
class _Instruction:
    name: str
    arrays: list[Array]  # of the result
    opcode: str
    operands: list[str]
    attributes: str


def collectives(text: str) -> Counter[Collective]:
    """{collective: times that a device runs it in one execution of the program}."""
    computations, entry = _parse(text)
    found = Counter()
    for name, times in _walk(computations, entry):
        arrays = {each.name: each.arrays for each in computations[name]}
        for each in computations[name]:
            kind = each.opcode.removesuffix('-start')
            if kind in KINDS:
                devices = _group_size(each.attributes)
                # An operand is the whole array, except for a gather, which takes one device's part.
                parts = devices if kind == 'all-gather' else 1
                for array in (array for name in each.operands for array in arrays[name]):
                    found[Collective(kind, array.dtype, array.size * parts, devices)] += times
    return found


def list_carried(text: str) -> list[Array]:
    """Arrays that while loops carry from one iteration to the next, including results."""
    computations, entry = _parse(text)
    return [
        array
        for name, _ in _walk(computations, entry)
        for each in computations[name]
        if each.opcode == 'while'
        for array in each.arrays
    ]


def custom_calls(text: str) -> Counter[str]:
    """{target of a custom call: times that a device runs it}: library calls and kernels."""
    computations, entry = _parse(text)
    found = Counter()
    for name, times in _walk(computations, entry):
        for each in computations[name]:
            if each.opcode == 'custom-call':
                found[re.search(r'custom_call_target="([^"]*)"', each.attributes)[1]] += times
    return found


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations, entry, current = {}, '', None
    for line in text.splitlines():
        if begins := _COMPUTATION.match(line):
            current = computations[begins['name']] = []
            entry = begins['name'] if begins['entry'] else entry
        elif line == '}':
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.append(_instruction(found['name'], found['rest']))
    if not entry:
        raise ValueError('not an HLO module: found no ENTRY computation')
    return computations, entry


def _instruction(name: str, rest: str) -> _Instruction:
    """`rest` is: type opcode(operands), attributes; the type may be a tuple."""
    end = _find_close(rest, 0) + 1 if rest.startswith('(') else rest.index(' ')
    result, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition('(')
    end = _find_close(rest, len(opcode))
    operands = re.findall(r'%([\w.-]+)', rest[len(opcode) : end])
    return _Instruction(name, _arrays(result), opcode, operands, rest[end + 1 :])


def _find_close(text: str, start: int) -> int:
    """The index of the parenthesis that closes the first one at or after `start`."""
    depth = 0
    for found in re.finditer(r'[()]', text[start:]):
        depth += 1 if found[0] == '(' else -1
        if depth == 0:
            return start + found.start()
    raise ValueError(f'unbalanced parentheses in HLO: {text[:200]}')


def _arrays(result: str) -> list[Array]:
    return [
        Array(dtype, tuple(int(size) for size in shape.split(',') if size))
        for dtype, shape in _ARRAY.findall(result)
    ]


def _walk(computations, entry: str, times: int = 1) -> Iterator[tuple[str, int]]:
    """Yields (computation, how often it runs), from the entry down.

    Every branch of a conditional counts, so that none is overlooked.
    """
    yield entry, times
    for each in computations[entry]:
        called = _CALLED.findall(each.attributes)
        if branches := _BRANCHES.search(each.attributes):
            called += re.findall(r'%([\w.-]+)', branches[1])
        for name in called:
            yield from _walk(computations, name, times * _trips(each))


def _trips(instruction: _Instruction) -> int:
    if instruction.opcode != 'while':
        return 1
    known = _TRIPS.search(instruction.attributes)
    if known is None:
        raise ValueError(f'{instruction.name} has no known trip count in the HLO')
    return int(known[1])


def _group_size(attributes: str) -> int:
    """Devices per group, from any notation that XLA uses for groups."""
    text = attributes.partition('replica_groups=')[2]
    if named := re.match(r'mesh\[([^\]]*)\]\S*\s*\{([^}]*)\}', text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        # An axis may be split: 'axis':(before)size.
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if iota := re.match(r'\[(\d+),(\d+)\]<=', text):
        return int(iota[2])
    if listed := re.match(r'\{\{([\d,]*)\}', text):
        return len(listed[1].split(','))
    raise ValueError(f'cannot read the groups of a collective: {attributes[:200]}')

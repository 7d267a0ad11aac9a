"""Reads and writes PEFT adapters: adapter_config.json and adapter_model.safetensors. No jax.

PEFT uses Hugging Face's module names and has two matrices per module and layer, lora_A [r, inputs]
and lora_B [outputs, r]. A fused module (Phi-3's qkv_proj) has one pair for several of our matrices:
they share A, and each takes its rows of B. In PEFT, modules may differ in rank and scale; our
adapters have one rank, the largest, and one scale. Smaller ranks are padded with zeros, and the
ratio of the scales is multiplied into B.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from jaxfm.errors import DataError, listed
from jaxfm.models import TARGETS, LoraConfig, adapter_paths
from jaxfm.models.families import FAMILIES
from jaxfm.models.families.base import find_family
from jaxfm.pretrained.huggingface.directory import SafetensorsFiles, read_json

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
_NAME = re.compile(r'base_model\.model\.(.+)\.lora_([AB])\.weight')

# Options that change the outputs and are not implemented: refused unless empty or false.
_REFUSED = (
    *('modules_to_save', 'layers_to_transform', 'layer_replication'),
    *('trainable_token_indices', 'target_parameters', 'fan_in_fan_out'),
    *('use_dora', 'use_qalora', 'use_bdlora', 'lora_bias', 'alora_invocation_tokens'),
    *('arrow_config', 'kasa_config', 'velora_config', 'monteclora_config'),
)
# Values of init_lora_weights that leave the base model's weights unchanged.
_BEGINNINGS = (None, True, False, 'gaussian', 'eva', 'orthogonal')
# Keys of rank_pattern and alpha_pattern are regular expressions; we accept only plain module names.
_MODULE = re.compile(r'\^?[\w.]+')


@dataclasses.dataclass(frozen=True)
class _Scaling:
    """Rank and scale of every module according to adapter_config.json."""

    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    by_root: bool  # rsLoRA: alpha / sqrt(rank)

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.get(_key(self.rank_pattern, module), self.rank)

    def scale_of(self, module: str) -> float:
        alpha = self.alpha_pattern.get(_key(self.alpha_pattern, module), self.alpha)
        return self._scale(alpha, self.rank_of(module))

    def alpha_at(self, rank: int) -> float:
        """The LoraConfig.alpha that, at this rank, gives modules without a pattern their scale."""
        alpha = self.alpha * math.sqrt(self.rank) if self.by_root else float(self.alpha)
        return alpha * (rank / self.rank)

    def _scale(self, alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if self.by_root else rank)


def _key(pattern: Mapping[str, float], module: str) -> str | None:
    """The first key of a pattern that equals or ends the module's name, matched as in PEFT."""
    return next((key for key in pattern if re.match(rf'(.*\.)?({key})$', module)), None)


def describe(directory: str | Path) -> dict:
    """The `model.lora` values rank, alpha and targets of an adapter; reads no weights.

    Raises:
        MissingInputError: a file of the adapter is missing.
        DataError: it is damaged, or has options or modules that are not supported.
    """
    directory = Path(directory)
    scaling = _read_scaling(directory / CONFIG)
    tensors = _open(directory)
    modules = _modules(tensors)
    _check_ranks(tensors, scaling, directory)
    targets = {target for module in modules for target in _targets(module)}
    alone = {'mlp/gate_up/0', 'mlp/gate_up/1'} - targets
    if len(alone) == 1:
        raise DataError(
            f'{directory} has an adapter for only one of gate_proj and up_proj, which is not '
            'supported'
        )
    names = {target.removesuffix('/0').removesuffix('/1') for target in targets}
    rank = max(map(scaling.rank_of, modules))
    return {
        'rank': rank,
        'alpha': scaling.alpha_at(rank),
        'targets': [name for name in TARGETS if name in names],
    }


def read(
    directory: str | Path, lora: LoraConfig, layout, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """{path: float32 array} of every adapter of a model.

    Args:
        lora: with the values of `describe`.
        layout: the `Layout` of the model without adapters.
        shapes: {path: shape} of the adapters.

    Raises:
        DataError: adapters are missing, unexpected, of the wrong shape or not finite.
    """
    directory = Path(directory)
    scaling = _read_scaling(directory / CONFIG)
    tensors = _open(directory)
    expected = _find_adapted_parts(layout, lora)
    _check_tensors(tensors, expected, scaling, directory)
    arrays = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
    for module, parts in expected.items():
        a, b = (tensors.read(_tensor(module, half)).astype(np.float32) for half in 'AB')
        b *= np.float32(scaling.scale_of(module) / lora.scale)
        rank = len(a)
        for part in parts:
            ours_a, ours_b = _halves(arrays, part)
            rows = b[part.start : part.start + part.shape[0]]
            ours_a[..., :rank] = a.T.reshape(*ours_a.shape[:-1], rank)
            ours_b[:rank] = rows.T.reshape(rank, *ours_b.shape[1:])
    damaged = sorted(path for path, array in arrays.items() if not np.isfinite(array).all())
    if damaged:
        raise DataError(f'{directory / WEIGHTS} has values that are not finite: {listed(damaged)}')
    return arrays


def write(
    directory: Path, params: Mapping[str, np.ndarray], lora: LoraConfig, layout, base: str
) -> None:
    """Writes the adapters of a model into an existing directory.

    A fused module has one pair of matrices. If the As of its parts differ, they are stacked in A
    and B is block-diagonal, which is exact at the cost of a multiple of the rank.

    Args:
        params: {path: array} of the adapters, not sharded.
        layout: the `Layout` of the model without adapters.
        base: the base model's name or path, for `base_model_name_or_path`.
    """
    expected = _find_adapted_parts(layout, lora)
    ways = _blocks(expected, params)
    tensors = {}
    for module, parts in expected.items():
        total = sum(part.shape[0] for part in layout.parts_of(f'{module}.weight'))
        a, b = _pair(parts, params, total, is_shared=ways[_last(module)] == 1)
        tensors |= {_tensor(module, 'A'): a, _tensor(module, 'B'): b}
    (directory / WEIGHTS).write_bytes(save(tensors, metadata={'format': 'pt'}))
    most = max(ways.values())
    fewer = {name: count for name, count in sorted(ways.items()) if count != most}
    config = {
        'peft_type': 'LORA',
        'task_type': 'CAUSAL_LM',
        'base_model_name_or_path': base,
        'r': most * lora.rank,
        'lora_alpha': most * lora.alpha,
        'rank_pattern': {name: count * lora.rank for name, count in fewer.items()},
        'alpha_pattern': {name: count * lora.alpha for name, count in fewer.items()},
        'target_modules': sorted(ways),
        'lora_dropout': 0.0,
        'bias': 'none',
        'fan_in_fan_out': False,
        'inference_mode': True,
        'init_lora_weights': True,
        'use_rslora': False,
        'use_dora': False,
        'modules_to_save': None,
        'layers_to_transform': None,
    }
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + '\n', 'utf-8')


def _read_scaling(where: Path) -> _Scaling:
    """Rank and scale from adapter_config.json; DataError if it needs unsupported options."""
    config = read_json(where)
    if config.get('peft_type') != 'LORA':
        raise DataError(
            f'{where}: peft_type {config.get("peft_type")!r} is not supported, only LORA'
        )
    refused = [name for name in _REFUSED if config.get(name)]
    refused += ['bias'] if config.get('bias', 'none') != 'none' else []
    if config.get('init_lora_weights') not in _BEGINNINGS:  # PiSSA, for example, changes weights
        refused.append('init_lora_weights')
    if refused:
        named = listed([f'{name} {config[name]!r}' for name in refused])
        raise DataError(f'{where}: {named} is not supported')
    rank, alpha = config.get('r'), config.get('lora_alpha')
    if not _is_rank(rank):
        raise DataError(f'{where}: r must be a whole number of at least 1, got {rank!r}')
    if not _is_alpha(alpha):
        raise DataError(f'{where}: lora_alpha must be a number above 0, got {alpha!r}')
    ranks, alphas = (config.get(name) or {} for name in ('rank_pattern', 'alpha_pattern'))
    _check_pattern('rank_pattern', ranks, _is_rank, where)
    _check_pattern('alpha_pattern', alphas, _is_alpha, where)
    return _Scaling(rank, alpha, ranks, alphas, by_root=bool(config.get('use_rslora')))


def _is_rank(value) -> bool:
    return type(value) is int and value >= 1


def _is_alpha(value) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _check_pattern(name: str, pattern, is_right, where: Path) -> None:
    if not isinstance(pattern, dict):
        raise DataError(f'{where}: {name} must be an object, got {pattern!r}')
    wrong = [
        f'{key!r}: {value!r}'
        for key, value in pattern.items()
        if not (_MODULE.fullmatch(key) and is_right(value))
    ]
    if wrong:
        raise DataError(
            f'{where}: {name} {listed(wrong)} is not supported: each key must be a module name, or '
            'the end of one, and each value a number above 0'
        )


def _open(directory: Path) -> SafetensorsFiles:
    if not (directory / WEIGHTS).exists() and (directory / 'adapter_model.bin').exists():
        raise DataError(
            f'{directory} has its weights in adapter_model.bin, which is never loaded: reading a '
            'pickle runs any code in it; save the adapter as safetensors'
        )
    return SafetensorsFiles({directory / WEIGHTS: None})


def _tensor(module: str, half: str) -> str:
    return f'base_model.model.{module}.lora_{half}.weight'


def _modules(tensors: SafetensorsFiles) -> list[str]:
    """The modules that have an adapter; DataError if one is not a matrix that LoRA supports."""
    found = {name: _NAME.fullmatch(name) for name in tensors.shapes}
    unknown = sorted(n for n, match in found.items() if not match or not _targets(match[1]))
    if unknown:
        raise DataError(
            f'adapters of {listed(unknown)} are not supported; supported: the matrices of '
            'attention and MLP'
        )
    if not found:
        raise DataError(f'{WEIGHTS} has no adapters')
    return sorted({match[1] for match in found.values()})


def _last(module: str) -> str:
    """The last part of a module's name, by which PEFT targets it in every layer."""
    return module.rpartition('.')[2]


def _targets(module: str) -> tuple[str, ...]:
    """The LoRA targets that a module of any family holds; () if it is not a supported matrix."""
    return _table().get(re.sub(r'\.\d+\.', '.{}.', module), ())


@functools.cache
def _table() -> dict[str, tuple[str, ...]]:
    table = {}
    for family in map(find_family, FAMILIES):
        for template, target in family.weights.items():
            targets = (target,) if isinstance(target, str) else target
            if all(name.removesuffix('/0').removesuffix('/1') in TARGETS for name in targets):
                table[template.removesuffix('.weight')] = targets
    return table


def _find_adapted_parts(layout, lora: LoraConfig) -> dict[str, list]:
    """{module: its parts that have an adapter}, for every layer."""
    found = {}
    for name in layout.shapes:
        parts = [
            part
            for part in layout.parts_of(name)
            if '/'.join(part.path.split('/')[-2:]) in lora.matrices
        ]
        if parts:
            found[name.removesuffix('.weight')] = parts
    return found


def _check_ranks(tensors: SafetensorsFiles, scaling: _Scaling, directory: Path) -> None:
    """Raises DataError unless every matrix has the rank that the config gives it."""
    wrong = []
    for name, shape in sorted(tensors.shapes.items()):
        module, half = _NAME.fullmatch(name).groups()
        rank = scaling.rank_of(module)
        if len(shape) != 2 or shape['AB'.index(half)] != rank:
            wrong.append(f'{name} is {list(shape)}, but its rank should be {rank}')
    if wrong:
        raise DataError(f'{directory / WEIGHTS} does not match {CONFIG}: {listed(wrong)}')


def _check_tensors(
    tensors: SafetensorsFiles, expected: dict, scaling: _Scaling, directory: Path
) -> None:
    shapes = {}
    for module, parts in expected.items():
        rank = scaling.rank_of(module)
        shapes[_tensor(module, 'A')] = (rank, parts[0].shape[1])
        shapes[_tensor(module, 'B')] = (max(part.start + part.shape[0] for part in parts), rank)
    there = tensors.shapes
    wrong = [
        f'{name} is {list(there[name])}, not {list(shape)}'
        for name, shape in shapes.items()
        if there.get(name, shape) != shape
    ]
    problems = {
        'missing': sorted(shapes.keys() - there.keys()),
        'unexpected': sorted(there.keys() - shapes.keys()),
        'wrong shape': wrong,
    }
    lines = [f'{what}: {listed(names)}' for what, names in problems.items() if names]
    if lines:
        raise DataError(f'{directory} is not an adapter of this model; ' + '; '.join(lines))


def _halves(arrays: Mapping[str, np.ndarray], part) -> tuple[np.ndarray, np.ndarray]:
    """Views of A [*inputs, r] and B [r, *outputs] of one matrix of one layer."""
    a, b = (arrays[name][part.repeat] for name in adapter_paths(part.path))
    return (a, b) if part.way is None else (a[..., part.way, :], b[part.way])


def _flat(arrays: Mapping[str, np.ndarray], part) -> tuple[np.ndarray, np.ndarray]:
    """A [r, inputs] and B [outputs, r] of one matrix, in PEFT's layout."""
    a, b = _halves(arrays, part)
    return a.reshape(-1, a.shape[-1]).T, b.reshape(b.shape[0], -1).T


def _blocks(expected: dict, params: Mapping[str, np.ndarray]) -> dict[str, int]:
    """{last name of a module: its rank as a multiple of ours}; 1 if its parts share their A."""
    blocks = {}
    for module, parts in expected.items():
        first, *others = (_flat(params, part)[0] for part in parts)
        is_shared = all(np.array_equal(first, other) for other in others)
        count = 1 if is_shared else len(parts)
        blocks[_last(module)] = max(count, blocks.get(_last(module), 1))
    return blocks


def _pair(parts: list, params, total: int, is_shared: bool) -> tuple[np.ndarray, np.ndarray]:
    """lora_A and lora_B of a module with `total` outputs."""
    pairs = [_flat(params, part) for part in parts]
    rank = len(pairs[0][0])
    a = pairs[0][0] if is_shared else np.concatenate([a for a, _ in pairs])
    b = np.zeros((total, len(a)), np.float32)
    for index, (part, (_, rows)) in enumerate(zip(parts, pairs, strict=True)):
        columns = slice(0, rank) if is_shared else slice(index * rank, (index + 1) * rank)
        b[part.start : part.start + part.shape[0], columns] = rows
    return np.ascontiguousarray(a), b

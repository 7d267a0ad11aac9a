"""What the config of a run may say, and what must hold between its values.

The groups of the mesh, of a phase and of the run itself stand here; those of the rooms stand in the
rooms.
"""

import math
import re
from typing import Annotated, ClassVar

import pydantic
from pydantic import Field

from jaxfm.checkpoint import CheckpointConfig
from jaxfm.config import validation
from jaxfm.config.validation import shown
from jaxfm.data import DataConfig
from jaxfm.errors import ConfigError
from jaxfm.evals import EVALUATORS
from jaxfm.metrics import MetricsConfig
from jaxfm.models import MODELS
from jaxfm.objectives import OBJECTIVES, NextTokenConfig
from jaxfm.optim import OPTIMIZERS
from jaxfm.pretrained import ExportConfig
from jaxfm.sampling import SamplingConfig
from jaxfm.schema import Group, one_of
from jaxfm.tokenizer import TOKENIZERS, BPEConfig


def _axis(size: int) -> int:
    if size < 1 and size != -1:
        raise ValueError(f'must be at least 1, or -1 for all remaining devices, got {size}')
    return size


def _only_one(size: int) -> int:
    if size != 1:
        raise ValueError(f'must be 1: nothing is split along this axis yet, got {size}')
    return size


Axis = Annotated[int, pydantic.AfterValidator(_axis)]
UnusedAxis = Annotated[int, pydantic.AfterValidator(_only_one)]


class MeshConfig(Group):
    """How many ways each axis of the mesh splits; -1, on one axis at most: all the rest."""

    replica: Axis = 1  # copies of the weights, over the slow network
    fsdp: Axis = -1  # weights and optimizer state stored in shards
    expert: UnusedAxis = 1
    context: UnusedAxis = 1
    tensor: Axis = 1  # heads and MLP split inside a layer, over the fastest links

    @pydantic.model_validator(mode='after')
    def _check(self):
        free = [axis for axis, size in self if size == -1]
        if len(free) > 1:
            raise ValueError(
                f'{" and ".join(free)} are -1; one axis at most can take all remaining devices'
            )
        return self


def _vocabulary_fits(model, tokenizer) -> list[str]:
    # A tokenizer whose size is known only once it is built is checked then.
    size = getattr(tokenizer, 'vocab_size', 0)
    if size <= model.vocab_size:
        return []
    return [
        f'tokenizer.vocab_size {size} is more than model.vocab_size {model.vocab_size}: '
        f'{size - model.vocab_size} tokens would have no embedding'
    ]


def _batch_divides(data, optimizer, mesh) -> list[str]:
    rows, rest = divmod(data.batch_size, optimizer.accumulate)
    if rest:
        return [
            f'data.batch_size {data.batch_size} is not a multiple of optimizer.accumulate '
            f'{optimizer.accumulate}: {_division(data.batch_size, optimizer.accumulate)}'
        ]
    ways = math.prod(size for size in (mesh.replica, mesh.fsdp, mesh.expert) if size != -1)
    if rows % ways:
        return [
            f'data.batch_size {data.batch_size} / optimizer.accumulate {optimizer.accumulate} = '
            f'{rows} rows cannot be split over mesh.replica x mesh.fsdp x mesh.expert = '
            f'{ways}: {_division(rows, ways)}'
        ]
    return []


def _model_divides(model, mesh) -> list[str]:
    blocks = [block for segment in model.trunk for block in segment.pattern]
    splits = [
        (f'model: {name}', getattr(block, name), 'mesh.tensor', mesh.tensor)
        for name in ('num_heads', 'num_kv_heads', 'mlp_dim')
        for block in blocks
    ]
    splits.append(('model.embed_dim', model.embed_dim, 'mesh.fsdp', mesh.fsdp))
    sentences = [
        f'{name} {size} cannot be split over {axis} {ways}: {_division(size, ways)}'
        for name, size, axis, ways in splits
        if ways != -1 and size % ways
    ]
    return list(dict.fromkeys(sentences))


def _adapters_fit(model, init_from, export) -> list[str]:
    sentences = []
    if model.lora and model.lora.path and not init_from:
        sentences.append('model.lora.path is an adapter of a model: init_from must name that one')
    if export.adapters == 'peft' and not model.lora:
        sentences.append('export.adapters is peft, but model.lora gives the model no adapters')
    return sentences


def _warmup_fits(steps, optimizer) -> list[str]:
    if steps == 0 or optimizer.warmup_steps <= steps:
        return []
    return [f'optimizer.warmup_steps {optimizer.warmup_steps} is more than steps {steps}']


def _completions_fit(evals, sampling) -> list[str]:
    own = []
    if sampling.max_tokens >= sampling.max_length:
        own.append(
            f'sampling.max_tokens {sampling.max_tokens} leaves no room for a prompt in '
            f'sampling.max_length {sampling.max_length}'
        )
    return own + [
        f'evals.{name}.max_tokens {config.max_tokens} leaves no room for a prompt in '
        f'sampling.max_length {sampling.max_length}'
        for name, config in evals.items()
        if getattr(config, 'max_tokens', 0) >= sampling.max_length
    ]


def _export_has_its_name(evals, export) -> list[str]:
    if not export.every or 'export' not in evals:
        return []
    return [
        f'evals.export has the name of the export of every export.every {export.every} steps, '
        'which is measured beside the evaluators: give it another one'
    ]


def _division(size: int, ways: int) -> str:
    return f'{size} = {size // ways} x {ways} + {size % ways}'


def _phases_or_one(init_from, steps, data, optimizer, phases) -> list[str]:
    own = {'steps': steps, 'data': data, 'optimizer': optimizer}
    if init_from and not phases and all(value is None for value in own.values()):
        return []  # a model to be used as it is
    if phases:
        given = [name for name, value in own.items() if value is not None]
        return [f'{name} belongs into a phase, because phases is given' for name in given]
    return [f'{name} is required and not given' for name, value in own.items() if value is None]


def _phase_names_differ(phases) -> list[str]:
    names = [phase.name for phase in phases]
    twice = sorted({name for name in names if names.count(name) > 1})
    return [f'phases: {name} is the name of more than one phase' for name in twice]


def _optimizer_can_be_kept(phases) -> list[str]:
    """Moments fit the parameters and the rules that they were made for."""
    sentences = []
    for index, phase in enumerate(phases):
        if not phase.keep_optimizer:
            continue
        if index == 0:
            sentences.append('phases[0].keep_optimizer: there is no phase before it')
            continue
        before, after = phases[index - 1].optimizer, phase.optimizer
        sentences += [
            f'phases[{index}].keep_optimizer: phases[{index}].optimizer.{key} is not that of the '
            f'phase before: {shown(getattr(after, key))}, not {shown(getattr(before, key))}'
            for key in ('name', 'frozen', 'moment_dtype')
            if getattr(before, key) != getattr(after, key)
        ]
    return sentences


def _evaluators_name_phases(evals, phases) -> list[str]:
    names = [phase.name for phase in phases]
    sentences = []
    for name, config in evals.items():
        if names and not config.phase:
            sentences.append(
                f'evals.{name}.phase is required and not given: whose held-out documents? '
                f'it is one of {", ".join(names)}'
            )
        elif config.phase and config.phase not in names:
            hint = validation.nearest(config.phase, names) or '; this run does not list phases'
            sentences.append(f'evals.{name}.phase: there is no phase {config.phase}{hint}')
    return sentences


def _rows_are_one_document(model, data) -> list[str]:
    if not model.implementations.one_document or data.packing == 'none':
        return []
    return [
        f'model.implementations.one_document promises rows of one document, data.packing is '
        f'{data.packing}: say none'
    ]


def _nothing_is_packed(model, evals, sampling) -> list[str]:
    """Held-out documents stand side by side, and samples read a cache."""
    if model.implementations.attention != 'cudnn' or not (evals or sampling.num_samples):
        return []
    return [
        "model.implementations.attention 'cudnn' is right for rows of one document alone: evals "
        'pack them and samples read a cache; say evals={} and sampling.num_samples=0, or mosaic '
        'or xla'
    ]


class PhaseConfig(Group):
    """A stretch of a run with its own data, objective, optimizer and steps."""

    name: str = Field(pattern=r'^[A-Za-z]\w*$')  # in metrics and messages
    steps: int = Field(ge=0)
    data: DataConfig
    objective: one_of(OBJECTIVES) = NextTokenConfig()
    optimizer: one_of(OPTIMIZERS)
    # A phase starts with the weights of the one before and a new optimizer, unless it says so.
    keep_optimizer: bool = False


class RunConfig(Group):
    """One run, resolved: every value that decides what it does.

    Most runs have one phase, given by steps, data, objective and optimizer; others list phases. One
    that has neither uses the model of `init_from` and cannot train.
    """

    seed: int = Field(0, ge=0, lt=2**32)
    # Whose weights this run starts from: the work directory of a run, a directory in Hugging Face's
    # layout, a .gguf file, or a model on the hub. The architecture and a tokenizer that would be
    # trained come from there, whatever this file says; so do `sampling.stop_ids` and
    # `export.dtype` unless it says them.
    init_from: str = ''
    model: one_of(MODELS)
    tokenizer: one_of(TOKENIZERS) = BPEConfig()
    steps: Annotated[int, Field(ge=0)] | None = None  # 0 is evaluate only
    data: DataConfig | None = None
    objective: one_of(OBJECTIVES) = NextTokenConfig()
    optimizer: one_of(OPTIMIZERS) | None = None
    phases: list[PhaseConfig] = []
    mesh: MeshConfig = MeshConfig()
    evals: dict[str, one_of(EVALUATORS)] = {}  # by the name their metrics carry
    sampling: SamplingConfig = SamplingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    export: ExportConfig = ExportConfig()

    cross_checks: ClassVar = (
        _phases_or_one,
        _phase_names_differ,
        _optimizer_can_be_kept,
        _evaluators_name_phases,
        _vocabulary_fits,
        _model_divides,
        _adapters_fit,
        _completions_fit,
        _export_has_its_name,
        _nothing_is_packed,
    )
    phase_checks: ClassVar = (_batch_divides, _warmup_fits, _rows_are_one_document)

    @pydantic.model_validator(mode='after')
    def _check(self):
        sentences = self.cross_problems(dict(self))
        if sentences:
            raise ValueError('\n'.join(sentences))
        return self

    @classmethod
    def cross_problems(cls, parts: dict) -> list[str]:
        """What is wrong between the values of a run, as far as `parts` has them."""
        sentences = validation.cross_problems(cls.cross_checks, parts)
        given = {name: value for name, value in parts.items() if value is not None}
        if not given.get('phases'):
            return sentences + validation.cross_problems(cls.phase_checks, given)
        for index, phase in enumerate(given['phases']):
            # The checks speak of `data.batch_size`, the config of `phases[0].data.batch_size`.
            sentences += [
                re.sub(r'\b(data\.|optimizer\.|steps )', rf'phases[{index}].\1', sentence)
                for sentence in validation.cross_problems(cls.phase_checks, given | dict(phase))
            ]
        return sentences

    @property
    def all_phases(self) -> list[PhaseConfig]:
        """The phases; those of a run that lists none are one, without a name, or none at all."""
        if self.steps is None and not self.phases:
            return []
        one = {name: getattr(self, name) for name in ('steps', 'data', 'objective', 'optimizer')}
        return self.phases or [PhaseConfig.model_construct(name='', **one)]

    @property
    def total_steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.all_phases)


def check_on_mesh(config: RunConfig, sizes: dict[str, int]) -> None:
    """The checks between groups once more, with the mesh of the devices that are really there.

    Raises:
        ConfigError: what does not divide, with the arithmetic.
    """
    parts = dict(config) | {'mesh': config.mesh.model_copy(update=sizes)}
    sentences = config.cross_problems(parts)
    if sentences:
        raise ConfigError('\n'.join(f'config: {sentence}' for sentence in sentences))

"""What the config of a run may say; `checks.py` says what must hold between its values.

The groups of the mesh, of a phase and of the run itself stand here; those of the rooms stand in the
rooms.
"""

from typing import Annotated

import pydantic
from pydantic import Field

from jaxfm.checkpoint import CheckpointConfig
from jaxfm.config import checks
from jaxfm.data import DataConfig
from jaxfm.errors import ConfigError
from jaxfm.evals import EVALUATORS
from jaxfm.metrics import MetricsConfig
from jaxfm.models import MODELS
from jaxfm.objectives import OBJECTIVES, NextTokenConfig
from jaxfm.optim import OPTIMIZERS
from jaxfm.pretrained import ExportConfig
from jaxfm.registry import one_of
from jaxfm.sampling import SamplingConfig
from jaxfm.schema import ConflictError, Group, Problem
from jaxfm.tokenizer import TOKENIZERS, BPEConfig


def _check_axis(size: int) -> int:
    if size < 1 and size != -1:
        raise ValueError(f'must be at least 1, or -1 for all remaining devices, got {size}')
    return size


def _check_unused(size: int) -> int:
    if size != 1:
        raise ValueError(f'must be 1: nothing is split along this axis yet, got {size}')
    return size


Axis = Annotated[int, pydantic.AfterValidator(_check_axis)]
UnusedAxis = Annotated[int, pydantic.AfterValidator(_check_unused)]


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
            sentence = (
                f'{" and ".join(free)} are -1; one axis at most can take all remaining devices'
            )
            raise ConflictError(Problem(tuple((axis,) for axis in free), sentence))
        return self


class CodeConfig(Group):
    """The file of a class that a config names by its path, as it was when the config was read."""

    path: str
    sha256: str


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
    # {module:Class: where it is and what it is} of what is not jaxfm's; recorded, not given.
    code: dict[str, CodeConfig] = Field({}, json_schema_extra={'recorded': True})

    @classmethod
    def find_conflicts(cls, parts: dict) -> list[Problem]:
        return checks.find_conflicts(parts)

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


class OriginConfig(Group):
    """What of an earlier run's config another run needs to start from its weights."""

    model_config = pydantic.ConfigDict(extra='ignore')

    init_from: str = ''
    model: one_of(MODELS)
    checkpoint: CheckpointConfig = CheckpointConfig()


def check_on_mesh(config: RunConfig, sizes: dict[str, int]) -> None:
    """The checks between groups once more, with the mesh of the devices that are really there.

    Raises:
        ConfigError: what does not divide, with the arithmetic.
    """
    parts = dict(config) | {'mesh': config.mesh.model_copy(update=sizes)}
    problems = config.find_conflicts(parts)
    if problems:
        raise ConfigError('\n'.join(f'config: {problem.sentence}' for problem in problems))

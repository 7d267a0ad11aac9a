"""The schema of a run's config; `checks.py` holds the rules that relate several values.

This file declares the groups of the mesh, of a phase and of the run itself. Every other group is
declared in the `__init__.py` of the package that uses it.
"""

from typing import Annotated

import pydantic
from pydantic import Field

from jaxfm.checkpoint import CheckpointConfig
from jaxfm.config import checks
from jaxfm.data import DATA
from jaxfm.errors import ConfigError
from jaxfm.evals import EVALUATORS
from jaxfm.metrics import MetricsConfig
from jaxfm.models import MODELS
from jaxfm.objectives import OBJECTIVES, NextTokenConfig
from jaxfm.optim import OPTIMIZERS
from jaxfm.pretrained import ExportConfig
from jaxfm.pretrained.orbax import StoredName
from jaxfm.registry import Entry, Registry, one_of
from jaxfm.rollout import RolloutConfig, RolloutMixtureConfig
from jaxfm.sampling import SamplingConfig
from jaxfm.schema import ConflictError, Group, Problem
from jaxfm.tokenizer import TOKENIZERS, BPEConfig


def _check_axis(size: int) -> int:
    if size < 1 and size != -1:
        raise ValueError(f'must be at least 1, or -1 for all remaining devices, got {size}')
    return size


def _check_unused(size: int) -> int:
    if size != 1:
        raise ValueError(f'must be 1, because nothing is sharded over this axis yet, got {size}')
    return size


Axis = Annotated[int, pydantic.AfterValidator(_check_axis)]
UnusedAxis = Annotated[int, pydantic.AfterValidator(_check_unused)]


class MeshConfig(Group):
    """The size of each mesh axis. At most one may be -1: it takes all remaining devices."""

    replica: Axis = 1  # full copies of the weights, across the slow network
    fsdp: Axis = -1  # shards of weights and optimizer state
    expert: UnusedAxis = 1
    context: UnusedAxis = 1
    tensor: Axis = 1  # splits heads and MLP inside a layer, across the fastest links

    @pydantic.model_validator(mode='after')
    def _check(self):
        free = [axis for axis, size in self if size == -1]
        if len(free) > 1:
            sentence = (
                f'{" and ".join(free)} are -1; at most one axis can take all remaining devices'
            )
            raise ConflictError(Problem(tuple((axis,) for axis in free), sentence))
        return self


class CodeConfig(Group):
    """The file behind a `module:Class` name, and its digest when the config was read."""

    path: str
    sha256: str


# Where the batches of a phase come from: documents, or samples of the model itself.
PHASE_DATA = Registry(
    {
        **DATA,
        'rollout': Entry('jaxfm.rollout.source:Rollouts', RolloutConfig),
        'rollout_mixture': Entry('jaxfm.rollout.alternation:Alternation', RolloutMixtureConfig),
    },
    base=DATA.base,
    beside=DATA.beside,
    adapter=DATA.adapter,
)


class PhaseConfig(Group):
    """A stretch of a run with its own data, objective, optimizer and steps."""

    name: str = Field(pattern=r'^[A-Za-z]\w*$')  # appears in metrics and messages
    steps: int = Field(ge=0)
    data: one_of(PHASE_DATA)
    objective: one_of(OBJECTIVES) = NextTokenConfig()
    optimizer: one_of(OPTIMIZERS)
    # False: take over only the weights of the previous phase. True: its optimizer state as well.
    keep_optimizer: bool = False


class RunConfig(Group):
    """The resolved config of a run: every value that affects it.

    Most runs have one phase, given by steps, data, objective and optimizer. A run may list several
    in `phases` instead. A run with neither uses the model of `init_from` and cannot train.
    """

    seed: int = Field(0, ge=0, lt=2**32)
    # The model this run starts from: the work directory of a run, a directory in Hugging Face's
    # layout, a .gguf file, or a model on the hub. The architecture comes from that model, even if
    # the config file describes another one; so does the tokenizer, unless the config file sets
    # tokenizer.name='file'; so do `sampling.stop_ids` and `export.dtype`, unless the config sets
    # them.
    # Or a checkpoint that another JAX project saved with Orbax, on disk or s3://: weights alone, so
    # the config has the model and the tokenizer.
    init_from: str = ''
    # {our parameter: 'their/name [axes]'} for such a checkpoint; {}: it has our names. And patterns
    # of names in it that are no parameters of the model.
    init_names: dict[str, StoredName] = {}
    init_ignore: list[str] = []
    model: one_of(MODELS)
    tokenizer: one_of(TOKENIZERS) = BPEConfig()
    steps: Annotated[int, Field(ge=0)] | None = None  # 0: evaluate only
    data: one_of(PHASE_DATA) | None = None
    objective: one_of(OBJECTIVES) = NextTokenConfig()
    optimizer: one_of(OPTIMIZERS) | None = None
    phases: list[PhaseConfig] = []
    mesh: MeshConfig = MeshConfig()
    evals: dict[str, one_of(EVALUATORS)] = {}  # the key appears in metric names
    sampling: SamplingConfig = SamplingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    export: ExportConfig = ExportConfig()
    # {module:Class: its file and digest} of classes outside jaxfm. The run records it; users cannot
    # set it.
    code: dict[str, CodeConfig] = Field({}, json_schema_extra={'recorded': True})

    @classmethod
    def find_conflicts(cls, parts: dict) -> list[Problem]:
        return checks.find_conflicts(parts)

    @property
    def all_phases(self) -> list[PhaseConfig]:
        """The listed phases; else the single, unnamed phase; else [] (a run that cannot train)."""
        if self.steps is None and not self.phases:
            return []
        one = {name: getattr(self, name) for name in ('steps', 'data', 'objective', 'optimizer')}
        return self.phases or [PhaseConfig.model_construct(name='', **one)]

    @property
    def total_steps(self) -> int:
        """The steps of all phases together."""
        return sum(phase.steps for phase in self.all_phases)


class OriginConfig(Group):
    """The part of an earlier run's config that a run needs in order to start from its weights."""

    model_config = pydantic.ConfigDict(extra='ignore')

    init_from: str = ''
    init_names: dict[str, StoredName] = {}
    init_ignore: list[str] = []
    model: one_of(MODELS)
    checkpoint: CheckpointConfig = CheckpointConfig()


def check_on_mesh(config: RunConfig, sizes: dict[str, int]) -> None:
    """Repeats the checks between groups with the mesh sizes of the devices that are present.

    Raises:
        ConfigError: a size is not divisible; the message shows the arithmetic.
    """
    parts = dict(config) | {'mesh': config.mesh.model_copy(update=sizes)}
    problems = config.find_conflicts(parts)
    if problems:
        raise ConfigError('\n'.join(f'config: {problem.sentence}' for problem in problems))

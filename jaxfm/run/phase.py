"""A phase of a run: its data, objective and optimizer, what of the model it trains, and its steps.

A phase begins with the weights of the one before; everything else is new, unless it keeps the
optimizer. So two phases are two runs chained by `init_from`, bit for bit: phase i of a run is what
a run with the seed + i would be.
"""

import dataclasses
from collections.abc import Callable

import jax

from jaxfm import sharding
from jaxfm.config.run import PhaseConfig, RunConfig
from jaxfm.data.dataset import Batches, Dataset
from jaxfm.data.packing.rows import BATCH_DTYPES
from jaxfm.objectives import OBJECTIVES
from jaxfm.optim import OPTIMIZERS
from jaxfm.plan.flops import frozen_matmul_params, model_flops_per_token
from jaxfm.state import (
    TrainState,
    abstract_state,
    begin_phase,
    init_state,
    make_train_step,
    split,
)


@dataclasses.dataclass
class Phase:
    """One phase, planned: wrong patterns and shapes are found when it is built.

    first, last: steps of the run between which it lies.
    """

    config: PhaseConfig
    where: str  # in the config of the run
    first: int
    seed: int  # of the order of its data and the noise of its steps
    make_model: Callable
    mesh: object

    def __post_init__(self):
        config = self.config
        self.name, self.last = config.name, self.first + config.steps
        patterns = config.optimizer.frozen
        self.parts = split(self.make_model, patterns, f'{self.where}.optimizer.frozen')
        trained = {path: self.parts.axes[path] for path in sorted(self.parts.trainable)}
        optimizer_class = OPTIMIZERS.load(config.optimizer.name)
        self.optimizer = optimizer_class(config.optimizer, config.steps, trained)
        self.objective = OBJECTIVES.load(config.objective.name)(config.objective)

    @property
    def tokens_per_step(self) -> int:
        return self.config.data.batch_size * self.config.data.sequence_length

    def flops_per_step(self, model_config) -> float:
        """Model FLOPs of one global step, causal attention counted half."""
        length, frozen = self.config.data.sequence_length, frozen_matmul_params(self.parts)
        return model_flops_per_token(model_config, length, frozen=frozen) * self.tokens_per_step

    def abstract_state(self) -> TrainState:
        """Shapes and shardings of the train state."""
        return abstract_state(self.make_model, self.parts, self.optimizer, self.seed)

    def init_state(self) -> TrainState:
        """A fresh train state."""
        return init_state(self.make_model, self.parts, self.optimizer, self.seed)

    def begin(self, params: dict, before: TrainState | None = None) -> TrainState:
        """The state at the first step with these weights, which are donated."""
        state = begin_phase(params, self.parts, self.optimizer, self.seed)
        if self.config.keep_optimizer:
            state = dataclasses.replace(state, opt_state=before.opt_state)
        return state

    def train_step(self):
        """The jitted step."""
        optimizer = self.config.optimizer
        return make_train_step(
            self.parts,
            self.objective,
            self.optimizer,
            accumulate=optimizer.accumulate,
            clip_norm=optimizer.clip_norm,
        )

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and shardings of a batch, for lowering."""
        shape = (self.config.data.batch_size, self.config.data.sequence_length)
        place = sharding.batch_sharding(self.mesh)
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
            for name, dtype in BATCH_DTYPES.items()
        }

    def batches(self, dataset: Dataset) -> Batches:
        """The host's share of the batches of the phase's data, in their order."""
        rows = sharding.local_rows(self.mesh, self.config.data.batch_size)
        return dataset.batches(self.seed, rows)


def make_phases(config: RunConfig, make_model, mesh) -> list[Phase]:
    """Every phase of a run, planned before its first step."""
    phases, first = [], 0
    for index, phase in enumerate(config.all_phases):
        seed = (config.seed + index) % 2**32
        where = f'config.phases[{index}]' if config.phases else 'config'
        phases.append(Phase(phase, where, first, seed, make_model, mesh))
        first += phase.steps
    return phases


def phase_at(phases: list[Phase], step: int) -> Phase:
    """The phase whose state a checkpoint at `step` holds: at a boundary the one that ends there."""
    return next((phase for phase in phases if step <= phase.last), phases[-1])

"""A phase of a run: its data, objective, optimizer, trainable parameters and steps.

A phase begins with the weights of the previous phase. Everything else is new, except that it may
keep the optimizer state. So two phases equal two runs chained by `init_from`, bit for bit: phase i
equals a run with the seed `seed + i`.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxfm import sharding
from jaxfm.config.run import PhaseConfig, RunConfig
from jaxfm.data.dataset import Batches, Dataset
from jaxfm.data.packing.rows import BATCH_DTYPES, COMPARED_DTYPES
from jaxfm.evals.base import Context
from jaxfm.objectives import (
    NO_REFERENCE,
    OBJECTIVES,
    DistillationConfig,
    LoadReference,
    PolicyGradientConfig,
    PreferenceConfig,
)
from jaxfm.ops.logprobs import token_logprobs
from jaxfm.ops.segments import segment_sums
from jaxfm.optim import OPTIMIZERS
from jaxfm.optim.spikes import Spikes
from jaxfm.plan.flops import forward_flops, frozen_matmul_params, model_flops_per_token
from jaxfm.preferences.source import Preferences
from jaxfm.rollout import RolloutConfig
from jaxfm.rollout.alternation import Alternation
from jaxfm.rollout.batch import DTYPES as ROLLOUT_DTYPES
from jaxfm.rollout.source import Rollouts
from jaxfm.state import (
    Parts,
    TrainState,
    abstract_state,
    begin_phase,
    init_state,
    make_train_step,
    map_microbatches,
    split,
)


@dataclasses.dataclass
class Phase:
    """One phase. Building it checks the patterns of frozen parameters (ConfigError) and the shapes.

    `first` and `last` are the steps of the run at which the phase begins and ends.
    """

    config: PhaseConfig
    where: str  # its place in the run's config, for messages
    first: int
    seed: int  # determines the order of its data and the noise of its steps
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
        # An OtherModel once it is opened, and its weights once they are loaded (`other_model`).
        self.teacher, self.teacher_params = None, None

    @property
    def tokens_per_step(self) -> int:
        """Tokens in the rows of a batch, padding included."""
        return self.config.data.batch_size * self.config.data.sequence_length

    def flops_per_token(self, model_config) -> float:
        """Model FLOPs of training on a token of a row; causal attention counts half.

        The teacher's forward pass is among them.
        """
        length, frozen = self.config.data.sequence_length, frozen_matmul_params(self.parts)
        flops = model_flops_per_token(model_config, length, frozen=frozen)
        return flops + self.teacher_flops_per_token

    @property
    def teacher_flops_per_token(self) -> float:
        """Those of the teacher's forward pass alone; 0 without a teacher."""
        if self.teacher is None:
            return 0.0
        length = self.config.data.sequence_length
        return forward_flops(self.teacher.config, length) / length

    def abstract_state(self) -> TrainState:
        """The shapes and shardings of the train state."""
        return abstract_state(self.make_model, self.parts, self.optimizer, self.seed)

    def init_state(self) -> TrainState:
        """A fresh train state."""
        return init_state(self.make_model, self.parts, self.optimizer, self.seed)

    def begin(self, params: dict, before: TrainState | None = None) -> TrainState:
        """The state at the first step, with these weights, which are donated.

        before: the last state of the previous phase; needed if the phase keeps the optimizer.
        """
        state = begin_phase(params, self.parts, self.optimizer, self.seed)
        if self.config.keep_optimizer:
            state = dataclasses.replace(state, opt_state=before.opt_state)
        return state

    def train_step(self):
        """The train step, (state, batch, limit=None) -> (state, metrics), jitted.

        With a teacher, its weights must be loaded when the step is called.
        """
        optimizer = self.config.optimizer
        step = make_train_step(
            self.parts,
            self.objective,
            self.optimizer,
            accumulate=optimizer.accumulate,
            clip_norm=optimizer.clip_norm,
            skip_empty=self.is_rollout,
            teacher=self.teacher and self.teacher.parts,
        )
        if self.teacher is None:
            return step
        return lambda state, batch, limit=None: step(state, batch, limit, self.teacher_params)

    def spikes(self) -> Spikes:
        """Judges the losses of this phase.

        Not those of a policy gradient, which do not measure the weights.
        """
        spikes, is_off = self.config.optimizer.spikes, self._is_policy_gradient
        return Spikes(spikes.model_copy(update={'policy': 'off'}) if is_off else spikes)

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes and shardings of a batch, for lowering."""
        shape = (self.config.data.batch_size, self.config.data.sequence_length)
        place = sharding.batch_sharding(self.mesh)
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
            for name, dtype in self._batch_dtypes().items()
        }

    @property
    def is_rollout(self) -> bool:
        """Whether its batches, or some of them, are samples of the model."""
        return isinstance(self.config.data, RolloutConfig)

    @property
    def is_preference(self) -> bool:
        """Whether its batches are chats that are compared."""
        return isinstance(self.config.objective, PreferenceConfig)

    @property
    def has_teacher(self) -> bool:
        """Whether its objective needs another model."""
        return isinstance(self.config.objective, DistillationConfig)

    @property
    def _is_policy_gradient(self) -> bool:
        return isinstance(self.config.objective, PolicyGradientConfig)

    def _batch_dtypes(self) -> dict:
        objective = self.config.objective
        if self.is_preference:
            more = {
                'reference_logprobs': objective.reference != NO_REFERENCE,
                'kl': objective.loss == 'kto',
            }
            return COMPARED_DTYPES | {n: np.float32 for n, is_there in more.items() if is_there}
        if not self._is_policy_gradient:
            return BATCH_DTYPES
        scored = {
            'old_logprobs': objective.old_logprobs == 'recomputed',
            'reference_logprobs': bool(objective.kl),
        }
        return ROLLOUT_DTYPES | {name: np.float32 for name, is_there in scored.items() if is_there}

    def batches(self, dataset: Dataset) -> Batches:
        """Every batch in the order of the phase, on the devices; must be closed."""
        size = self.config.data.batch_size
        rows = sharding.local_rows(self.mesh, size)
        put = functools.partial(sharding.put, mesh=self.mesh, batch_size=size)
        return dataset.batches(self.seed, rows, put)

    def preferences(
        self,
        dataset: Dataset,
        reference: LoadReference,
        origin: Callable,
        directory: Path,
        parts: Parts | None,
    ) -> Preferences:
        """The source of a phase that learns from preferences.

        Args:
          reference: loads the weights of the reference.
          origin: tells where the weights with which the phase begins are from.
          directory: where its log-probs are kept.
          parts: of the reference, if it is another model.
        """
        data, score = self.config.data, functools.partial(self._score, parts=parts)
        whole = NamedSharding(self.mesh, P())
        return Preferences(
            dataset.packings,
            dataset.weights,
            self.config.objective,
            batch_size=data.batch_size,
            seed=self.seed,
            steps=self.config.steps,
            last=self.last,
            has_skips=self.config.optimizer.spikes.policy == 'rewind',
            rows=sharding.local_rows(self.mesh, data.batch_size),
            put=functools.partial(sharding.put, mesh=self.mesh, batch_size=data.batch_size),
            score=jax.jit(score, out_shardings=whole),
            divergence=jax.jit(self._divergence),
            reference=reference,
            origin=origin,
            path=directory / f'{self.name or "reference"}.npz',
        )

    def rollouts(
        self, context: Context, reference: LoadReference, dataset: Dataset | None = None
    ) -> Rollouts | Alternation:
        """The source of a phase that samples its batches, or some of them.

        Args:
          context: of the run, with a sampler of its own.
          reference: loads the weights of the reference.
          dataset: the documents that the other batches are from.
        """
        samples = Rollouts(
            self.config.data,
            self.config.objective,
            context,
            seed=self.seed,
            put=self._put_rows,
            copy=self._copy_params,
            score=jax.jit(self._score),
            reference=reference,
            microbatches=self.config.optimizer.accumulate,
            where=self.name,
        )
        if dataset is None:
            return samples
        share = self.config.data.on_policy_share
        return Alternation(samples, self.batches(dataset), dataset.statistics, share, self.seed)

    def _copy_params(self, params: dict, last: dict | None) -> dict:
        """A copy of weights that are about to be donated; what `last` has of them is freed.

        What the phase does not change is copied once. It cannot be shared, because the step donates
        it, too.
        """
        if last is None:
            return _copy(params)
        changed = self.parts.trainable | self.parts.buffers
        for path in changed:
            last[path].delete()
        return last | _copy({path: params[path] for path in changed})

    def _put_rows(self, batch: dict) -> dict:
        """Whole batches, the same on every process -> global arrays."""
        rows = sharding.local_rows(self.mesh, self.config.data.batch_size)
        mine = {name: array[rows] for name, array in batch.items()}
        return sharding.put(mine, self.mesh, self.config.data.batch_size)

    def _score(self, params: dict, batch: dict, parts: Parts | None = None) -> jax.Array:
        """The log-probs of a batch's targets, [B, T], by microbatches as in the step.

        parts: of the model, if it is another one.
        """
        model = (parts or self.parts).merge(params)

        def score(batch):
            hidden, _ = model(batch['tokens'], batch['positions'], batch['segment_ids'])
            return token_logprobs(hidden, model.unembed(), batch['targets'])[0]

        return map_microbatches(score, batch, self.config.optimizer.accumulate)

    def _divergence(self, params: dict, batch: dict) -> jax.Array:
        """How far the policy is from the reference, per chat of a batch, at least 0; [B, T]."""
        mask_BT = batch['loss_mask']
        more_BT = self._score(params, batch) - batch['reference_logprobs']
        share_BT = mask_BT / jnp.maximum(segment_sums(mask_BT, batch['segment_ids']), 1)
        weight_BT = share_BT if self.config.objective.logprobs == 'mean' else mask_BT
        total = jnp.sum(jnp.where(mask_BT > 0, more_BT, 0.0) * weight_BT)
        kl = jnp.maximum(total / jnp.maximum(jnp.round(jnp.sum(share_BT)), 1), 0)
        return jnp.broadcast_to(
            kl, mask_BT.shape, out_sharding=sharding.activation('batch', 'position')
        )


@jax.jit
def _copy(params: dict) -> dict:
    return jax.tree.map(jnp.copy, params)


def make_phases(config: RunConfig, make_model, mesh) -> list[Phase]:
    """Builds every phase of a run, so that mistakes in a later one are found at the start."""
    phases, first = [], 0
    for index, phase in enumerate(config.all_phases):
        seed = (config.seed + index) % 2**32
        where = f'config.phases[{index}]' if config.phases else 'config'
        phases.append(Phase(phase, where, first, seed, make_model, mesh))
        first += phase.steps
    return phases


def phase_at(phases: list[Phase], step: int) -> Phase:
    """The phase whose state a checkpoint at `step` holds; at a boundary, the phase that ends."""
    return next((phase for phase in phases if step <= phase.last), phases[-1])

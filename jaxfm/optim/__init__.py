"""Optimizers: update rules for parameters, learning-rate schedules, and their config groups."""

from typing import Annotated, Literal

from pydantic import Field

from jaxfm.registry import Entry, Registry
from jaxfm.schema import Group

Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class SpikesConfig(Group):
    """What to do when the loss of a step is a spike: above mean + sigmas * sigma of those before.

    Each phase begins a new window; the first steps of a phase are not judged.
    """

    # off: losses are not judged. warn: a line and an event. skip: the step applies no update.
    # rewind: the run goes back to the newest checkpoint before the spike and continues with the
    # data after it.
    policy: Literal['off', 'warn', 'skip', 'rewind'] = 'warn'
    sigmas: float = Field(6.0, gt=0)
    window: int = Field(128, ge=2)  # the last applied steps, from which mean and sigma are computed
    max_rewinds: int = Field(5, ge=0)  # per phase; at the next spike the run ends with 70


class OptimizerConfig(Group):
    """The fields that every optimizer has: schedule, decay, clipping, spikes, frozen parameters."""

    learning_rate: float = Field(gt=0)  # at the end of warm-up
    warmup_steps: int = Field(0, ge=0)  # linear, from learning_rate / warmup_steps
    schedule: Literal['cosine', 'linear', 'constant'] = 'cosine'
    decay_steps: int = Field(0, ge=0)  # after warm-up; 0: the rest of the phase
    final_fraction: Share = 0.1  # of learning_rate, reached at the end of the decay
    weight_decay: float = Field(0.1, ge=0)
    b1: Decay = 0.9
    b2: Decay = 0.95
    eps: float = Field(1e-8, gt=0)
    clip_norm: float = Field(1.0, ge=0)  # clip the global gradient norm; 0: no clipping
    spikes: SpikesConfig = SpikesConfig()
    accumulate: int = Field(1, ge=1)  # microbatches per step (gradient accumulation)
    frozen: list[str] = []  # glob patterns for the paths of parameters that are not trained
    moment_dtype: Literal['float32', 'bfloat16'] = 'float32'  # of first moments


class AdamWConfig(OptimizerConfig):
    """AdamW for every parameter."""

    name: Literal['adamw'] = 'adamw'


class MuonConfig(OptimizerConfig):
    """Muon for the matrices inside blocks, AdamW with the values above for everything else."""

    name: Literal['muon'] = 'muon'
    muon_learning_rate: float = Field(0.02, gt=0)  # follows the same schedule
    momentum: Decay = 0.95
    nesterov: bool = True
    newton_schulz_steps: int = Field(5, ge=1)


OPTIMIZERS = Registry(
    {
        'adamw': Entry('jaxfm.optim.adamw:AdamW', AdamWConfig),
        'muon': Entry('jaxfm.optim.muon:Muon', MuonConfig),
    },
    base=OptimizerConfig,
)

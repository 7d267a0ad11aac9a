"""Optimizers: the rule of each parameter, its schedule, and what a config may say of them."""

from typing import Annotated, Literal

from pydantic import Field

from jaxfm.registry import Entry, Registry
from jaxfm.schema import Group

Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Group):
    """What every optimizer has: its schedule, decay, clipping, and what it leaves alone."""

    learning_rate: float = Field(gt=0)  # after warm-up
    warmup_steps: int = Field(0, ge=0)  # linear, from learning_rate / warmup_steps
    schedule: Literal['cosine', 'linear', 'constant'] = 'cosine'
    decay_steps: int = Field(0, ge=0)  # after warm-up; 0 is the rest of the run
    final_fraction: Share = 0.1  # of learning_rate, at the end of the decay
    weight_decay: float = Field(0.1, ge=0)
    b1: Decay = 0.9
    b2: Decay = 0.95
    eps: float = Field(1e-8, gt=0)
    clip_norm: float = Field(1.0, ge=0)  # of the global gradient; 0 is off
    accumulate: int = Field(1, ge=1)  # microbatches a step
    frozen: list[str] = []  # glob patterns of the paths of parameters that stay as they are
    moment_dtype: Literal['float32', 'bfloat16'] = 'float32'  # of first moments


class AdamWConfig(OptimizerConfig):
    """AdamW for every parameter."""

    name: Literal['adamw'] = 'adamw'


class MuonConfig(OptimizerConfig):
    """Muon for the matrices inside blocks, AdamW with the values above for everything else."""

    name: Literal['muon'] = 'muon'
    muon_learning_rate: float = Field(0.02, gt=0)  # on the same schedule
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

"""Evaluators: a cadence and `run(params, step) -> {name: value}`, run by the training loop.

Held-out loss and sampling-based evaluation stand in the same slot.
"""

from typing import Literal

from pydantic import Field

from jaxfm.registry import Entry, Registry, one_of
from jaxfm.schema import Group
from jaxfm.tasks import TASKS


class EvaluatorConfig(Group):
    """What every evaluator has."""

    name: str
    phase: str = ''  # whose held-out documents; needed when the run has several
    every: int = Field(0, ge=0)  # steps between two runs; 0 is only at the end of each phase
    at_start: bool = True  # also on the weights of step 0


class LossConfig(EvaluatorConfig):
    """Held-out loss per token and in bits per UTF-8 byte."""

    name: Literal['loss'] = 'loss'
    batch_size: int = Field(32, ge=1)  # rows
    sequence_length: int = Field(0, ge=0)  # 0 is the training data's
    stride: int = Field(0, ge=0)  # tokens a row advances by; 0 is sequence_length (no overlap)
    max_batches: int = Field(0, ge=0)  # 0 is all of the held-out text
    xz_baseline: bool = False  # also what `xz -9e` reaches on the same text: a line to beat


class GenerateConfig(EvaluatorConfig):
    """Samples completions of a task's prompts and scores them: pass@1 with its interval."""

    name: Literal['generate'] = 'generate'
    task: one_of(TASKS)
    # Bytes of each phase's training text in which prompts are looked for, at the end; 0 is none.
    contamination_bytes: int = Field(1 << 26, ge=0)
    max_tokens: int = Field(96, ge=1)
    temperature: float = Field(0.0, ge=0)  # 0 is greedy


EVALUATORS = Registry(
    {
        'loss': Entry('jaxfm.evals.loss:HeldOutLoss', LossConfig),
        'generate': Entry('jaxfm.evals.generate:Generate', GenerateConfig),
    },
    base=EvaluatorConfig,
)

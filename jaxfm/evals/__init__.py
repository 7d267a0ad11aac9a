"""Evaluators: objects with a cadence and `run(params, step) -> {name: value}`.

The training loop calls all of them in the same way: held-out loss, sampling-based evaluation,
periodic export.
"""

from typing import Literal

from pydantic import Field

from jaxfm.registry import Entry, Registry, one_of
from jaxfm.sampling import MaxTokens, SamplingOptions, Temperature
from jaxfm.schema import Group
from jaxfm.tasks import TASKS


class EvaluatorConfig(Group):
    """The fields that every evaluator has."""

    name: str
    phase: str = ''  # uses this phase's held-out documents; required if the run has several phases
    every: int = Field(0, ge=0)  # steps between two runs; 0: only at the end of each phase
    at_start: bool = True  # also run on the weights of step 0


class LossConfig(EvaluatorConfig):
    """Held-out loss per token and in bits per UTF-8 byte."""

    name: Literal['loss'] = 'loss'
    batch_size: int = Field(32, ge=1)  # rows
    sequence_length: int = Field(0, ge=0)  # tokens; 0: the sequence_length of the training data
    stride: int = Field(0, ge=0)  # tokens from row to row; 0: sequence_length, without overlap
    max_batches: int = Field(0, ge=0)  # 0: all of the held-out text
    xz_baseline: bool = False  # also record what `xz -9e` reaches on the same text, a baseline


class GenerateConfig(SamplingOptions, EvaluatorConfig):
    """Samples completions of a task's prompts and scores them: pass@1 with a 95 % interval.

    With n > 1, the score of a prompt is the mean over its completions.
    """

    name: Literal['generate'] = 'generate'
    task: one_of(TASKS)
    # Bytes of each phase's training text to search for the prompts, at the end of the run; 0: no
    # search.
    contamination_bytes: int = Field(1 << 26, ge=0)
    max_tokens: MaxTokens = 96
    temperature: Temperature = 0.0


EVALUATORS = Registry(
    {
        'loss': Entry('jaxfm.evals.loss:HeldOutLoss', LossConfig),
        'generate': Entry('jaxfm.evals.generate:Generate', GenerateConfig),
    },
    base=EvaluatorConfig,
)

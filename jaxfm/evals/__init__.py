"""Evaluators: objects with a cadence and `run(params, step) -> {name: value}`.

The training loop calls all of them in the same way, and `--mode eval` too: held-out loss, sampled
completions, likelihoods of choices, perplexity of files, periodic export.
"""

from typing import ClassVar, Literal

from pydantic import Field

from jaxfm.environments import ENVIRONMENTS
from jaxfm.registry import Entry, Registry, one_of
from jaxfm.sampling import MaxTokens, SamplingOptions, Temperature
from jaxfm.sampling.strategies import STRATEGIES
from jaxfm.schema import Group, KeyPath, Problem
from jaxfm.tasks import TASKS


class EvaluatorConfig(Group):
    """The fields that every evaluator has."""

    reads_documents: ClassVar[bool] = False  # it needs the held-out documents of a phase

    name: str
    phase: str = ''  # uses this phase's held-out documents; required if the run has several phases
    every: int = Field(0, ge=0)  # steps between two runs; 0: only at the end of each phase
    at_start: bool = True  # also run on the weights of step 0


class LossConfig(EvaluatorConfig):
    """Held-out loss per token and in bits per UTF-8 byte."""

    reads_documents: ClassVar[bool] = True

    name: Literal['loss'] = 'loss'
    batch_size: int = Field(32, ge=1)  # rows
    sequence_length: int = Field(0, ge=0)  # tokens; 0: the sequence_length of the training data
    stride: int = Field(0, ge=0)  # tokens from row to row; 0: sequence_length, without overlap
    max_batches: int = Field(0, ge=0)  # 0: all of the held-out text
    xz_baseline: bool = False  # also record what `xz -9e` reaches on the same text, a baseline


class PreferenceEvaluatorConfig(EvaluatorConfig):
    """How often the model prefers the better chat of a held-out pair, with 95 % intervals."""

    reads_documents: ClassVar[bool] = True

    name: Literal['preference'] = 'preference'
    batch_size: int = Field(32, ge=1)  # rows
    sequence_length: int = Field(0, ge=0)  # tokens; 0: the sequence_length of the training data


class TaskEvaluatorConfig(EvaluatorConfig):
    """The fields of evaluators that measure a task."""

    task: one_of(TASKS)
    # Intervals treat the prompts of a group as one cluster, such as several questions on one text.
    cluster_by_group: bool = False
    # Bytes of each phase's training text to search for the prompts, at the end of the run; 0: no
    # search.
    contamination_bytes: int = Field(1 << 26, ge=0)


class ThinkingConfig(Group):
    """The marks of a completion's thoughts, which are not judged."""

    start: str = Field('<think>', min_length=1)
    end: str = Field('</think>', min_length=1)
    begun: bool = False  # the prompt ends with `start`, so a completion begins inside its thoughts


class GenerateConfig(SamplingOptions, TaskEvaluatorConfig):
    """Samples n completions of each of a task's prompts and scores them, with 95 % intervals."""

    name: Literal['generate'] = 'generate'
    thinking: ThinkingConfig | None = ThinkingConfig()  # None: thoughts are judged, too
    # How to come to one answer for each prompt (docs/strategies.md); None: n samples, all judged.
    strategy: one_of(STRATEGIES) | None = None
    # What answers between turns of max_tokens each (docs/environments.md). None: there is one turn.
    environment: one_of(ENVIRONMENTS) | None = None
    # For one call of the task's `evaluate`, `answer` or `stop`, or of the environment. Later it
    # fails that sample.
    call_seconds: float = Field(60.0, gt=0, allow_inf_nan=False)
    max_tokens: MaxTokens = 96
    temperature: Temperature = 0.0

    @classmethod
    def find_conflicts(cls, parts: dict) -> list[Problem]:
        found, strategy = super().find_conflicts(parts), parts.get('strategy')
        if strategy is None:
            return found
        if parts.get('environment') is not None:
            sentence = 'a strategy has no environment: set one of the two to None'
            found.append(Problem((('environment',), ('strategy',)), sentence))
        if (n := parts.get('n', 1)) != 1:
            paths: tuple[KeyPath, ...] = ('n',), ('strategy',)
            sentence = f'n is {n}, but with a strategy it must be 1: set strategy.n instead'
            found.append(Problem(paths, sentence))
        most, usual = parts.get('max_tokens'), cls.model_fields['max_tokens'].default
        if not strategy.reads_max_tokens and most not in (None, usual):
            sentence = (
                f'max_tokens {most} would do nothing: strategy {strategy.name} has keys of its own '
                'for the length of a sample'
            )
            found.append(Problem((('max_tokens',), ('strategy', 'name')), sentence))
        return found


class LikelihoodConfig(TaskEvaluatorConfig):
    """Compares the likelihoods of a task's choices, with 95 % intervals."""

    name: Literal['likelihood'] = 'likelihood'


class PerplexityConfig(EvaluatorConfig):
    """The loss on files of text per token, per word and in bits per byte."""

    name: Literal['perplexity'] = 'perplexity'
    # Files or globs. A document is a record of .jsonl, .ndjson or .json, or any other file as a
    # whole; each may be compressed (.gz, .zst).
    path: str | list[str]
    fields: dict[str, str] = {}  # {'text': the key of a record that has the text}
    window: int = Field(0, ge=0)  # tokens that the model sees at once; 0: sampling.max_length
    # Tokens from window to window; 0: without overlap. A smaller stride gives each token more
    # context and costs more.
    stride: int = Field(0, ge=0)
    max_documents: int = Field(0, ge=0)  # the first so many; 0: all


EVALUATORS = Registry(
    {
        'loss': Entry('jaxfm.evals.loss:HeldOutLoss', LossConfig),
        'preference': Entry('jaxfm.evals.preference:HeldOutPreference', PreferenceEvaluatorConfig),
        'generate': Entry('jaxfm.evals.generate:Generate', GenerateConfig),
        'likelihood': Entry('jaxfm.evals.likelihood:Likelihood', LikelihoodConfig),
        'perplexity': Entry('jaxfm.evals.perplexity:Perplexity', PerplexityConfig),
    },
    base=EvaluatorConfig,
)

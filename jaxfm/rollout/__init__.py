"""Rollouts: a source whose batches are samples of the model itself, with the rewards of a task."""

from typing import Annotated, ClassVar, Literal

import pydantic
from pydantic import Field

from jaxfm.data import DATA, SOURCES, Fraction
from jaxfm.environments import ENVIRONMENTS
from jaxfm.evals import ThinkingConfig
from jaxfm.registry import one_of
from jaxfm.sampling import MAX_INT32, MAX_SAMPLES, MaxTokens
from jaxfm.schema import Group, Problem
from jaxfm.tasks import TASKS


def _neutral(wanted: float):
    def check(value: float) -> float:
        if value != wanted:
            raise ValueError(
                f'must be {wanted:g}: the objective takes samples to be from the distribution of '
                f'the model itself, got {value:g}'
            )
        return value

    return pydantic.AfterValidator(check)


class CurriculumConfig(Group):
    """Prompts whose pass rate so far is between `low` and `high`, or unknown, are asked most."""

    low: float = Field(0.1, ge=0, le=1)
    high: float = Field(0.9, ge=0, le=1)
    # How often any other prompt is asked, relative to them.
    floor: float = Field(0.1, gt=0, lt=1)
    # A sample passes if the task's reward is at least this, and a prompt's pass rate is an average
    # in which its newest samples have this share.
    passing: float = Field(0.5, allow_inf_nan=False)
    newest: float = Field(0.5, gt=0, le=1)

    @classmethod
    def find_conflicts(cls, parts: dict) -> list[Problem]:
        low, high, paths = parts.get('low'), parts.get('high'), (('low',), ('high',))
        if low is None or high is None:
            return []
        if low >= high:
            return [Problem(paths, f'low {low:g} must be less than high {high:g}')]
        if (low, high) == (0, 1):
            return [Problem(paths, 'low 0 and high 1 would do nothing: set curriculum to None')]
        return []


class RolloutConfig(Group):
    """Batches of samples: `samples` completions of each of `prompts` prompts, at each step."""

    name: Literal['rollout'] = 'rollout'
    # What is asked, and how an answer is rewarded.
    task: one_of(TASKS)
    # For a task that reads documents: those of this source that are not held out.
    documents: one_of(SOURCES) | None = None
    prompts: int = Field(ge=1)  # of a step
    samples: int = Field(ge=1, le=MAX_SAMPLES)  # of each prompt: its group
    # Tokens in a row of a batch, and rows; all samples of a step must fit, however long they are.
    sequence_length: int = Field(ge=2)
    batch_size: int = Field(ge=1)
    # best_fit: samples side by side in a row. none: one sample per row.
    packing: Literal['best_fit', 'none'] = 'best_fit'
    # A prompt that leaves no room for its completion: stop the run, or leave the prompt out.
    too_long: Literal['error', 'drop'] = 'error'
    max_tokens: MaxTokens = 128  # of a completion; with an environment, of each of its turns
    ignore_eos: bool = False  # the end tokens of tokenizer and chat template stop nothing
    temperature: Annotated[float, _neutral(1)] = 1.0
    top_k: Annotated[int, _neutral(0)] = 0
    top_p: Annotated[float, _neutral(1)] = 1.0
    min_p: Annotated[float, _neutral(0)] = 0.0
    thinking: ThinkingConfig | None = ThinkingConfig()  # None: thoughts are judged, too
    # For one call of the task, or of the environment.
    call_seconds: float = Field(60.0, gt=0, allow_inf_nan=False)
    # What answers between turns of a sample (docs/environments.md). None: it has one turn.
    environment: one_of(ENVIRONMENTS) | None = None
    # zero_variance: a prompt whose samples all have the same reward teaches nothing, so others are
    # sampled in its place, up to `max_refills` times a step (DAPO, section 3.2).
    filter: Literal['none', 'zero_variance'] = 'none'
    max_refills: int = Field(3, ge=1)
    curriculum: CurriculumConfig | None = None  # None: an endless shuffled order of all prompts
    # Subtracted from the reward of a completion as its length goes from max_tokens -
    # overlong_tokens to max_tokens (DAPO, section 3.4).
    overlong_penalty: float = Field(0.0, ge=0, allow_inf_nan=False)
    overlong_tokens: int = Field(0, ge=0, le=MAX_INT32)
    # Completions that max_tokens has cut: train on them, or leave them out of the loss.
    truncated: Literal['train', 'mask'] = 'train'
    # Above 0, samples are made while the loop trains; the weights that make a token may be so many
    # steps older than those that learn from it.
    max_staleness: int = Field(0, ge=0)
    # Steps between two that write their samples to samples/; 0: none.
    write_every: int = Field(50, ge=0)

    cache: ClassVar[str] = ''  # nothing is tokenised before the run

    @property
    def all_sources(self) -> dict[str, Group]:
        """{name: config of the source}: of the documents, if the task reads any."""
        return {self.documents.name: self.documents} if self.documents else {}

    @classmethod
    def find_conflicts(cls, parts: dict) -> list[Problem]:
        """Keys that would do nothing, and completions without room."""
        found, task = [], parts.get('task')
        length, most = parts.get('sequence_length'), parts.get('max_tokens')
        if length and most and most > length:
            sentence = f'max_tokens {most} does not fit a row of sequence_length {length}'
            found.append(Problem((('max_tokens',), ('sequence_length',)), sentence))
        if task is not None and 'documents' in parts:
            reads = getattr(task, 'reads_documents', False)
            if reads != (parts['documents'] is not None):
                sentence = (
                    f'task {task.name} reads documents: documents must name their source'
                    if reads
                    else f'documents would do nothing: task {task.name} reads none'
                )
                found.append(Problem((('documents',), ('task', 'name')), sentence))
        penalty, tokens = parts.get('overlong_penalty', 0), parts.get('overlong_tokens', 0)
        if bool(penalty) != bool(tokens):
            sentence = 'overlong_penalty and overlong_tokens do nothing without each other'
            found.append(Problem((('overlong_penalty',), ('overlong_tokens',)), sentence))
        if most and tokens > most:
            sentence = f'overlong_tokens {tokens} is more than max_tokens {most}'
            found.append(Problem((('overlong_tokens',), ('max_tokens',)), sentence))
        if parts.get('environment') is not None:
            if penalty:
                sentence = 'overlong_penalty is for samples of one turn: set environment to None'
                found.append(Problem((('overlong_penalty',), ('environment',)), sentence))
            if staleness := parts.get('max_staleness', 0):
                sentence = (
                    f'max_staleness is {staleness}, but turns of an environment are limited in '
                    'time by a signal, which a thread that samples ahead does not get: set it to 0'
                )
                found.append(Problem((('max_staleness',), ('environment',)), sentence))
        if parts.get('filter') == 'zero_variance' and parts.get('samples') == 1:
            sentence = 'filter zero_variance needs at least two samples of a prompt'
            found.append(Problem((('filter',), ('samples',)), sentence))
        return found


class RolloutMixtureConfig(RolloutConfig):
    """Some steps on samples of the model itself, the others on documents, in a random order.

    It is the data of generalised knowledge distillation (arXiv 2306.13649), `on_policy_share` its
    lambda.
    """

    name: Literal['rollout_mixture'] = 'rollout_mixture'
    on_policy_share: Fraction = 0.5  # of the steps
    off_policy: one_of(DATA)  # the documents, in rows of the same number and length

    @property
    def all_sources(self) -> dict[str, Group]:
        own, further = super().all_sources, self.off_policy
        if further.cache:  # it has the tokens, so the files may be gone
            return own
        return own | {f'off_policy/{name}': each for name, each in further.all_sources.items()}

    @classmethod
    def find_conflicts(cls, parts: dict) -> list[Problem]:
        found, documents = super().find_conflicts(parts), parts.get('off_policy')
        for key in ('sequence_length', 'batch_size'):
            if documents is not None and key in parts and parts[key] != getattr(documents, key):
                sentence = (
                    f'{key} {parts[key]} and off_policy.{key} {getattr(documents, key)} must be '
                    'equal: both are of the same train step'
                )
                found.append(Problem(((key,), ('off_policy', key)), sentence))
        if parts.get('max_staleness'):
            sentence = (
                'max_staleness needs samples at every step, but rollout_mixture has documents in '
                'between: set it to 0'
            )
            found.append(Problem((('max_staleness',), ('name',)), sentence))
        return found


def documents_of(data: Group) -> Group | None:
    """The documents among a phase's data; None if all of its batches are samples."""
    return getattr(data, 'off_policy', None) if isinstance(data, RolloutConfig) else data

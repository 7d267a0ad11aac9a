"""Scorers and checkers of our own, and how a strategy calls scorers and parsers of answers."""

import math
import numbers
from collections.abc import Callable, Sequence
from functools import partial

from jaxfm.sampling.request import Completion
from jaxfm.sampling.strategies import (
    LogprobConfig,
    RewardCheckerConfig,
    RewardConfig,
    ScorerConfig,
)
from jaxfm.sampling.strategies.base import (
    Branch,
    Call,
    Context,
    OverBudget,
    Problem,
    judged_text,
)


class Reward:
    """The task's reward of the text."""

    def __init__(self, config: RewardConfig, judge):
        self._judge = judge

    def __call__(self, prompt, completion: Completion) -> float:
        return self._judge.reward(prompt, judged_text(self._judge, completion))


class Logprob:
    """The mean or the sum of the log-probs of the sampled tokens, at temperature 1."""

    is_free = True  # no verifier call

    def __init__(self, config: LogprobConfig, judge):
        self._is_mean = config.mean

    def __call__(self, prompt, completion: Branch) -> float:
        total = sum(completion.logprobs)  # ids that were given have 0
        return total / max(completion.num_sampled, 1) if self._is_mean else total


class RewardChecker:
    """Is satisfied with a certain reward."""

    def __init__(self, config: RewardCheckerConfig, judge):
        self._config, self._judge = config, judge

    def __call__(self, prompt, completion: Completion) -> str | None:
        reward = self._judge.reward(prompt, judged_text(self._judge, completion))
        return None if reward >= self._config.at_least else self._config.feedback


def scores(scorer: Callable, config, problem: Problem, branches: Sequence[Branch]):
    """Yields calls -> scores of branches: None where one failed or the budget is spent.

    config: of the scorer, with its range.
    """
    sound = [branch for branch in branches if branch.finish_reason != 'error' and branch.tokens]
    check = partial(_check_score, config) if isinstance(config, ScorerConfig) else None
    arguments = tuple((problem.prompt, branch) for branch in sound)
    try:
        values = yield Call(scorer, arguments, check)
    except OverBudget:
        values = [None] * len(sound)
    found = dict(zip(sound, values))
    return [found.get(branch) for branch in branches]


def _check_score(config: ScorerConfig, value) -> None:
    is_number = isinstance(value, numbers.Real) and math.isfinite(value)
    if not (is_number and config.least <= value <= config.most):
        raise ValueError(
            f'{value!r}, but must return a number from {config.least:g} to {config.most:g} '
            '(least and most of the scorer)'
        )


def answers(context: Context, problem: Problem, branches: Sequence[Completion]):
    """Yields calls -> answers of samples: None without one, or without time to find out."""
    sound = [i for i, branch in enumerate(branches) if branch.finish_reason != 'error']
    if not hasattr(context.judge, 'answer'):
        return [None] * len(branches)
    texts = [judged_text(context.judge, branches[i]) for i in sound]
    arguments = tuple((problem.prompt, text) for text in texts)
    try:
        values = yield Call(context.judge.answer, arguments, _check_answer)
    except OverBudget:
        values = [None] * len(sound)
    found = dict(zip(sound, values))
    return [found.get(i) for i in range(len(branches))]


def _check_answer(value) -> None:
    if not (value is None or isinstance(value, str)):
        raise ValueError(f'{value!r}, but must return a text or None')

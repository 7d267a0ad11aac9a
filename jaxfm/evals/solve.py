"""Evaluation with a strategy of test-time compute: one record for each problem that it solves.

The record has the keys of a sample's, for the answer that the strategy chose, so that files of both
kinds are compared and summarized alike. It also has all samples and what the problem cost.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Iterable

from jaxfm.errors import DataError
from jaxfm.evals import GenerateConfig
from jaxfm.evals.base import Context
from jaxfm.evals.judge import Judge, Verdict
from jaxfm.evals.samples import Samples
from jaxfm.sampling.request import Completion, Request
from jaxfm.sampling.strategies import STRATEGIES, driver
from jaxfm.sampling.strategies import base as strategies
from jaxfm.tasks.base import has_answers

_OF_PROBLEM = ('task', 'step', 'id', 'group', 'seed', 'prompt', 'prompt_tokens')
# A problem that fails, or whose strategy chooses nothing, has no answer.
_NOTHING = Completion('', 0)


class Solver:
    """Runs a strategy on the prompts of a task.

    Args:
      judge: only what it makes visible reaches the task.

    Raises:
      ConfigError: the strategy cannot run with this task, or with several processes.
    """

    def __init__(self, config: GenerateConfig, context: Context, task, judge: Judge):
        self._config, self._context, self._judge = config.strategy, context, judge
        self._task = _judge_of(task, judge)
        driver.check(self._config, context.flops)
        made = strategies.Context(self._task, context.tokenizer)
        strategy = STRATEGIES.load(self._config.name)(self._config, made)
        self._needs = functools.partial(strategies.needs, strategy)

    def check(self, request: Request) -> None:
        """Raises DataError, with the keys, if the sampler has no room for the longest sample."""
        needed = self._needs(request.max_tokens)
        try:
            sampler = self._context.sampler
            sampler.check(dataclasses.replace(request, max_tokens=sum(needed.values())))
        except DataError as error:
            if set(needed) == {'max_tokens'}:
                raise
            told = ' + '.join(f'{key} {tokens}' for key, tokens in needed.items())
            place = f'{self._context.where}.strategy'
            raise DataError(f'{error}; {place} {self._config.name} needs {told}') from None

    def run(
        self,
        params,
        step: int,
        requests: Iterable[Request],
        prompts: dict,
        samples: Samples,
        describe: Callable,
    ) -> None:
        """Adds the record of every problem to `samples` when it is solved; skips what these keep.

        Args:
          requests: one for each prompt; their options are those of every sample.
          describe: (prompt, Completion, Verdict) -> the record of a sample.
        """

        def add(id: str, outcome: strategies.Outcome) -> None:
            samples.add(self._record(prompts[id], outcome, describe))

        problems = [
            strategies.Problem(request.id, request.tokens, _options(request), prompts[request.id])
            for request in requests
            if (request.id, 0) not in samples.kept
        ]
        driver.run(
            self._context.sampler,
            self._config,
            problems,
            params,
            step,
            self._task,
            flops=self._context.flops,
            on_outcome=add,
        )

    def _record(self, prompt, outcome: strategies.Outcome, describe) -> dict:
        judged = [(sample, self._judge.judge(prompt, sample)) for sample in outcome.samples]
        chosen = judged[outcome.chosen] if outcome.chosen is not None else None
        sample, verdict = chosen or (_NOTHING, Verdict(0.0, None))
        if outcome.error is not None:
            verdict = dataclasses.replace(verdict, score=0.0, error=outcome.error)
        record = describe(prompt, sample, verdict)
        if outcome.answer is not None:  # that of a vote is in the form in which it was counted
            record['answer'] = outcome.answer
        if outcome.error is not None:
            record['finish_reason'] = 'error'
        return record | {
            'sample_index': 0,
            'strategy': self._config.name,
            'chosen': outcome.chosen,
            'scores': list(outcome.scores),
            'samples': [_own(describe(prompt, *each)) for each in judged],
            'notes': outcome.record,
            'ledger': dataclasses.asdict(outcome.entry),
        }


def _own(record: dict) -> dict:
    """What is of a sample, not of its problem."""
    return {name: value for name, value in record.items() if name not in _OF_PROBLEM}


def _options(request: Request) -> dict:
    """What `Problem.options` takes of a request."""
    names = {field.name for field in dataclasses.fields(request)}
    return {name: getattr(request, name) for name in names - {'id', 'tokens', 'n', 'sample_index'}}


def _judge_of(task, judge: Judge):
    """A strategy's judge, which sees what follows the thoughts. It has `answer` if the task has."""

    def answer(prompt, text: str) -> str | None:
        shown = judge.visible(text)
        return None if shown is None else task.answer(prompt, shown)

    def reward(prompt, text: str) -> float:
        return task.reward(prompt, judge.visible(text) or '')

    made = types.SimpleNamespace(reward=reward, stop=judge.stops, marked_text=judge.marked_text)
    if has_answers(task):
        made.answer = answer
    return made

"""Sequential refinement: turns of the model, and between two what a checker says about the last.

A turn is appended as the ids that were sampled; only what the checker says is encoded. Every turn
is noted when it ends, and a problem with such a record goes on behind its last turn.
"""

import math

from jaxfm.sampling.request import Completion
from jaxfm.sampling.strategies import CHECKERS, RefinementConfig
from jaxfm.sampling.strategies.base import (
    Actions,
    Branch,
    Call,
    Context,
    Extend,
    Note,
    Outcome,
    Problem,
    Sample,
    Wait,
)
from jaxfm.sampling.strategies.scorers import answers


class Refinement:
    """`samples` of the outcome are the turns, of which the last one is chosen.

    A record of a turn has `tokens` and `logprobs` of what was sampled, `finish_reason`, `stop`,
    `feedback` (None: satisfied), and `appended`, the ids that lead to the next turn.
    """

    def __init__(self, config: RefinementConfig, context: Context):
        self._config, self._context = config, context
        self._checker = CHECKERS.load(config.checker.name)(config.checker, context.judge)
        self._before, self._after = (
            context.encode(text, with_special=True) if text else []
            for text in (config.before, config.after)
        )

    def run(self, problem: Problem) -> Actions:
        turns = [self._restore(problem, i, turn) for i, turn in enumerate(problem.record)]
        last = problem.record[-1] if problem.record else None
        if last is None or last['appended']:
            ids = [i for turn in problem.record for i in (*turn['tokens'], *turn['appended'])]
            [branch] = yield Sample(tokens=ids)
            turns += yield from self._turns(problem, branch, len(ids), len(turns))
        found = yield from answers(self._context, problem, turns)
        return Outcome(turns, (), found, len(turns) - 1, found[-1])

    def _turns(self, problem: Problem, branch: Branch, start: int, count: int):
        turns = []
        while True:
            yield Wait([branch])
            if len(branch.tokens) == start and count + len(turns):
                return turns  # there was no room for another one
            turn = self._turn(problem, branch, start, count + len(turns))
            turns.append(turn)
            feedback, appended = None, []
            if turn.finish_reason not in ('error', 'budget'):
                [feedback] = yield Call(self._checker, ((problem.prompt, turn),), _check_feedback)
            is_last = count + len(turns) == self._config.max_turns
            if feedback is not None and not is_last:
                appended = self._appended(turn, feedback)
                start = len(branch.tokens) + len(appended)
            yield Note(_record(turn, feedback, appended))
            if not appended:
                return turns
            options = {name: problem.options.get(name, 0) for name in ('max_tokens', 'min_tokens')}
            yield Extend(branch, appended, options)

    def _turn(self, problem: Problem, branch: Branch, start: int, index: int) -> Completion:
        """The turn that begins with the `start`-th token of a branch."""
        return Completion(
            problem.id,
            index,
            branch.tokens[start:],
            branch.logprobs[start:],
            branch.sampling_logprobs[start:],
            branch.top_logprobs[start:],
            text=self._context.text(branch.tokens[start:], branch.stop),
            finish_reason=branch.finish_reason,
            stop=branch.stop,
            error=branch.error,
        )

    def _appended(self, turn: Completion, feedback: str) -> list[int]:
        before = self._before
        if turn.tokens and before[:1] == turn.tokens[-1:] and turn.stop == turn.tokens[-1]:
            before = before[1:]
        said = self._context.encode(feedback) if feedback else []
        return [*before, *said, *self._after]

    def _restore(self, problem: Problem, index: int, turn) -> Completion:
        """A turn as its record tells it."""
        tokens, stop = list(turn['tokens']), turn['stop']
        unknown = [math.nan] * len(tokens)
        text, reason = self._context.text(tokens, stop), turn['finish_reason']
        completion = Completion(problem.id, index, tokens, list(turn['logprobs']), unknown)
        completion.text, completion.finish_reason, completion.stop = text, reason, stop
        return completion


def _record(turn: Completion, feedback: str | None, appended: list[int]) -> dict:
    return {
        'tokens': turn.tokens,
        'logprobs': turn.logprobs,
        'finish_reason': turn.finish_reason,
        'stop': turn.stop,
        'feedback': feedback,
        'appended': appended,
    }


def _check_feedback(value) -> None:
    if not (value is None or isinstance(value, str)):
        raise ValueError(f'{value!r}, but must return what to do better, or None')

"""Compute-optimal scaling (Snell et al. 2024): a problem's strategy follows its difficulty.

Nobody tells the difficulty: it is estimated from the model's own first samples, which the problem
pays for like all others. `allocate` learns which strategy suits which difficulty, on problems that
are not those it is judged on.
"""

import dataclasses
from collections.abc import Sequence

from jaxfm.errors import ConfigError
from jaxfm.sampling.strategies import SCORERS, STRATEGIES, ComputeOptimalConfig, replay
from jaxfm.sampling.strategies.base import (
    Actions,
    Branch,
    Context,
    Note,
    Outcome,
    Problem,
    Sample,
    Wait,
    needs,
)
from jaxfm.sampling.strategies.scorers import answers, scores


class ComputeOptimal:
    """Takes a few samples, then the strategy of the level that they reach.

    A strategy that begins with plain samples, such as `vote`, begins with those that are there.

    Raises:
      ConfigError: nothing parses answers, and no scorer takes their place; or as the strategies do.
    """

    def __init__(self, config: ComputeOptimalConfig, context: Context):
        if config.scorer is None and not hasattr(context.judge, 'answer'):
            raise ConfigError(
                'strategy compute_optimal: the task has no answers that could agree: set scorer'
            )
        self._config, self._context, self._scorer = config, context, None
        if config.scorer is not None:
            self._scorer = SCORERS.load(config.scorer.name)(config.scorer, context.judge)
        chosen = [level.strategy for level in config.levels]
        self._strategies = [STRATEGIES.load(each.name)(each, context) for each in chosen]

    def needs(self, max_tokens: int) -> dict[str, int]:
        """Those of the level that has the longest samples, or of the first samples."""
        found = [needs(strategy, max_tokens) for strategy in self._strategies]
        return max([{'max_tokens': max_tokens}, *found], key=lambda each: sum(each.values()))

    def run(self, problem: Problem) -> Actions:
        first = yield Sample(self._config.first, is_judged=True)
        yield Wait(first)
        confidence = yield from self._estimate(problem, first)
        bounds = [each.at_least for each in self._config.levels[:-1]]
        level = level_of(confidence, bounds)
        if not problem.record:  # or it has been noted before an interruption
            yield Note({'confidence': confidence, 'level': level})
        inner = dataclasses.replace(problem, record=problem.record[1:])
        outcome = yield from _begun(self._strategies[level].run(inner), first)
        return _with_unused(outcome, first)

    def _estimate(self, problem: Problem, branches: Sequence[Branch]):
        """How sure the model is: the mean score, or the share of the most frequent answer."""
        if self._scorer is None:
            found = yield from answers(self._context, problem, branches)
            return agreement(found)
        found = yield from scores(self._scorer, self._config.scorer, problem, branches)
        known = [score for score in found if score is not None]
        return sum(known) / len(known) if known else None


def level_of(confidence: float | None, bounds: Sequence[float]) -> int:
    """The index of the first bound that is reached; len(bounds), the last level, if none is."""
    if confidence is None:
        return len(bounds)
    return next((i for i, bound in enumerate(bounds) if confidence >= bound), len(bounds))


def agreement(found: Sequence[str | None]) -> float:
    """The share of the most frequent of some answers; None is no answer and agrees with none."""
    return max(replay.tally(found).values(), default=0) / len(found)


def _begun(actions: Actions, first: Sequence[Branch]) -> Actions:
    """A strategy's actions, without the plain samples that have been taken before it."""
    left, value, error = list(first), None, None
    try:
        while True:
            try:
                action = actions.send(value) if error is None else actions.throw(error)
            except StopIteration as stop:
                return stop.value
            value = error = None
            try:
                if left and isinstance(action, Sample) and _is_plain(action):
                    taken, left = left[: action.n], left[action.n :]
                    count = action.n - len(taken)
                    value = taken + ((yield Sample(count, is_judged=True)) if count else [])
                else:
                    value = yield action
            except Exception as raised:  # what an action raises is the strategy's to handle
                error = raised
    finally:
        actions.close()


def _with_unused(outcome, first: Sequence[Branch]):
    """A strategy's outcome, which ends with those of the first samples that it did not take."""
    if not isinstance(outcome, Outcome):
        return outcome  # the driver tells what is wrong
    unused = [branch for branch in first if branch not in outcome.samples]
    found = {name: getattr(outcome, name) for name in ('scores', 'answers')}
    nothing = [None] * len(unused)
    longer = {name: [*values, *nothing] for name, values in found.items() if values}
    return dataclasses.replace(outcome, samples=[*outcome.samples, *unused], **longer)


def _is_plain(action: Sample) -> bool:
    return action == Sample(action.n, is_judged=True)


@dataclasses.dataclass(frozen=True)
class Trial:
    """What one strategy did with one problem."""

    score: float
    tokens: float  # or dollars, or what else is limited


def allocate(
    confidences: Sequence[float | None],
    trials: Sequence[Sequence[Trial]],
    bounds: Sequence[float],
    limit: float,
) -> list[int]:
    """The strategy for each level with the highest mean score within a mean cost.

    Args:
      confidences: of P problems, as `ComputeOptimal` notes them.
      trials: [P][C], of C strategies on each problem; they cost what the first samples cost, too.
      bounds: `at_least` of all levels but the last, from high to low.
      limit: of the mean of `tokens`.

    Returns:
      [len(bounds) + 1] indices of strategies. Of equal scores, the cheapest; a level that no
      problem reaches gets what the level after it gets, or the cheapest strategy of all.

    Raises:
      ValueError: there is no problem, bounds do not fall, or every choice exceeds the limit.
    """
    if not trials or len(confidences) != len(trials):
        raise ValueError(f'{len(trials)} problems with trials, {len(confidences)} confidences')
    if list(bounds) != sorted(set(bounds), reverse=True):
        raise ValueError(f'bounds {list(bounds)} must fall')
    levels: list[list[Sequence[Trial]]] = [[] for _ in (*bounds, None)]
    for confidence, row in zip(confidences, trials):
        levels[level_of(confidence, bounds)].append(row)
    # Sums over levels, of which only those stay that no cheaper choice equals: (cost, score, who).
    best: list[tuple[float, float, tuple]] = [(0.0, 0.0, ())]
    for rows in levels:
        options = _totals(rows) if rows else [(0.0, 0.0, None)]
        sums = [(a + c, b + s, (*who, one)) for a, b, who in best for c, s, one in options]
        best = _undominated(sums)
    within = [each for each in best if each[0] <= limit * len(trials) * (1 + 1e-12)]
    if not within:
        raise ValueError(f'the cheapest choice costs {best[0][0] / len(trials):g}, not {limit:g}')
    chosen = list(within[-1][2])
    following = min(_totals(trials))[2]
    for index in reversed(range(len(chosen))):
        following = chosen[index] = following if chosen[index] is None else chosen[index]
    return chosen


def _totals(rows: Sequence[Sequence[Trial]]) -> list[tuple[float, float, int]]:
    """(cost, score, index) of each strategy, summed over problems."""
    columns = list(zip(*rows, strict=True))
    return [
        (sum(trial.tokens for trial in column), sum(trial.score for trial in column), index)
        for index, column in enumerate(columns)
    ]


def _undominated(sums: list[tuple]) -> list[tuple]:
    """From cheap to dear, each with a higher score than all before it."""
    found = []
    for each in sorted(sums, key=lambda each: (each[0], -each[1])):
        if not found or each[1] > found[-1][1]:
            found.append(each)
    return found

"""A vote over answers, plain or weighted, which may stop before all samples are taken."""

import math

from jaxfm.errors import ConfigError
from jaxfm.sampling.strategies import SCORERS, LogprobConfig, VoteConfig, replay
from jaxfm.sampling.strategies.base import Actions, Context, Outcome, Problem, Sample, Wait
from jaxfm.sampling.strategies.scorers import answers, scores
from jaxfm.sampling.strategies.stopping import Rule, rounds_of


class Vote:
    """Self-consistency (Wang et al. 2022). `scores` of the outcome are the votes' weights.

    Raises:
      ConfigError: nothing parses answers; scores that weigh votes may be outside [0, 1].
    """

    def __init__(self, config: VoteConfig, context: Context):
        if not hasattr(context.judge, 'answer'):
            raise ConfigError('strategy vote: the task has no answers to vote on')
        self._config, self._context, self._scorer = config, context, None
        if (weights := config.weights) is not None:
            self._scorer = SCORERS.load(weights.name)(weights, context.judge)
            if not self._is_probability and not 0 <= weights.least <= weights.most <= 1:
                raise ConfigError(
                    f'strategy vote: weights are from 0 to 1, but those of {weights.name} are from '
                    f'{weights.least:g} to {weights.most:g}'
                )
        rounds = rounds_of(config.n, config.adaptive)
        self._rule = Rule(rounds, config.delta, is_weighted=self._scorer is not None)

    @property
    def _is_probability(self) -> bool:
        return isinstance(self._config.weights, LogprobConfig)

    def run(self, problem: Problem) -> Actions:
        branches, found, weights = [], [], None if self._scorer is None else []
        for size in self._rule.rounds:
            new = yield Sample(size - len(branches), is_judged=True)
            yield Wait(new)
            branches += new
            found += yield from answers(self._context, problem, new)
            if weights is not None:
                weights += yield from self._weigh(problem, new)
            is_spent = any(branch.finish_reason == 'budget' for branch in new)
            if is_spent or self._rule.is_settled(found, weights):
                break
        chosen = replay.winner(found, weights)
        answer = None if chosen is None else found[chosen]
        return Outcome(branches, weights or (), found, chosen, answer)

    def _weigh(self, problem: Problem, branches):
        values = yield from scores(self._scorer, self._config.weights, problem, branches)
        if not self._is_probability:
            return values
        return [None if value is None else math.exp(value) for value in values]

"""Best of n: independent samples, of which the one with the highest score is chosen."""

from jaxfm.sampling.strategies import SCORERS, BestOfNConfig, replay
from jaxfm.sampling.strategies.base import Actions, Context, Outcome, Problem, Sample, Wait
from jaxfm.sampling.strategies.scorers import answers, scores


class BestOfN:
    """Scores each sample when it ends, while the others go on."""

    def __init__(self, config: BestOfNConfig, context: Context):
        self._config, self._context = config, context
        self._scorer = SCORERS.load(config.scorer.name)(config.scorer, context.judge)

    def run(self, problem: Problem) -> Actions:
        branches = yield Sample(self._config.n, is_judged=True)
        found, left = {}, list(branches)
        while left:
            ended = yield Wait(left, 'any')
            left = [branch for branch in left if branch not in ended]
            values = yield from scores(self._scorer, self._config.scorer, problem, ended)
            found |= zip(ended, values)
        ordered = [found[branch] for branch in branches]
        chosen = replay.best(ordered)
        parsed = yield from answers(self._context, problem, branches)
        answer = None if chosen is None else parsed[chosen]
        return Outcome(branches, ordered, parsed, chosen, answer)

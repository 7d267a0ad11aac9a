"""Beam search over steps of text: the best beginnings are kept and expanded.

A step ends with a delimiter or after some tokens. With `subtrees` the beams of each subtree compete
only among themselves (diverse verifier tree search).
"""

import itertools
from collections.abc import Iterable

from jaxfm.sampling.strategies import SCORERS, BeamSearchConfig, replay
from jaxfm.sampling.strategies.base import (
    Actions,
    Branch,
    Context,
    Fork,
    Outcome,
    Problem,
    Sample,
    Wait,
)
from jaxfm.sampling.strategies.scorers import answers, scores


class BeamSearch:
    """The scorer sees a completion as far as it goes, after each of its steps."""

    def __init__(self, config: BeamSearchConfig, context: Context):
        self._config, self._context = config, context
        self._scorer = SCORERS.load(config.scorer.name)(config.scorer, context.judge)
        self._kept = config.width // config.subtrees

    def run(self, problem: Problem) -> Actions:
        config = self._config
        new = yield Sample(config.width * config.expansions, options=self._step(problem, 0))
        trees = [list(tree) for tree in itertools.batched(new, self._kept * config.expansions)]
        found: dict[Branch, float | None] = {}
        for depth in range(config.max_steps):
            yield Wait(new)
            values = yield from scores(self._scorer, config.scorer, problem, new)
            found |= zip(new, values)
            trees = [self._best(tree, found) for tree in trees]
            open = [b for tree in trees for b in tree if not self._is_whole(problem, b)]
            if not open or depth == config.max_steps - 1:
                break
            children = yield from self._expand(problem, open)
            new = list(itertools.chain(*children.values()))
            trees = [[x for b in tree for x in children.get(b, [b])] for tree in trees]
        return (yield from self._choose(problem, itertools.chain(*trees), found))

    def _best(self, tree: list[Branch], found: dict) -> list[Branch]:
        """Those to keep, best first; without a score, last."""
        key = {branch: float('-inf') if found[branch] is None else found[branch] for branch in tree}
        return sorted(tree, key=key.get, reverse=True)[: self._kept]

    def _expand(self, problem: Problem, branches: Iterable[Branch]):
        children = {}
        for branch in branches:
            options = self._step(problem, len(branch.tokens))
            children[branch] = yield Fork(branch, self._config.expansions, options=options)
        return children

    def _choose(self, problem: Problem, leaves: Iterable[Branch], found: dict):
        """The best whole completion; if there is none, the best beginning."""
        leaves = list(leaves)
        values = [found[branch] for branch in leaves]
        whole = [self._is_whole(problem, branch) for branch in leaves]
        among = [
            value if is_whole or not any(whole) else None for value, is_whole in zip(values, whole)
        ]
        chosen = replay.best(among)
        parsed = yield from answers(self._context, problem, leaves)
        answer = None if chosen is None else parsed[chosen]
        return Outcome(leaves, values, parsed, chosen, answer)

    def _step(self, problem: Problem, length: int) -> dict:
        """Options of the next step behind a number of tokens."""
        left = problem.options['max_tokens'] - length
        stops = list(problem.options.get('stop', ()))
        if self._config.delimiter and self._config.delimiter not in stops:
            stops.append(self._config.delimiter)
        least = max(problem.options.get('min_tokens', 0) - length, 0)
        most = min(self._config.step_tokens, left)
        return {'max_tokens': most, 'min_tokens': min(least, most), 'stop': stops}

    def _is_whole(self, problem: Problem, branch: Branch) -> bool:
        """Whether nothing can follow, because it has ended by more than the end of a step."""
        if len(branch.tokens) >= problem.options['max_tokens']:
            return True
        if branch.finish_reason == 'stop':
            is_delimiter = branch.stop == self._config.delimiter
            return not is_delimiter or branch.stop in problem.options.get('stop', ())
        return branch.finish_reason != 'length'

"""Budget forcing: the model thinks for a number of tokens between two limits.

If it ends its thinking too early, the end is taken back and `wait` put in its place; if it thinks
too long, `closing` closes the thinking. Then it answers.
"""

from jaxfm.sampling.strategies import BudgetForcingConfig
from jaxfm.sampling.strategies.base import (
    Actions,
    Branch,
    Context,
    Extend,
    Note,
    Outcome,
    Problem,
    Sample,
    Wait,
)
from jaxfm.sampling.strategies.scorers import answers


class BudgetForcing:
    """min_think <= ids before the end of thinking <= max_think, in every sample that has one.

    Raises ValueError without a tokenizer, or if `wait` or `closing` has no ids.
    """

    def __init__(self, config: BudgetForcingConfig, context: Context):
        self._config, self._context = config, context
        self._wait = context.encode(config.wait, with_special=True)
        self._closing = context.encode(config.closing, with_special=True)
        special = context.tokenizer.special_tokens
        # A special token has no text, so it ends the thinking as an id.
        self._end_id = special.get(config.end)

    def needs(self, max_tokens: int) -> dict[str, int]:
        """The keys that say how long a sample may be; max_tokens is none of them."""
        config = self._config
        return {
            'max_think': config.max_think,
            'closing': len(self._closing),
            'answer_tokens': config.answer_tokens,
        }

    def run(self, problem: Problem) -> Actions:
        [branch] = yield Sample(options=self._thinking(problem, self._config.max_think))
        thought, wait, is_closed = yield from self._think(problem, branch)
        if branch.finish_reason not in ('error', 'budget'):
            options = {**problem.options, 'max_tokens': self._config.answer_tokens}
            options |= {'min_tokens': 0, 'stop': problem.options.get('stop', ())}
            options['stop_ids'] = problem.options.get('stop_ids', frozenset())
            if is_closed:
                yield Extend(branch, (), options)
            else:
                yield Extend(branch, [*wait, *self._closing], options, keep=thought)
            yield Wait([branch])
        yield Note({'thought': thought + len(wait), 'is_forced': not is_closed})
        [answer] = yield from answers(self._context, problem, [branch])
        return Outcome([branch], (), [answer], 0, answer)

    def _think(self, problem: Problem, branch: Branch):
        """-> (ids of the thinking, ids to append to it, whether the model closed it itself)."""
        least, most = self._config.min_think, self._config.max_think
        while True:
            yield Wait([branch])
            thought, is_closed = self._thought(branch)
            if branch.finish_reason != 'stop' or thought >= least:
                return thought, [], is_closed
            wait = self._wait[: most - thought]
            left = most - thought - len(wait)
            if not left:  # there is no room to think on
                return thought, wait, False
            yield Extend(branch, wait, self._thinking(problem, left), keep=thought)

    def _thinking(self, problem: Problem, max_tokens: int) -> dict:
        """Options of samples that end where the thinking does."""
        stops, ids = problem.options.get('stop', ()), problem.options.get('stop_ids', ())
        if self._end_id is None:
            stops = [*stops, self._config.end]
        else:
            ids = [*ids, self._end_id]
        options = {'stop': stops, 'stop_ids': frozenset(ids), 'max_tokens': max_tokens}
        return options | {'min_tokens': 0}

    def _thought(self, branch: Branch) -> tuple[int, bool]:
        """-> (ids before the end of the thinking, whether the model ended it there)."""
        tokens, stop = branch.tokens, branch.stop
        if branch.finish_reason != 'stop':
            return len(tokens), False
        if not isinstance(stop, str):
            return len(tokens) - 1, stop == self._end_id
        count, text = len(tokens), self._context.text(tokens, stop)
        while count and len(self._context.text(tokens[:count])) > len(text):
            count -= 1
        return count, stop == self._config.end

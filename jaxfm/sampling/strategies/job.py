"""One problem of a driver: its generator, its branches, and what it may still spend.

Ids of a branch are those that events have told. A copy or an extension of it is a request with
these ids, not the engine's `fork` or `extend`: the engine may hold more, which no event has told
yet, and the record must have the ids that were read. Pages are shared as in a fork.
"""

import collections
import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxfm.errors import DataError
from jaxfm.sampling.request import Event, Request
from jaxfm.sampling.strategies import StrategyConfig
from jaxfm.sampling.strategies.base import (
    Branch,
    Call,
    Cancel,
    Context,
    Extend,
    Fork,
    Note,
    Outcome,
    OverBudget,
    Problem,
    Sample,
    Score,
    Strategy,
    Wait,
    judged_text,
)
from jaxfm.sampling.strategies.budget import Budget, Segment
from jaxfm.sampling.strategies.calls import Calls, Result
from jaxfm.sampling.strategies.ledger import Account

_MOST_ACTIONS = 10_000  # without any that takes time; then a strategy is taken to be in a loop


@dataclasses.dataclass(frozen=True)
class Place:
    """What all jobs of a driver share."""

    sampler: Any
    calls: Calls
    context: Context
    config: StrategyConfig


def score_id(problem: Problem) -> str:
    """The id of its requests that only score."""
    return f'log-probs of {problem.id}'


class Job:
    """Runs a strategy on one problem until `outcome` is there."""

    def __init__(self, problem: Problem, strategy: Strategy, place: Place, account: Account):
        self.problem, self.account, self.outcome = problem, account, None
        self._budget = Budget(place.config.budget, account)
        self.id, self.score_id = problem.id, score_id(problem)
        self._place, self._sampler = place, place.sampler
        self._strategy, self._generator = strategy, None
        self._branches: list[Branch] = []
        self._segments: dict[Branch, Segment] = {}
        self._running: dict[int, Branch] = {}  # by sample index
        self._begun: set[int] = set()  # sample indices that the sampler was given
        self._waiting = collections.deque()  # for what others give back of the budget
        self._news: set[Branch] = set()
        self._record = list(problem.record)
        self.untold: list[Mapping[str, Any]] = []  # of the record
        self._blocked: Wait | Score | Call | None = None
        self._values: dict[int, Any] = {}  # of a Call, as far as it is done
        self._scored: Event | None = None  # of a Score

    @property
    def num_requests(self) -> int:
        """Requests of this job that the sampler has."""
        return len(self._running) + isinstance(self._blocked, Score)

    def begin(self) -> None:
        """Runs the generator up to what it waits for first."""
        try:
            generator = self._strategy.run(self.problem)
        except Exception as error:
            return self.fail(error)
        if not hasattr(generator, 'throw'):
            return self.fail(TypeError(f'run() gives {generator!r}, but must be a generator'))
        self._generator = generator
        self._advance()

    def take(self, event: Event) -> None:
        """Notes what a sample tells; `resume` follows when all events of a step are noted."""
        if event.id == self.score_id:
            self._scored = event  # the only one
        elif branch := self._running.get(event.sample_index):
            branch.add(event)
            self._news.add(branch)
            if event.finish_reason:
                self._end(branch)
            elif self._segments[branch].is_judged:
                self._stop_judged(branch)

    def resume(self) -> None:
        """Goes on if what the generator waits for has come."""
        if self._budget.is_over:
            for branch in self._unfinished():
                self._cancel(branch, 'budget')
        self._start_waiting()
        if isinstance(self._blocked, Wait) and self._is_due(self._blocked):
            self._advance(self._ended(self._blocked))
        elif self._scored:
            self._score_done()

    def called(self, index: int, result: Result) -> None:
        """Notes the result of a call, and goes on if it is the last one."""
        self.account.call(result.seconds)
        call, error = self._blocked, result.error
        if error is None:
            self._values[index] = result.value
            if len(self._values) < len(call.arguments):
                return
            values = [self._values[i] for i in range(len(call.arguments))]
            error = _complaint(call, values)
        if error is None:
            return self._advance(values)
        self._place.calls.drop(self)
        if isinstance(error, TimeoutError):
            error = TimeoutError(f'{_name(call.function)} {error}')
            if not self._budget.seconds_left:
                error = OverBudget(str(error))
        self._advance(error=error)

    def fail(self, error: BaseException) -> None:
        """Ends the problem with a reason; its requests are cancelled."""
        told = str(error) if isinstance(error, DataError) else f'{type(error).__name__}: {error}'
        self._finish(Outcome(list(self._branches), error=told))

    def _advance(self, value=None, error: Exception | None = None) -> None:
        for _ in range(_MOST_ACTIONS):
            self._blocked = None
            try:
                send = self._generator.send
                action = send(value) if error is None else self._generator.throw(error)
            except StopIteration as stop:
                return self._returned(stop.value)
            except Exception as raised:
                return self.fail(raised)
            value = error = None
            try:
                value = self._do(action)
            except Exception as raised:
                error = raised  # the strategy may know better
            if self._blocked is not None:
                return
        self.fail(RuntimeError(f'the strategy yields {_MOST_ACTIONS} actions and waits for none'))

    def _returned(self, outcome) -> None:
        if not isinstance(outcome, Outcome):
            return self.fail(TypeError(f'the strategy returns {outcome!r}, but no Outcome'))
        count = len(outcome.samples)
        if outcome.chosen is not None and outcome.chosen not in range(count):
            return self.fail(IndexError(f'chosen is {outcome.chosen}, but there are {count}'))
        self._finish(outcome)

    def _finish(self, outcome: Outcome) -> None:
        self._place.calls.drop(self)
        self._sampler.cancel(self.score_id)
        for branch in self._unfinished():
            self._cancel(branch, 'cancelled')
        self._blocked = self._scored = None
        with contextlib.suppress(Exception):  # its own cleaning up may fail
            if self._generator:
                self._generator.close()
        outcome.entry, outcome.record = self.account.entry, self._record
        self.outcome = outcome

    def _do(self, action):
        match action:
            case Sample():
                return self._sample(action)
            case Fork():
                return self._fork(action)
            case Extend():
                return self._extend(action)
            case Cancel():
                if self._segment(action.branch) and action.branch.is_running:
                    self._cancel(action.branch, 'cancelled')
                    self._start_waiting()
            case Score():
                self._score(action)
            case Wait():
                self._blocked = None if self._is_due(action) else action
                return self._ended(action)
            case Call():
                return self._call(action)
            case Note():
                self._record.append(action.value)
                self.untold.append(action.value)
            case _:
                raise TypeError(f'the strategy yields {action!r}, which is no action')

    # Samples

    def _sample(self, action: Sample) -> list[Branch]:
        options = {**self.problem.options, **action.options}
        new = []
        for _ in range(action.n):
            # The prompt is stored if there was a sample before.
            known = len(self.problem.tokens) - 1 if self._branches else 0
            branch = self._new_branch()
            branch.give(action.tokens, has_top=self._has_top)
            segment = self._new_segment(branch, dict(options), known, action.is_judged)
            self._begin(branch, segment, fits=bool(action.tokens))
            new.append(branch)
        return new

    @property
    def _has_top(self) -> bool:
        return self.problem.options.get('top_logprobs', 0) > 0

    def _new_branch(self) -> Branch:
        index = self.problem.options.get('sample_index', 0) + len(self._branches)
        branch = Branch(self.problem.id, index)
        self._branches.append(branch)
        return branch

    def _new_segment(self, branch: Branch, options: dict, known: int, is_judged: bool) -> Segment:
        length = len(self.problem.tokens) + len(branch.tokens)
        known -= known % self._sampler.config.page_size  # whole pages stay known
        return Segment(options, length, known, len(branch.tokens), is_judged)

    def _fork(self, action: Fork) -> list[Branch]:
        source, old = action.branch, self._segment(action.branch)
        if source.is_running:
            self._sampler.share(self.id, source.sample_index)
        known, new = len(self.problem.tokens) + len(source.tokens) - 1, []
        for _ in range(action.n):
            branch = self._new_branch()
            branch.copy_from(source)
            branch.give(action.tokens, has_top=self._has_top)
            options = _options_after(old, source, action.options)
            self._begin(branch, self._new_segment(branch, options, known, old.is_judged), fits=True)
            new.append(branch)
        return new

    def _extend(self, action: Extend) -> None:
        branch, old = action.branch, self._segment(action.branch)
        if branch.is_running:
            self._cancel(branch, None)
        options = _options_after(old, branch, action.options)
        if action.keep is not None:
            branch.cut(action.keep)
        known = len(self.problem.tokens) + len(branch.tokens) - 1
        branch.give(action.tokens, has_top=self._has_top)
        branch.finish_reason = branch.stop = branch.error = None
        self._begin(branch, self._new_segment(branch, options, known, old.is_judged), fits=True)

    def _segment(self, branch: Branch) -> Segment:
        if branch not in self._segments:
            raise ValueError(f'problem {self.problem.id} has no such branch (of {branch.id})')
        return self._segments[branch]

    def _request(self, branch: Branch) -> Request:
        options = {**self._segments[branch].options, 'sample_index': branch.sample_index, 'n': 1}
        options['min_tokens'] = min(options.get('min_tokens', 0), options['max_tokens'])
        return Request(self.id, [*self.problem.tokens, *branch.tokens], **options)

    def _begin(self, branch: Branch, segment: Segment, *, fits: bool) -> None:
        """fits: the sampler's length limits what it samples, and is no error."""
        self._segments[branch] = segment
        branch.text = self._place.context.text(branch.tokens)
        if fits and 1 <= segment.max_tokens:
            room = self._sampler.longest - segment.length
            segment.options['max_tokens'] = min(segment.max_tokens, max(room, 0))
            if room < 1:
                branch.finish_reason = 'length'
                return
        self._sampler.check(self._request(branch))
        branch.is_running = True
        self._waiting.append(branch)
        self._start_waiting()

    def _start_waiting(self) -> None:
        """Begins branches, in their order, as far as the budget has room for their whole length.

        If nothing runs that could give some of it back, the next one gets what is left.
        """
        while self._waiting:
            branch = self._waiting[0]
            segment = self._segments[branch]
            running = ((other, self._segments[other]) for other in self._running.values())
            room = self._budget.room(segment, running)
            if room < segment.max_tokens and self._running:
                return
            self._waiting.popleft()
            if room < 1:
                self._cancel(branch, 'budget')
                continue
            segment.is_capped = room < segment.max_tokens
            segment.options['max_tokens'] = room
            self._running[branch.sample_index] = branch
            self._begun.add(branch.sample_index)
            self.account.entry.samples = len(self._begun)
            num_prompt = len(self.problem.tokens)
            self._sampler.add(self._request(branch), meter=self.account, num_prompt=num_prompt)

    def _unfinished(self) -> list[Branch]:
        return [*self._running.values(), *self._waiting]

    def _cancel(self, branch: Branch, reason: str | None) -> None:
        if branch in self._waiting:
            self._waiting.remove(branch)
        if self._running.pop(branch.sample_index, None):
            self._sampler.cancel(self.id, branch.sample_index)
        branch.is_running, branch.finish_reason = False, reason

    def _end(self, branch: Branch) -> None:
        del self._running[branch.sample_index]
        segment = self._segments[branch]
        branch.is_running = False
        if segment.is_capped and branch.finish_reason == 'length':
            branch.finish_reason = 'budget'
        if segment.start:  # decoded in one piece
            branch.text = self._place.context.text(branch.tokens, branch.stop)

    def _stop_judged(self, branch: Branch) -> None:
        judge = self._place.context.judge
        stop = getattr(judge, 'stop', None)
        try:
            if stop and stop(self.problem.prompt, judged_text(judge, branch)):
                self._cancel(branch, None)
        except Exception as error:
            self.fail(error)

    # What is waited for

    def _is_due(self, wait: Wait) -> bool:
        running = [branch for branch in wait.branches if branch.is_running]
        if wait.until == 'news':
            return not running or not self._news.isdisjoint(wait.branches)
        return not running or (wait.until == 'any' and len(running) < len(wait.branches))

    def _ended(self, wait: Wait) -> list[Branch]:
        self._news.difference_update(wait.branches)
        return [branch for branch in wait.branches if not branch.is_running]

    def _score(self, score: Score) -> None:
        tokens = [*self.problem.tokens, *score.tokens]
        first, count = len(self.problem.tokens) + score.start, len(score.tokens) - score.start
        running = ((branch, self._segments[branch]) for branch in self._running.values())
        if self._budget.room(Segment({'max_tokens': count}, first, 0, 0), running) < count:
            raise OverBudget(f'log-probs of {count} tokens exceed the budget')
        options = {'prompt_logprobs': True, 'prompt_logprobs_from': first}
        self._sampler.add(Request(self.score_id, tokens, 0, **options), meter=self.account)
        self.account.entry.score_tokens += count
        self._budget.score_flops = self.account.flops_of(0, len(tokens))
        self._blocked = score

    def _score_done(self) -> None:
        logprobs, self._scored, self._budget.score_flops = self._scored.prompt_logprobs, None, 0.0
        if any(map(math.isnan, logprobs)):
            return self._advance(error=ValueError('the model gives NaN log-probs'))
        self._advance(logprobs)

    def _call(self, call: Call):
        if not self._budget.seconds_left:
            raise OverBudget(f'{_name(call.function)} would exceed budget.seconds')
        if not call.arguments or getattr(call.function, 'is_free', False):
            values = [call.function(*arguments) for arguments in call.arguments]
            if error := _complaint(call, values):
                raise error
            return values
        limit = min(self._place.config.call_seconds, self._budget.seconds_left)
        self._blocked, self._values = call, {}
        for index, arguments in enumerate(call.arguments):
            self._place.calls.begin(self, index, call.function, arguments, limit)


def _name(function: Callable) -> str:
    return getattr(function, '__qualname__', type(function).__name__)


def _complaint(call: Call, values: list) -> ValueError | None:
    try:
        for value in values if call.check else ():
            call.check(value)
    except Exception as error:
        return ValueError(f'{_name(call.function)} returns {error}')
    return None


def _options_after(segment: Segment, branch: Branch, changes: Mapping) -> dict[str, Any]:
    """Those of a branch, with what is left of its limits, and others instead."""
    left = segment.left(branch)
    least = max(segment.options.get('min_tokens', 0) - (segment.max_tokens - left), 0)
    return {**segment.options, 'max_tokens': left, 'min_tokens': least, **changes}

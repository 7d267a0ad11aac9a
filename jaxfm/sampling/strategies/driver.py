"""Runs a strategy on many problems at once, in one continuous batch of the sampler.

No problem waits for another: while one waits for a sample or a verifier, the samples of the others
fill the batch. A problem that fails keeps its reason, its requests are cancelled, and the others go
on. The ledger's entries add up to what the sampler's own counters say.
"""

import collections
import time
from collections.abc import Callable, Iterable, Mapping

import jax

from jaxfm.errors import ConfigError
from jaxfm.sampling.strategies import STRATEGIES, StrategyConfig
from jaxfm.sampling.strategies.base import Context, Judge, Outcome, Problem
from jaxfm.sampling.strategies.calls import Calls
from jaxfm.sampling.strategies.job import Job, Place, score_id
from jaxfm.sampling.strategies.ledger import Account, Flops


def run(
    sampler,
    config: StrategyConfig,
    problems: Iterable[Problem],
    params,
    version: int,
    judge: Judge | None = None,
    *,
    flops: Flops | None = None,
    on_record: Callable[[str, Mapping], None] | None = None,
    on_outcome: Callable[[str, Outcome], None] | None = None,
) -> dict[str, Outcome]:
    """Lends weights to the sampler and runs a strategy on every problem -> {problem id: Outcome}.

    Args:
      sampler: without any work.
      config: the strategy's group; its `name` is an entry of STRATEGIES or a path `module:Class`.
      params, version: as in `Sampler.lend`.
      judge: of answers, such as a task.
      flops: for the ledger and for budgets in FLOPs.
      on_record: is called with a problem's id and what its strategy notes, at once.
      on_outcome: is called with a problem's id and its outcome when it ends.

    Raises:
      ConfigError: as `check` does.
      ValueError: two problems have the same id.
    """
    check(config, flops)
    sampler.lend(params, version)
    return _Driver(sampler, config, judge, flops, on_record, on_outcome).run(problems)


def check(config: StrategyConfig, flops: Flops | None = None) -> None:
    """Raises ConfigError if a strategy cannot run here.

    There are several processes, which would not time their calls alike, or the config has a budget
    in FLOPs without a way to count them.
    """
    if jax.process_count() > 1:
        raise ConfigError(
            f'strategy {config.name}: strategies run in one process, but this run has '
            f'{jax.process_count()}: evaluate its checkpoint with --mode eval in one'
        )
    if config.budget.flops and flops is None:
        raise ConfigError(f'strategy {config.name}: budget.flops is set, but nothing counts FLOPs')


class _Driver:
    def __init__(self, sampler, config: StrategyConfig, judge, flops, on_record, on_outcome):
        context = Context(judge, sampler.tokenizer)
        self._strategy = STRATEGIES.load(config.name)(config, context)
        self._place = Place(sampler, Calls(), context, config)
        self._sampler, self._calls = sampler, self._place.calls
        self._config, self._flops = config, flops
        self._on_record, self._on_outcome = on_record, on_outcome
        self._jobs: dict[str, Job] = {}  # by the ids of their requests

    def run(self, problems: Iterable[Problem]) -> dict[str, Outcome]:
        waiting = collections.deque(problems)
        outcomes: dict[str, Outcome | None] = {problem.id: None for problem in waiting}
        if len({*outcomes, *map(score_id, waiting)}) < 2 * len(waiting):
            raise ValueError('two problems have the same id')
        try:
            while waiting or self._jobs:
                self._begin(waiting)
                self._step()
                self._collect()
                self._tell()
                self._end(outcomes)
                if not (self._sampler.has_work or self._calls):
                    for job in self._live:  # or the others would wait for it without end
                        job.fail(RuntimeError('the strategy waits for nothing'))
        finally:  # the sampler is left without our requests, whatever happens
            for job in self._live:
                job.fail(InterruptedError('interrupted'))
        return outcomes

    @property
    def _live(self) -> list[Job]:
        return [job for id, job in self._jobs.items() if id == job.id]

    def _begin(self, waiting) -> None:
        """Begins problems while the batch has room: not all, because each has work on the host."""
        enough = 2 * self._sampler.config.slots
        count = sum(job.num_requests for job in self._live)
        while waiting and count < enough and len(self._live) < enough:
            problem = waiting.popleft()
            account = Account(self._flops, self._config.price)
            job = Job(problem, self._strategy, self._place, account)
            self._jobs |= {job.id: job, job.score_id: job}
            job.begin()
            count += job.num_requests

    def _step(self) -> None:
        """Steps the sampler; the time is shared by what was computed for each problem."""
        if not self._sampler.has_work:
            return
        jobs = self._live
        before = [job.account.entry.computed_tokens for job in jobs]
        start = time.perf_counter()
        events = self._sampler.step()
        seconds = time.perf_counter() - start
        done = [job.account.entry.computed_tokens - old for job, old in zip(jobs, before)]
        for job, count in zip(jobs, done):
            job.account.entry.seconds += seconds * count / max(sum(done), 1)
        # All events first: what a generator begins or extends has nothing to do with these.
        for event in events:
            self._jobs[event.id].take(event)
        for job in jobs:
            if job.outcome is None:
                job.resume()

    def _collect(self) -> None:
        is_idle = not self._sampler.has_work and all(job.outcome is None for job in self._live)
        for job, index, result in self._calls.collect(is_idle=is_idle):
            if job.outcome is None:
                job.called(index, result)

    def _tell(self) -> None:
        """Tells what strategies have noted. Not inside of them: an error here is not theirs."""
        for job in self._live:
            while self._on_record and job.untold:
                self._on_record(job.problem.id, job.untold.pop(0))

    def _end(self, outcomes: dict) -> None:
        for job in self._live:
            if job.outcome is None:
                continue
            del self._jobs[job.id], self._jobs[job.score_id]
            outcomes[job.problem.id] = job.outcome
            if self._on_outcome:
                self._on_outcome(job.problem.id, job.outcome)

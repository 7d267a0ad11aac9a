"""Sampling-based evaluation: completes a task's prompts, scores them, and keeps every sample."""

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Iterator

from jaxfm.environments.episode import Episode, Player
from jaxfm.evals import GenerateConfig, time_limit
from jaxfm.evals.base import Context, Periodic, judged_by, text_of, warn_of_failures
from jaxfm.evals.judge import Judge, Verdict
from jaxfm.evals.prompts import open_task, prompt_ids
from jaxfm.evals.samples import Key, Samples
from jaxfm.evals.solve import Solver
from jaxfm.evals.summary import by_prompt, has_failed, is_unjudged, samples_of, summarize
from jaxfm.sampling.complete import complete_each
from jaxfm.sampling.request import Completion, Request
from jaxfm.tasks.base import has_answers


class Generate(Periodic):
    """avg@n, pass@k, pass^k and maj@k of n samples of each prompt; `docs/evaluation.md` has all.

    A sample that the engine or the judge fails scores 0, and is counted and told.

    Raises:
      DataError: there is no prompt, or the sampler cannot hold one; raised before anything runs.
      ConfigError: no text shows the marks of thoughts; or as `Solver` does.
    """

    def __init__(self, config: GenerateConfig, context: Context):
        super().__init__(config.every, config.at_start)
        self._config, self._context, self._sampler = config, context, context.sampler
        self._task, self._prompts = open_task(config.task, context.documents, context.where)
        self._judge = Judge(self._task, config.thinking, config.call_seconds, context.tokenizer)
        self._solver = None
        if config.strategy is not None:
            self._solver = Solver(config, context, self._task, self._judge)
        self._player = None
        if config.environment is not None:
            limit = functools.partial(time_limit.call, seconds=config.call_seconds)
            where = f'{context.where}.environment'
            self._player = Player(config.environment, context, where, limit)
            self._prompts = {id: self._player.offer(each) for id, each in self._prompts.items()}
        self._requests = [self._request(prompt) for prompt in self._prompts.values()]
        self._lengths = {request.id: len(request.tokens) for request in self._requests}
        checker = self._sampler if self._solver is None else self._solver
        for request in self._requests:
            checker.check(request)

    @property
    def prompt_texts(self) -> list[str]:
        """The texts of the prompts, chats included; see `text_of`."""
        return [text_of(prompt) for prompt in self._prompts.values()]

    def open(self, step: int) -> Samples:
        """The file of the samples at a step."""
        subject = (
            (request.id, list(request.tokens), judged_by(self._prompts[request.id]))
            for request in self._requests
        )
        stop_ids = sorted(self._requests[0].stop_ids)
        return self._context.open_samples(self._config, step, subject, stop_ids=stop_ids)

    def run(self, params, step: int) -> dict[str, float]:
        """Samples and scores -> {metric: value}; {} on a process that has not all samples.

        Samples that the file of an interrupted evaluation has are not sampled again.
        """
        with self.open(step) as samples:
            if self._solver is None:
                self._sample(params, step, samples)
            else:
                describe = functools.partial(self._describe, step)
                prompts = self._prompts
                self._solver.run(params, step, self._requests, prompts, samples, describe)
            records = by_prompt(samples.records, self._prompts, self._config.n)
        if any(len(each) < self._config.n for each in records.values()):
            return {}
        self._warn(step, list(itertools.chain(*records.values())))
        return summarize(
            records,
            self._config.n,
            self._config.cluster_by_group,
            self._context.flops,
            has_answers(self._task),
        )

    def _warn(self, step: int, records: list[dict]) -> None:
        given, samples = (step, self._context.name), samples_of(records)
        if self._solver is not None:
            warn_of_failures(*given, records, has_failed, 'problems failed')
        warn_of_failures(*given, samples, has_failed, 'samples failed')
        warn_of_failures(*given, samples, is_unjudged, 'samples could not be judged')

    def _sample(self, params, step: int, samples: Samples) -> None:
        for sample in self._complete(params, step, self._missing(samples.kept)):
            prompt = self._prompts[sample.id]
            verdict = self._judge.judge(prompt, sample)
            samples.add(self._describe(step, prompt, sample, verdict))

    def _complete(self, params, step: int, requests: Iterator[Request]) -> Iterator[Completion]:
        given, most = (params, step), self._context.most
        if self._player is None:
            return complete_each(self._sampler, requests, *given, stop=self._stops, most=most)
        longest = self._sampler.longest
        return self._player.play_each(self._sampler, requests, self._prompts, *given, longest, most)

    def _stops(self, sample: Completion) -> bool:
        return self._judge.stops(self._prompts[sample.id], self._judge.marked_text(sample))

    def _missing(self, kept: frozenset[Key]) -> Iterator[Request]:
        """The requests for samples that are not kept: the same noise as if none were."""
        for request in self._requests:
            missing = [i for i in range(request.n) if (request.id, i) not in kept]
            for first, count in _ranges(missing):
                yield dataclasses.replace(request, sample_index=first, n=count)

    def _describe(self, step: int, prompt, sample: Completion, verdict: Verdict) -> dict:
        """What is kept of a sample, with its score."""
        return {
            'task': self._config.task.name,
            'step': step,
            'id': prompt.id,
            'group': prompt.group,
            'sample_index': sample.sample_index,
            'seed': self._seed_of(prompt.id),
            'prompt': prompt.text or list(prompt.messages),
            'completion': sample.text,
            'score': verdict.score,
            'answer': verdict.answer,
            'finish_reason': sample.finish_reason or 'judged',
            'is_truncated': sample.finish_reason in ('length', 'turns', 'budget'),
            'is_unclosed': verdict.is_unclosed,
            'error': sample.error or verdict.error,
            'prompt_tokens': self._lengths[prompt.id],
            'num_tokens': len(sample.tokens),
            'logprob': sum(sample.logprobs),
            'tokens': sample.tokens,
            **(sample.record() if isinstance(sample, Episode) else {}),
        }

    def _seed_of(self, id: str) -> int:
        """With one seed for all, questions of one length would share their noise."""
        return (self._context.seed + zlib.crc32(id.encode())) % 2**32

    def _request(self, prompt) -> Request:
        stop_ids = self._sampler.config.stop_ids
        options = self._config.request_options(self._context.chat().stop_ids, stop_ids)
        if self._player is not None:
            options['stop'] = [*options['stop'], *self._player.stop]
        return Request(
            id=prompt.id,
            tokens=prompt_ids(prompt, self._context, self._task),
            seed=self._seed_of(prompt.id),
            **options,
        )


def _ranges(indices: list[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of the runs of consecutive numbers: [0, 1, 4] -> (0, 2), (4, 1)."""
    for _, run in itertools.groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):
        found = [index for _, index in run]
        yield found[0], len(found)

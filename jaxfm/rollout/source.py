"""The source of reinforcement learning: samples the model, rewards the samples, packs them.

`next` is synchronous: the samples of a step are from the weights that the step updates. They depend
on the weights, the seed and the number of the prompt alone, so a run that resumes goes on with the
same batches.
"""

import dataclasses
import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jaxfm.distributed import agree
from jaxfm.errors import ConfigError, DataError, NumericsError
from jaxfm.evals import statistics
from jaxfm.evals.base import Context
from jaxfm.evals.judge import Judge
from jaxfm.evals.samples import Samples
from jaxfm.objectives import PolicyGradientConfig
from jaxfm.objectives.advantages import advantages
from jaxfm.preferences.source import LoadReference
from jaxfm.rollout import RolloutConfig
from jaxfm.rollout.batch import Sample, make_batch, num_rows
from jaxfm.rollout.prompts import Prompts
from jaxfm.sampling.complete import complete
from jaxfm.sampling.request import Completion

log = logging.getLogger('jaxfm')


@dataclasses.dataclass(frozen=True)
class Group:
    """The samples of one prompt.

    rewards: of the task, NaN for a sample that has none; errors: why, or ''.
    """

    number: int  # of the prompt, in their order
    prompt: object
    ids: list[int]
    samples: list[Completion]
    rewards: list[float]
    errors: list[str]

    @property
    def varies(self) -> bool:
        """Whether two samples have different rewards; a penalty for length does not count."""
        return len({reward for reward in self.rewards if not math.isnan(reward)}) > 1


class Rollouts:
    """Batches of samples with their advantages; `jaxfm.train.Source` is its interface.

    Args:
      context: of the run, with a sampler of its own: what others have computed on a shared one
        would change the last bits of samples.
      score: (params, batch) -> log-probs [B, T] of the targets; for recomputed log-probs.
      reference: loads the weights of the reference, for a KL term.
      put: puts a batch on the devices.
      microbatches: into how many the step splits a batch.
      where: the phase's name, for files of samples.

    Raises:
      DataError, ConfigError: the prompts, or the rows for their samples, do not fit.
    """

    bucket = 'generate'

    def __init__(
        self,
        config: RolloutConfig,
        objective: PolicyGradientConfig,
        context: Context,
        *,
        seed: int,
        put: Callable[[dict], dict],
        score: Callable | None = None,
        reference: LoadReference | None = None,
        microbatches: int = 1,
        where: str = '',
    ):
        self._config, self._objective, self._context = config, objective, context
        self._put, self._score, self._load_reference = put, score, reference
        self._reference: dict | None = None  # its weights, once they are needed
        self._origin: dict | None = None  # where they are from
        self._seed, self._microbatches, self._where = seed, microbatches, where
        self._prompts = Prompts(config, context, seed)
        self._judge = Judge(
            self._prompts.task, config.thinking, config.call_seconds, context.tokenizer
        )
        self._check_rows()
        self._check_processes()
        self._has_warned = False
        self._next = 0  # the number of the next prompt
        self.tokens = 0
        self._seen = _Statistics()

    def _check_rows(self) -> None:
        config, longest = self._config, self._prompts.longest + self._config.max_tokens - 1
        length = config.sequence_length if config.packing == 'best_fit' else longest
        wanted = num_rows(longest, config.prompts * config.samples, length)
        if wanted > config.batch_size:
            raise ConfigError(
                f'config.data.batch_size: {config.batch_size} rows of {config.sequence_length} '
                f'tokens may not hold {config.prompts} x {config.samples} samples of up to '
                f'{longest} tokens: set batch_size={wanted}, or lower prompts or samples'
            )

    def _check_processes(self) -> None:
        """Raises DataError unless every process has the same prompts: all sample together."""
        every = agree.exchange(f'prompts/{self._where}', self._prompts.fingerprint)
        for index, theirs in every.items():
            if theirs != every[0]:
                raise DataError(
                    f'config.data.task: processes 0 and {index} have different prompts: copy the '
                    'files again'
                )

    def next(self, params, step: int) -> dict[str, jax.Array]:
        """Samples from these weights, judges, and packs -> the batch of a step.

        Raises:
          NumericsError: the model gives no sample.
          DataError: no sample could be judged.
        """
        began = time.monotonic()
        with jax.transfer_guard('allow'):  # the engine is driven from the host
            sampled, groups = self._collect(params, step)
            _check_any(sampled, step)
            self._warn_of_failed(sampled, step)
            rewards_PG = np.array([self._shaped(group) for group in groups])
            advantages_PG = advantages(rewards_PG, self._objective)
            samples = self._learn_from(groups, advantages_PG)
            batch = make_batch(
                samples,
                self._config.batch_size,
                self._config.sequence_length,
                one_each=self._config.packing == 'none',
                microbatches=self._microbatches,
            )
            self._write(groups, advantages_PG, step)
            batch = self._put(batch)
            if self._objective.old_logprobs == 'recomputed':
                batch['old_logprobs'] = self._score(params, batch)
            if self._objective.kl:
                self.prepare()
                batch['reference_logprobs'] = self._score(self._reference, batch)
        self.tokens = sum(sample.length for sample in samples)
        self._seen.add(sampled, len(groups), time.monotonic() - began)
        self._next += len(sampled)
        return batch

    def prepare(self, params: dict | None = None) -> None:
        """Loads the reference, if the objective needs one and it is not there yet.

        `params` cannot be it: the first step donates them. Raises RunError if it cannot be loaded.
        """
        del params
        if self._objective.kl and self._reference is None:
            self._reference, self._origin = self._load_reference(self._origin)

    def _collect(self, params, step: int) -> tuple[list[Group], list[Group]]:
        """-> all groups that a step samples, and those that it learns from."""
        config, sampled, groups = self._config, [], []
        for _ in range(1 + config.max_refills):
            first, missing = self._next + len(sampled), config.prompts - len(groups)
            found = self._sample(params, step, range(first, first + missing))
            sampled += found
            if config.filter == 'none':
                return sampled, sampled
            groups += [group for group in found if group.varies]
            if len(groups) == config.prompts:
                break
        # If nothing varies, the samples tell why, and have no gradient.
        return sampled, groups or found

    def _sample(self, params, step: int, numbers: range) -> list[Group]:
        asked = [self._prompts.request(number) for number in numbers]
        requests = [request for _, request in asked]
        # The task's `stop` is not asked: when it is depends on the other requests, and so would
        # the tokens behind what it saw.
        done = complete(self._context.sampler, requests, params, step)
        # A judge may be slow on one host, so one process judges for all.
        verdicts = agree.from_primary(
            lambda: [
                [self._judge.reward(prompt, sample) for sample in done[request.id]]
                for prompt, request in asked
            ]
        )
        return [
            Group(
                number,
                prompt,
                list(request.tokens),
                done[request.id],
                [reward for reward, _ in verdict],
                [error for _, error in verdict],
            )
            for number, (prompt, request), verdict in zip(numbers, asked, verdicts)
        ]

    def _shaped(self, group: Group) -> list[float]:
        """The rewards, less the penalty for length."""
        config = self._config
        if not config.overlong_tokens:
            return group.rewards
        begin = config.max_tokens - config.overlong_tokens
        share = config.overlong_penalty / config.overlong_tokens
        return [
            reward - share * max(0, len(sample.tokens) - begin)
            for reward, sample in zip(group.rewards, group.samples)
        ]

    def _warn_of_failed(self, groups: list[Group], step: int) -> None:
        """Tells of the first samples of the phase without a reward; records count them all."""
        errors = [error for group in groups for error in group.errors]
        if any(errors) and not self._has_warned:
            self._has_warned = True
            log.warning(
                'step %d: %d of %d samples have no reward and are left out; the first: %s',
                *(step, sum(map(bool, errors)), len(errors), next(filter(None, errors))),
            )

    def _learn_from(self, groups: list[Group], advantages_PG: np.ndarray) -> list[Sample]:
        """All samples that have a token, with their advantages."""
        masks = self._config.truncated == 'mask'
        return [
            Sample(
                prompt=group.ids,
                completion=sample.tokens,
                logprobs=sample.logprobs,
                advantage=float(advantage),
                is_learned=not (error or (masks and sample.finish_reason == 'length')),
            )
            for group, advantages_G in zip(groups, advantages_PG)
            for sample, advantage, error in zip(group.samples, advantages_G, group.errors)
            if sample.tokens
        ]

    def _write(self, groups: list[Group], advantages_PG: np.ndarray, step: int) -> None:
        every = self._config.write_every
        directory = self._context.samples_directory
        if not every or step % every or directory is None:
            return
        path = Path(directory) / f'{self._where or "rollout"}-{step:06d}.jsonl'
        header = {
            'rollout': self._config.task.model_dump(),
            'weights': self._context.weights(step),
            'seed': self._seed,
        }
        with Samples(path, header) as file:
            for group, advantages_G in zip(groups, advantages_PG.tolist()):
                for index, advantage in enumerate(advantages_G):
                    file.add(_describe(group, index, advantage))

    def progress(self) -> dict[str, float]:
        """What has been sampled since the last call, and the prompts so far."""
        values, self._seen = self._seen.values(), _Statistics()
        epochs = self._next / len(self._prompts)
        return values | {'rollout/prompts': self._next, 'rollout/epochs': epochs}

    @property
    def statistics(self) -> dict[str, int | float | str]:
        """What is asked, for the report."""
        return self._prompts.statistics | {'samples': self._config.samples}

    def get_state(self) -> dict:
        """The number of the next prompt, what the prompts are, and the reference, as JSON."""
        return {'next_prompt': self._next, 'reference': self._origin} | self._identity()

    def set_state(self, state: dict) -> None:
        """Continues from a state. Raises ConfigError if it is a position in other prompts."""
        for key, here in self._identity().items():
            if state.get(key) != here:
                raise ConfigError(
                    f'the prompts changed since the checkpoint: {key} is {here}, was '
                    f'{state.get(key)}; restore them, or start a new run in another --workdir '
                    'from these weights with --config.init_from'
                )
        self._next, self._origin = state['next_prompt'], state['reference']

    def _identity(self) -> dict:
        return {'fingerprint': self._prompts.fingerprint, 'seed': self._seed}

    def close(self) -> None:
        """Frees the reference and the key-value cache; they are made again if `next` goes on."""
        self._reference = None
        self._context.sampler.release()


def _check_any(groups: list[Group], step: int) -> None:
    """Raises if no sample of a step has a reward."""
    errors = [error for group in groups for error in group.errors]
    if not all(errors):
        return
    failed = [s.error for group in groups for s in group.samples if s.finish_reason == 'error']
    if len(failed) == len(errors):
        raise NumericsError(f'no sample of step {step} could be made: {failed[0]}')
    raise DataError(f'no sample of step {step} could be judged; the first: {errors[0]}')


def _describe(group: Group, index: int, advantage: float) -> dict:
    """What is kept of a sample."""
    sample, prompt = group.samples[index], group.prompt
    return {
        'id': prompt.id,
        'sample_index': index,
        'number': group.number,
        'prompt': prompt.text or list(prompt.messages),
        'completion': sample.text,
        'reward': None if group.errors[index] else group.rewards[index],
        'advantage': advantage,
        'finish_reason': sample.finish_reason,
        'error': group.errors[index],
        'num_tokens': len(sample.tokens),
        'versions': sorted(set(sample.versions)),
        'tokens': sample.tokens,
    }


class _Statistics:
    """Sums over steps, for the records."""

    def __init__(self):
        self.seconds = 0.0
        self._counts: Counter[str] = Counter()
        self._rewards: list[float] = []  # the mean of each group
        self._deviations: list[float] = []
        self._lengths: list[int] = []

    def add(self, sampled: list[Group], num_learned: int, seconds: float) -> None:
        """Adds all groups of a step, of which so many are in its batch."""
        counts = self._counts
        self.seconds += seconds
        counts['steps'] += 1
        counts['left_out'] += len(sampled) - num_learned
        for group in sampled:
            good = [reward for reward in group.rewards if not math.isnan(reward)]
            counts['failed'] += len(group.rewards) - len(good)
            counts['flat'] += not group.varies
            counts['groups'] += 1
            if good:
                self._rewards.append(float(np.mean(good)))
                self._deviations.append(float(np.std(good)))
            for sample in group.samples:
                counts['samples'] += 1
                counts['cut'] += sample.finish_reason == 'length'
                self._lengths.append(len(sample.tokens))

    def values(self) -> dict[str, float]:
        counts = self._counts
        if not counts['steps']:
            return {}
        lengths, samples = np.array(self._lengths), counts['samples']
        return {
            **statistics.mean(self._rewards).values('rollout/reward'),
            'rollout/reward_std': float(np.mean(self._deviations)),  # inside a group
            'rollout/flat_groups': counts['flat'] / counts['groups'],
            'rollout/length': float(lengths.mean()),
            'rollout/length_p99': float(np.quantile(lengths, 0.99)),
            'rollout/truncated': counts['cut'] / samples,
            'rollout/failed': counts['failed'] / samples,
            'rollout/filtered': counts['left_out'] / counts['groups'],
            'rollout/groups': (counts['groups'] - counts['left_out']) / counts['steps'],
            'rollout/tokens_per_second': float(lengths.sum()) / max(self.seconds, 1e-9),
            'rollout/staleness': 0.0,
        }

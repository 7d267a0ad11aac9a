"""The source of reinforcement learning: samples the model, rewards the samples, packs them.

With `max_staleness` 0, `next` is synchronous: the samples of a step are from the weights that the
step updates. They depend on the weights, the seed and the number of the prompt alone, so a run that
resumes goes on with the same batches.

Above 0 a thread samples for later steps while the loop trains. The prompts of step k are ordered
when the loop lends the weights of step k - max_staleness, never before, so no token of a batch can
be from older ones.
"""

import functools
import logging
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jaxfm.data.packing.rows import BATCH_DTYPES
from jaxfm.distributed import agree
from jaxfm.environments.episode import Episode, Player
from jaxfm.errors import ConfigError, DataError
from jaxfm.evals import time_limit
from jaxfm.evals.base import Context
from jaxfm.evals.judge import Judge
from jaxfm.evals.samples import Samples
from jaxfm.evals.summary import FAILED
from jaxfm.objectives import DistillationConfig, LoadReference, PolicyGradientConfig
from jaxfm.objectives.advantages import advantages
from jaxfm.rollout import RolloutConfig
from jaxfm.rollout.ahead import Ahead, InStep, InTurn
from jaxfm.rollout.asking import Asked, Asking
from jaxfm.rollout.batch import Sample, make_batch, num_rows
from jaxfm.rollout.groups import CUT, Group, Statistics, check_any, describe
from jaxfm.rollout.prompts import Prompts
from jaxfm.sampling.complete import complete
from jaxfm.sampling.request import Request

log = logging.getLogger('jaxfm')


class Rollouts:
    """Batches of samples with their advantages; `jaxfm.train.Source` is its interface.

    Args:
      context: of the run, with a sampler of its own: what others have computed on a shared one
        would change the last bits of samples.
      score: (params, batch) -> log-probs [B, T] of the targets; for recomputed log-probs.
      reference: loads the weights of the reference, for a KL term.
      put: puts a batch on the devices.
      copy: copies weights for `max_staleness` above 0, as `jaxfm.rollout.ahead.Ahead` wants it.
      microbatches: into how many the step splits a batch.
      where: the phase's name, for files of samples.

    Raises:
      DataError, ConfigError: the prompts, or the rows for their samples, do not fit; or the run has
        several processes and works ahead.
    """

    bucket = 'generate'

    def __init__(
        self,
        config: RolloutConfig,
        objective: PolicyGradientConfig | DistillationConfig,
        context: Context,
        *,
        seed: int,
        put: Callable[[dict], dict],
        copy: Callable[[dict, dict | None], dict] | None = None,
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
        self._player = None
        if config.environment is not None:
            limit = functools.partial(time_limit.call, seconds=config.call_seconds)
            where = 'config.data.environment'
            self._player = Player(config.environment, context, where, limit)
        self._prompts = Prompts(config, context, seed, self._player)
        # Tokens of prompt and sample together.
        self._longest = min(config.sequence_length + 1, context.sampler.longest)
        self._judge = Judge(
            self._prompts.task, config.thinking, config.call_seconds, context.tokenizer
        )
        self._check_rows()
        self._check_processes()
        self._has_warned = False
        self.tokens = 0
        self._seen = Statistics()
        self._spent: Counter[str] = Counter()  # seconds of the engine that were counted
        if config.max_staleness and jax.process_count() > 1:
            raise ConfigError(
                f'config.data.max_staleness is {config.max_staleness}, but this run has '
                f'{jax.process_count()} processes, whose threads would use the devices in '
                'different orders: set it to 0, or use one process'
            )
        self._engine = (
            Ahead(context.sampler, copy, context.mesh)
            if config.max_staleness
            else InStep(context.sampler, complete if self._player is None else self._play)
        )
        self._asking = Asking(config, self._prompts, self._engine, seed)

    def _check_rows(self) -> None:
        config, longest = self._config, self._prompts.longest + self._config.max_tokens - 1
        if self._player is not None:  # the turns may fill a row
            longest = self._longest - 1
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
        name = f'prompts/{self._where}'
        if found := agree.find_difference(name, self._prompts.fingerprint):
            raise DataError(
                f'config.data.task: processes 0 and {found[0]} have different prompts: copy the '
                'files again'
            )

    def in_turn(self, train_step: Callable, evaluators: dict) -> dict:
        """The same programs of the loop, kept apart from the thread's where they must not meet."""
        if self._engine.is_shared:
            turns = self._engine.turns
            train_step = turns.around(train_step)
            evaluators = {name: InTurn(each, turns) for name, each in evaluators.items()}
        return {'train_step': train_step, 'evaluators': evaluators}

    def next(self, params, step: int) -> dict[str, jax.Array]:
        """Samples from these weights, judges, and packs -> the batch of a step.

        Raises:
          NumericsError: the model gives no sample.
          DataError: no sample could be judged.
          RuntimeError: it is ahead of another step, so that the cap might not hold.
        """
        with jax.transfer_guard('allow'):  # the engine is driven from the host
            self._engine.lend(params, step)
            sampled, groups = self._collect(step)
            check_any(sampled, step, self._needs_rewards)
            self._warn_of_failed(sampled, step)
            rewards_PG = np.array([self._shaped(group) for group in groups])
            advantages_PG = self._advantages(rewards_PG)
            samples = self._learn_from(groups, advantages_PG)
            batch = make_batch(
                samples,
                self._config.batch_size,
                self._config.sequence_length,
                one_each=self._config.packing == 'none',
                microbatches=self._microbatches,
            )
            self._write(groups, advantages_PG, step)
            self._engine.claim()
            if not self._needs_rewards:
                batch = {name: batch[name] for name in BATCH_DTYPES}
            batch = self._put(batch)
            batch |= self._scores(params, batch)
        self.tokens = sum(sample.length for sample in samples)
        spent = Counter(self._engine.seconds)
        if self._player is not None:
            spent['environment'] = self._player.seconds
            spent['generate'] -= self._player.seconds
        self._seen.seconds += spent - self._spent
        self._spent = spent
        self._seen.add(step, sampled, len(groups))
        self._asking.end_step(sampled)
        return batch

    def _scores(self, params, batch: dict) -> dict[str, jax.Array]:
        """The log-probs of the batch's targets that the objective needs besides the sampler's."""
        began, found = time.monotonic(), {}
        if self._needs_rewards and self._objective.old_logprobs == 'recomputed':
            found['old_logprobs'] = self._score(params, batch)
        if self._has_reference:
            self.prepare()
            found['reference_logprobs'] = self._score(self._reference, batch)
        jax.block_until_ready(found)
        self._seen.seconds['logprobs'] += time.monotonic() - began
        return found

    def prepare(self, params: dict | None = None) -> None:
        """Loads the reference, if the objective needs one and it is not there yet.

        `params` cannot be it: the first step donates them. Raises RunError if it cannot be loaded.
        """
        del params
        if self._has_reference and self._reference is None:
            self._reference, self._origin = self._load_reference(self._origin)

    @property
    def _needs_rewards(self) -> bool:
        """Whether the objective learns from them; distillation does not."""
        return isinstance(self._objective, PolicyGradientConfig)

    @property
    def _has_reference(self) -> bool:
        return self._needs_rewards and bool(self._objective.kl)

    def _advantages(self, rewards_PG: np.ndarray) -> np.ndarray:
        if self._needs_rewards:
            return advantages(rewards_PG, self._objective)
        return np.zeros(rewards_PG.shape, np.float32)

    def _collect(self, step: int) -> tuple[list[Group], list[Group]]:
        """-> all groups that a step samples, and those that it learns from."""
        config, sampled, groups = self._config, [], []
        for refill in range(1 + config.max_refills):
            asking = self._asking
            asked = asking.more(config.prompts - len(groups)) if refill else asking.first(step)
            found = self._judged(asked)
            sampled += found
            if config.filter == 'none':
                return sampled, sampled
            groups += [group for group in found if group.varies]
            if len(groups) == config.prompts:
                break
        # If nothing varies, the samples tell why, and have no gradient.
        return sampled, groups or found

    def _judged(self, asked: Asked) -> list[Group]:
        done = self._engine.take(asked.order)
        began = time.monotonic()
        # A judge may be slow on one host, so one process judges for all.
        verdicts = agree.from_primary(
            lambda: [
                [self._reward(prompt, sample) for sample in done[request.id]]
                for prompt, request in zip(asked.prompts, asked.requests)
            ]
        )
        self._seen.seconds['judge'] += time.monotonic() - began
        return [
            Group(
                number,
                place,
                prompt,
                request,
                done[request.id],
                [reward for reward, _ in verdict],
                [error for _, error in verdict],
            )
            for number, place, prompt, request, verdict in zip(
                asked.numbers, asked.places, asked.prompts, asked.requests, verdicts
            )
        ]

    def _play(
        self, sampler, requests: list[Request], params, version: int
    ) -> dict[str, list[Episode]]:
        """Samples with the environment; otherwise as `complete`."""
        given = requests, self._asking.prompts, params, version
        return self._player.play(sampler, *given, self._longest)

    def _reward(self, prompt, sample) -> tuple[float, str]:
        """-> the reward of a sample and '', or NaN and why there is none."""
        reward, error = self._judge.reward(prompt, sample)
        return reward + (sample.reward if isinstance(sample, Episode) else 0.0), error

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
                'step %d: %d of %d samples have no reward%s; the first: %s',
                *(step, sum(map(bool, errors)), len(errors)),
                *(' and are left out' if self._needs_rewards else '', next(filter(None, errors))),
            )

    def _learn_from(self, groups: list[Group], advantages_PG: np.ndarray) -> list[Sample]:
        """All samples that have a token, with their advantages."""
        masks = self._config.truncated == 'mask'
        return [
            Sample(
                list(group.request.tokens),
                *sample.trail,
                float(advantage),
                is_learned=not (
                    (error and self._needs_rewards)
                    or sample.finish_reason in FAILED
                    or (masks and sample.finish_reason in CUT)
                ),
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
                    file.add(describe(group, index, advantage))

    def progress(self) -> dict[str, float]:
        """What has been sampled since the last call, and the prompts so far."""
        values, self._seen = self._seen.values(), Statistics()
        return values | self._asking.progress()

    @property
    def statistics(self) -> dict[str, int | float | str]:
        """What is asked, for the report."""
        return self._prompts.statistics | {'samples': self._config.samples}

    def get_state(self) -> dict:
        """The number of the next prompt, what the prompts are, and the reference, as JSON.

        Prompts that were asked ahead, but whose samples no batch has, are asked again.
        """
        return {'reference': self._origin} | self._asking.get_state() | self._identity()

    def set_state(self, state: dict) -> None:
        """Continues from a state. Raises ConfigError if it is a position in other prompts."""
        for key, here in self._identity().items():
            if state.get(key) != here:
                raise ConfigError(
                    f'the prompts changed since the checkpoint: {key} is {here}, was '
                    f'{state.get(key)}; restore them, or start a new run in another --workdir '
                    'from these weights with --config.init_from'
                )
        self.close()
        self._asking.set_state(state)
        self._origin = state['reference']

    def _identity(self) -> dict:
        return {'fingerprint': self._prompts.fingerprint, 'seed': self._seed}

    def close(self) -> None:
        """Ends the thread, and frees the reference and the key-value cache.

        `next` goes on after the last batch that it has delivered.
        """
        self._asking.forget()
        self._reference = None
        self._engine.close()

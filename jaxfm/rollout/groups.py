"""Groups: the judged samples of a prompt, what is kept of each, and statistics of many."""

import dataclasses
import itertools
import math
from collections import Counter

import numpy as np

from jaxfm.environments.episode import Episode
from jaxfm.errors import DataError, NumericsError
from jaxfm.evals import statistics
from jaxfm.sampling.request import Completion, Request

# Where the time of a step goes, besides the update. The engine generates while the loop does
# something else, or waits (idle), if it works ahead; otherwise while the loop waits.
# What ends a sample that is not complete: max_tokens, or max_turns.
CUT = 'length', 'turns'
PARTS = ('generate', 'judge', 'logprobs', 'idle')


@dataclasses.dataclass(frozen=True)
class Group:
    """The samples of one prompt.

    rewards: of the task, NaN for a sample that has none; errors: why, or ''.
    """

    number: int  # of the prompt, in the order in which they are asked
    place: int  # of the prompt, among those of the task
    prompt: object
    request: Request
    samples: list[Completion]
    rewards: list[float]
    errors: list[str]

    @property
    def varies(self) -> bool:
        """Whether two samples have different rewards; a penalty for length does not count."""
        return len({reward for reward in self.rewards if not math.isnan(reward)}) > 1


def check_any(groups: list[Group], step: int, needs_rewards: bool) -> None:
    """Raises if no sample of a step has a reward, or if none could be made."""
    errors = [error for group in groups for error in group.errors]
    if not all(errors):
        return
    failed = [s.error for group in groups for s in group.samples if s.finish_reason == 'error']
    if len(failed) == len(errors):
        raise NumericsError(f'no sample of step {step} could be made: {failed[0]}')
    if needs_rewards:
        raise DataError(f'no sample of step {step} could be judged; the first: {errors[0]}')


def describe(group: Group, index: int, advantage: float) -> dict:
    """What is kept of a sample, as JSON: enough to sample it again (`jaxfm.rollout.replay`)."""
    sample, prompt = group.samples[index], group.prompt
    return {
        'id': prompt.id,
        'sample_index': index,
        'number': group.number,
        'seed': group.request.seed,
        'prompt': prompt.text or list(prompt.messages),
        'completion': sample.text,
        'reward': None if group.errors[index] else group.rewards[index],
        'advantage': advantage,
        'finish_reason': sample.finish_reason,
        'error': group.errors[index],
        'num_tokens': len(sample.tokens),
        'versions': runs_of(sample.versions),
        'prompt_tokens': list(group.request.tokens),
        'tokens': sample.tokens,
        'logprobs': sample.logprobs,
        **(sample.record() if isinstance(sample, Episode) else {}),
    }


def runs_of(versions: list[int]) -> list[list[int]]:
    """The versions of a sample's tokens -> [version, number of tokens] of each run of one."""
    return [[version, len(list(run))] for version, run in itertools.groupby(versions)]


class Statistics:
    """Sums over steps, for the records."""

    def __init__(self):
        self.seconds: Counter[str] = Counter()  # of the parts of a step
        self._counts: Counter[str] = Counter()
        self._rewards: list[float] = []  # the mean of each group
        self._deviations: list[float] = []
        self._lengths: list[int] = []
        self._turns: list[int] = []  # of samples with an environment
        self._lags: Counter[int] = Counter()  # {steps behind: tokens}

    def add(self, step: int, sampled: list[Group], num_learned: int) -> None:
        """Adds all groups that a step has sampled, of which so many are in its batch."""
        counts = self._counts
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
                counts['cut'] += sample.finish_reason in CUT
                if isinstance(sample, Episode):
                    self._turns.append(len(sample.turns))
                self._lengths.append(len(sample.tokens))
                for version, count in runs_of(sample.versions):
                    self._lags[step - version] += count

    def _of_environment(self) -> dict[str, float]:
        if not self._turns:
            return {}
        return {
            'rollout/turns': float(np.mean(self._turns)),
            'rollout/environment_seconds': self.seconds['environment'],
        }

    def values(self) -> dict[str, float]:
        counts = self._counts
        if not counts['steps']:
            return {}
        lengths, samples, rewards = np.array(self._lengths), counts['samples'], {}
        if self._rewards:
            rewards = statistics.mean(self._rewards).values('rollout/reward')
            rewards['rollout/reward_std'] = float(np.mean(self._deviations))  # inside a group
        return {
            **rewards,
            'rollout/flat_groups': counts['flat'] / counts['groups'],
            'rollout/length': float(lengths.mean()),
            'rollout/length_p99': float(np.quantile(lengths, 0.99)),
            'rollout/truncated': counts['cut'] / samples,
            **self._of_environment(),
            'rollout/failed': counts['failed'] / samples,
            'rollout/filtered': counts['left_out'] / counts['groups'],
            'rollout/groups': (counts['groups'] - counts['left_out']) / counts['steps'],
            'rollout/tokens_per_second': float(lengths.sum()) / max(self.seconds['generate'], 1e-9),
            'rollout/staleness': sum(lag * count for lag, count in self._lags.items())
            / max(self._lags.total(), 1),
            'rollout/staleness_max': max(self._lags, default=0),
            **{f'rollout/{part}_seconds': self.seconds[part] for part in PARTS},
        }

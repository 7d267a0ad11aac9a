"""What is asked of the sampler, and what it answers."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue, in token ids.

    The sample of a request depends on (seed, sample_index) and the weights, not on its company.
    """

    id: str
    tokens: Sequence[int]
    max_tokens: int
    temperature: float = 1.0
    seed: int = 0
    sample_index: int = 0
    stop_ids: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Event:
    """New tokens of a request. A stop token is reported as the last one."""

    id: str
    tokens: list[int]
    logprobs: list[float]  # under the full softmax at temperature 1: what the trainer computes
    sampling_logprobs: list[float]  # under the distribution that was sampled from
    finish_reason: str | None  # 'stop', 'length', or None while the request goes on

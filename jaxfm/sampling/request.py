"""Requests to the sampler, and the events that it answers with."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue, in token ids.

    The completion depends on the request and the weights, not on other requests in the batch.
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
    """New tokens of a request. If a stop token ended it, that token is the last one."""

    id: str
    tokens: list[int]
    logprobs: list[float]  # under the full softmax at temperature 1: what the trainer computes
    sampling_logprobs: list[float]  # under the distribution that was sampled from
    finish_reason: str | None  # 'stop', 'length', or None while the request is running

"""Requests to the sampler, their checks, and the events that it answers with."""

import dataclasses
import math
import numbers
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import numpy as np

from jaxfm.errors import DataError
from jaxfm.sampling import (
    MAX_FLOAT32,
    MAX_INT32,
    MAX_SAMPLES,
    MAX_STOP_LENGTH,
    MAX_STOPS,
    MIN_FLOAT32,
)

MAX_STOP_IDS = 64
MAX_TOP_LOGPROBS = 20


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue, in token ids, and how to sample.

    The completion depends on the request and the weights, not on other requests in the batch.
    """

    id: str
    tokens: Sequence[int]
    max_tokens: int  # 0 only scores the prompt, which needs prompt_logprobs
    temperature: float = 1.0  # 0 is greedy
    seed: int = 0
    sample_index: int = 0  # of the first of n samples, which differ in their noise
    stop_ids: frozenset[int] = frozenset()
    stop: Sequence[str] = ()  # strings; the text ends right before the first one that is complete
    n: int = 1
    min_tokens: int = 0  # no stop id or stop string ends a completion with fewer tokens
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0  # relative to the likeliest token
    repetition_penalty: float = 1.0  # of tokens in prompt and completion
    presence_penalty: float = 0.0  # of tokens in the completion
    frequency_penalty: float = 0.0  # for each time that a token occurs in the completion
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)  # -inf forbids an id
    allowed_ids: Collection[int] | None = None  # None allows all
    top_logprobs: int = 0  # of so many likeliest tokens at each position
    prompt_logprobs: bool = False  # told once, by the first of n samples
    # Only of tokens at this position and later; what is before them may be shared with others.
    prompt_logprobs_from: int = 0


@dataclasses.dataclass(frozen=True)
class Event:
    """New tokens of a sample. If a stop token ended it, that token is the last one."""

    id: str
    tokens: list[int]
    logprobs: list[float]  # under the full softmax at temperature 1: what the trainer computes
    sampling_logprobs: list[float]  # under the distribution that was sampled from
    finish_reason: str | None = None  # 'stop', 'length', 'error', or None while it is running
    sample_index: int = 0
    # For each token the likeliest ids with their log-probs, as `logprobs`; empty unless asked for.
    top_logprobs: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    # Once, if asked for: of the tokens from `prompt_logprobs_from` on. Nothing predicts token 0.
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    text: str = ''  # what these tokens add; '' without a tokenizer
    versions: list[int] = dataclasses.field(default_factory=list)  # of each token's weights
    stop: int | str | None = None  # the id or string that ended it
    error: str | None = None  # the reason of 'error'


@dataclasses.dataclass
class Completion:
    """What all events of a sample have told so far."""

    id: str
    sample_index: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    sampling_logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    text: str = ''
    versions: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    stop: int | str | None = None
    error: str | None = None

    def add(self, event: Event) -> None:
        """Appends what an event tells."""
        names = 'tokens', 'logprobs', 'sampling_logprobs', 'top_logprobs', 'text', 'versions'
        for name in names:
            setattr(self, name, getattr(self, name) + getattr(event, name))
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs
            self.prompt_top_logprobs = event.prompt_top_logprobs
        self.finish_reason, self.stop, self.error = event.finish_reason, event.stop, event.error

    @property
    def parts(self) -> list['Completion']:
        """What is judged, in order; only the last one is the answer. Here it is all of it."""
        return [self]

    @property
    def trail(self) -> tuple[list[int], list[float | None]]:
        """All ids that follow the prompt, with their log-probs; None if others wrote an id."""
        return self.tokens, self.logprobs


class Meter(Protocol):
    """Is told what the engine computes for a sample, as it counts it in its own counters.

    The calls for all samples that the engine served add up to its `Counters`: also those for
    cancelled samples, and for prompts computed again.
    """

    def prefill(self, start: int, length: int) -> None:
        """So many tokens of a prompt were computed, the first at position `start`."""

    def share(self, length: int) -> None:
        """The first `length` tokens of a prompt were found in pages of others."""

    def decode(self, start: int, length: int) -> None:
        """So many tokens were given out; the model read the one at `start` for the first."""


_UINT32 = 2**32 - 1
_INTEGERS = {
    'n': (1, MAX_SAMPLES),
    'max_tokens': (0, MAX_INT32),
    'min_tokens': (0, MAX_INT32),
    'top_k': (0, MAX_INT32),
    'top_logprobs': (0, MAX_TOP_LOGPROBS),
    'prompt_logprobs_from': (0, MAX_INT32),
    'seed': (0, _UINT32),
    'sample_index': (0, _UINT32),
}
_NUMBERS = {
    'temperature': (lambda x: 0 <= x <= MAX_FLOAT32, 'of at least 0'),
    'top_p': (lambda x: 0 < x <= 1, 'above 0 and at most 1'),
    'min_p': (lambda x: 0 <= x <= 1, 'from 0 to 1'),
    'repetition_penalty': (lambda x: MIN_FLOAT32 <= x <= MAX_FLOAT32, 'above 0 in float32'),
    'presence_penalty': (lambda x: -2 <= x <= 2, 'from -2 to 2'),
    'frequency_penalty': (lambda x: -2 <= x <= 2, 'from -2 to 2'),
}


def check_request(request: Request, vocab_size: int, has_tokenizer: bool = True) -> None:
    """Raises DataError, naming the option and what would be right, unless a request makes sense.

    Whether it fits the engine's lengths is the engine's own check.
    """
    try:
        _require(isinstance(request.id, str), 'id', request.id, 'a string')
        _check_prompt(request.tokens, vocab_size)
        _check_ranges(request)
        _check_scores(request)
        _check_ids(request, vocab_size)
        _check_stops(request.stop, has_tokenizer)
        _check_choice(request, vocab_size)
    except _Invalid as error:
        raise DataError(f'request {request.id}: {error}') from None


class _Invalid(Exception):
    """What is wrong, without the request's name."""


def _require(is_right: bool, name: str, value, wanted: str) -> None:
    if not is_right:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + '...'
        raise _Invalid(f'{name} is {shown}, but must be {wanted}')


def _is_integer(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _check_prompt(tokens, vocab_size: int) -> None:
    is_sequence = isinstance(tokens, (Sequence, np.ndarray)) and not isinstance(
        tokens, (str, bytes)
    )
    _require(is_sequence, 'tokens', tokens, 'a sequence of token ids')
    if len(tokens) == 0:
        raise _Invalid('the prompt is empty')
    if isinstance(tokens, np.ndarray):
        is_right = tokens.ndim == 1 and tokens.dtype.kind in 'iu'
    else:
        is_right = all(map(_is_integer, tokens))
    _require(is_right, 'tokens', tokens, 'a sequence of token ids')
    least, most = min(tokens), max(tokens)
    if least < 0 or most >= vocab_size:
        raise _Invalid(
            f'token ids range from {least} to {most}, but the vocabulary has {vocab_size} ids'
        )


def _check_ranges(request: Request) -> None:
    for name, (least, most) in _INTEGERS.items():
        value = getattr(request, name)
        is_right = _is_integer(value) and least <= value <= most
        _require(is_right, name, value, f'an integer from {least} to {most}')
    for name, (is_inside, wanted) in _NUMBERS.items():
        value = getattr(request, name)
        _require(_is_number(value) and is_inside(value), name, value, f'a finite number {wanted}')
    most = request.max_tokens
    _require(
        request.min_tokens <= most, 'min_tokens', request.min_tokens, f'at most max_tokens {most}'
    )
    if request.sample_index + request.n - 1 > _UINT32:
        raise _Invalid(
            f'sample_index {request.sample_index} + n {request.n} - 1 exceeds {_UINT32}, the last '
            'sample index'
        )


def _check_scores(request: Request) -> None:
    asks = request.prompt_logprobs
    _require(isinstance(asks, bool), 'prompt_logprobs', asks, 'True or False')
    first, last = request.prompt_logprobs_from, len(request.tokens) - 1 if asks else 0
    wanted = f'at most {last}, ' + ('the last position' if asks else 'without prompt_logprobs')
    _require(first <= last, 'prompt_logprobs_from', first, wanted)
    if request.max_tokens == 0:
        _require(asks, 'max_tokens', 0, 'at least 1 without prompt_logprobs')
        _require(
            request.n == 1, 'n', request.n, '1 with max_tokens 0, which only scores the prompt'
        )


def _check_ids(request: Request, vocab_size: int) -> None:
    def check(name, ids):
        is_right = isinstance(ids, Collection) and not isinstance(ids, (str, bytes))
        _require(is_right, name, ids, 'a collection of token ids')
        for i in ids:
            is_right = _is_integer(i) and 0 <= i < vocab_size
            _require(is_right, f'an id of {name}', i, f'an integer from 0 to {vocab_size - 1}')

    check('stop_ids', request.stop_ids)
    count = len(request.stop_ids)
    _require(count <= MAX_STOP_IDS, 'the number of stop_ids', count, f'at most {MAX_STOP_IDS}')
    if request.allowed_ids is not None:
        check('allowed_ids', request.allowed_ids)
        wanted = 'None, which allows all ids, or name at least one'
        _require(len(request.allowed_ids) > 0, 'allowed_ids', request.allowed_ids, wanted)
    bias = request.logit_bias
    _require(isinstance(bias, Mapping), 'logit_bias', bias, '{token id: number}')
    check('logit_bias', bias)
    for i, value in bias.items():
        is_right = _is_number(value) and (value == -math.inf or abs(value) <= MAX_FLOAT32)
        wanted = 'a finite number, or -inf to forbid the id'
        _require(is_right, f'logit_bias of id {i}', value, wanted)


def _check_stops(strings, has_tokenizer: bool) -> None:
    is_right = isinstance(strings, Sequence) and not isinstance(strings, (str, bytes))
    is_right = is_right and all(isinstance(string, str) for string in strings)
    _require(is_right, 'stop', strings, "a sequence of strings, such as ('END',)")
    count = len(strings)
    _require(count <= MAX_STOPS, 'the number of stop strings', count, f'at most {MAX_STOPS}')
    for string in strings:
        wanted = f'of 1 to {MAX_STOP_LENGTH} characters'
        _require(1 <= len(string) <= MAX_STOP_LENGTH, 'a stop string', string, wanted)
    if strings and not has_tokenizer:
        raise _Invalid('stop strings need a tokenizer, which this sampler has not: use stop_ids')


def _check_choice(request: Request, vocab_size: int) -> None:
    """Raises _Invalid unless an id is left to sample, before min_tokens too."""
    forbidden = {i for i, value in request.logit_bias.items() if value == -math.inf}
    if request.allowed_ids is None and vocab_size > len(forbidden) + len(request.stop_ids):
        return
    allowed = range(vocab_size) if request.allowed_ids is None else request.allowed_ids
    left = set(allowed) - forbidden
    if not left:
        raise _Invalid('allowed_ids and a logit_bias of -inf leave no id to sample')
    if request.min_tokens and left <= set(request.stop_ids):
        raise _Invalid(
            f'min_tokens is {request.min_tokens}, but must be 0, because every allowed id is a '
            'stop id'
        )

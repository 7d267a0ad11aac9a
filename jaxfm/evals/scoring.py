"""The log-probs of given tokens after others, through the sampling engine."""

import dataclasses
from collections.abc import Iterator, Sequence

from jaxfm.evals.base import Context
from jaxfm.evals.prompts import read_logprob
from jaxfm.sampling.complete import complete_each
from jaxfm.sampling.request import Completion, Request

_MANY = 200  # requests, from which on compiling for them takes less time than it saves

Key = tuple[tuple[int, ...], int]


@dataclasses.dataclass(frozen=True)
class Scored:
    """What the engine says about a continuation."""

    logprob: float  # the sum over its tokens, in nats
    is_greedy: bool  # greedy decoding gives it
    error: str = ''


def score_request(id: str, before: Sequence[int], continuation: Sequence[int]) -> Request:
    """The request for the log-probs of a continuation. Both must have a token."""
    return Request(
        id=id,
        tokens=[*before, *continuation],
        max_tokens=0,
        prompt_logprobs=True,
        prompt_logprobs_from=len(before),
        top_logprobs=1,
    )


def key(request: Request) -> Key:
    """What determines the scores of a request.

    Sorted by it, requests with a common prefix follow one another and share its keys and values.
    """
    return tuple(request.tokens), request.prompt_logprobs_from


def score_each(
    requests: Sequence[Request], context: Context, params, step: int
) -> Iterator[tuple[Key, Scored]]:
    """Scores requests with different keys, in this order; yields each when it has ended."""
    named = (dataclasses.replace(request, id=str(i)) for i, request in enumerate(requests))
    if len(requests) > _MANY:
        context.sampler.expect_many_prompts()
    for sample in complete_each(context.sampler, named, params, step, most=context.most):
        request = requests[int(sample.id)]
        yield key(request), _read(request, sample)


def _read(request: Request, sample: Completion) -> Scored:
    """The scores of the tokens from `prompt_logprobs_from` on."""
    logprob, error = read_logprob(sample)
    tokens = request.tokens[request.prompt_logprobs_from :]
    top = [pairs[0][0] for pairs in sample.prompt_top_logprobs]
    return Scored(logprob, top == list(tokens), error)

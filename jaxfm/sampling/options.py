"""The options of requests as host arrays, which `sample_tokens` takes.

A request here is one sample: its noise comes from `sample_index`, whatever `n` is.
"""

import enum
from collections.abc import Mapping
from operator import attrgetter

import numpy as np

from jaxfm.sampling.request import MAX_STOP_IDS, Request

# name: (value of a row without a request, which asks for nothing; value of a request's row).
_COLUMNS = {
    'temperature': (np.float32(0), attrgetter('temperature')),
    'top_k': (np.int32(0), attrgetter('top_k')),
    'top_p': (np.float32(1), attrgetter('top_p')),
    'min_p': (np.float32(0), attrgetter('min_p')),
    'repetition': (np.float32(1), attrgetter('repetition_penalty')),
    'presence': (np.float32(0), attrgetter('presence_penalty')),
    'frequency': (np.float32(0), attrgetter('frequency_penalty')),
    'first_end': (np.int32(0), lambda request: len(request.tokens) + request.min_tokens),
    'prompt_length': (np.int32(0), lambda request: len(request.tokens)),
    'num_top': (np.int32(0), attrgetter('top_logprobs')),
}


def rows(requests: Mapping[int, Request], num_rows: int) -> dict[str, np.ndarray]:
    """The options of a batch, from the requests in its rows; the others ask for nothing.

    Returns:
      [num_rows] each of temperature, top_k, top_p, min_p, repetition, presence, frequency,
      first_end (the first position that a stop id may have), prompt_length and num_top;
      seeds [num_rows, 2] (seed, sample index) and stop_ids [num_rows, MAX_STOP_IDS], -1 where
      there is none.
    """
    options = {name: np.full(num_rows, neutral) for name, (neutral, _) in _COLUMNS.items()}
    for name, (_, read) in _COLUMNS.items():
        options[name][list(requests)] = [read(request) for request in requests.values()]
    options['seeds'] = np.zeros((num_rows, 2), np.uint32)
    options['stop_ids'] = np.full((num_rows, MAX_STOP_IDS), -1, np.int32)
    for row, request in requests.items():
        options['seeds'][row] = request.seed, request.sample_index
        options['stop_ids'][row, : len(request.stop_ids)] = list(request.stop_ids)
    return options


class Extras(enum.IntEnum):
    """What `sample_tokens` needs beside the options; each includes those before it."""

    NOTHING = 0
    HISTORY = 1
    BIAS = 2  # [B, V]: much to make and to send, so only where a request asks for it


def extras(request: Request) -> Extras:
    """What a request needs."""
    if request.logit_bias or request.allowed_ids is not None:
        return Extras.BIAS
    penalties = request.presence_penalty, request.frequency_penalty
    has_penalty = request.repetition_penalty != 1 or any(penalties)
    return Extras.HISTORY if has_penalty else Extras.NOTHING


def bias_row(request: Request, padded_vocab: int) -> np.ndarray:
    """[V] float32 to add to the logits: logit_bias, and -inf for ids that are not allowed."""
    if request.allowed_ids is None:
        bias_V = np.zeros(padded_vocab, np.float32)
    else:
        bias_V = np.full(padded_vocab, -np.inf, np.float32)
        bias_V[list(request.allowed_ids)] = 0
    for i, value in request.logit_bias.items():
        bias_V[i] += value
    return bias_V

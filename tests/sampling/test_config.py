"""Options of sampling in a config: their ranges are those of requests, which get all of them."""

import dataclasses
import math

import pytest

from jaxfm.config.validation import validate
from jaxfm.errors import DataError
from jaxfm.sampling import SamplingConfig, SamplingOptions
from jaxfm.sampling.request import Request, check_request

VOCAB = 50
LARGEST = 3.4028234663852886e38  # of a float32
NUMBERS = [-1e39, -3, -2.0, -1, -0.5, 0, 0.5, 1, 1.5, 2, 2.5, 49, LARGEST, 1e39, math.nan, math.inf]
COUNTS = [-1, 0, 1, 7, 128, 129, 2**31 - 1, 2**31, 1.5, True, 'x', None]
VALUES = {
    'max_tokens': COUNTS,
    'n': COUNTS,
    'top_k': COUNTS,
    'min_tokens': COUNTS,
    'temperature': NUMBERS,
    'top_p': NUMBERS,
    'min_p': NUMBERS,
    'repetition_penalty': NUMBERS,
    'presence_penalty': NUMBERS,
    'frequency_penalty': NUMBERS,
    'logit_bias': [{}, {3: 1.5}, {3: LARGEST}, {3: -LARGEST}, {-1: 0.0}, {3: 1e39}, {3: math.nan}],
    'allowed_ids': [None, [], [0], [49, 3], [-1], 'x'],
    'stop': [[], ['x'], [''], ['x' * 1000], ['x' * 1001], ['x'] * 64, ['x'] * 65, 'x', [3]],
}


def test_every_option_is_compared():
    assert VALUES.keys() == SamplingOptions.model_fields.keys() - {'ignore_eos'}


@pytest.mark.parametrize('name', VALUES)
def test_a_config_takes_what_a_request_takes(name):
    verdicts = set()
    for value in VALUES[name]:
        problems = validate(SamplingOptions, {name: value})[1]
        request = dataclasses.replace(Request('r', [1], max_tokens=128), **{name: value})
        try:
            check_request(request, VOCAB)
            is_taken = True
        except DataError:
            is_taken = False
        assert is_taken == (not problems), (value, problems)
        verdicts.add(is_taken)
    assert verdicts == {True, False}


def test_an_infinite_bias_is_for_requests_alone():
    """JSON has no infinity, and a config is JSON."""
    [problem] = validate(SamplingOptions, {'logit_bias': {3: -math.inf}})[1]
    assert problem.sentence == 'must be a finite number, got -inf'


def test_a_request_gets_every_option():
    given = {
        'max_tokens': 9,
        'temperature': 0.5,
        'n': 2,
        'top_k': 3,
        'top_p': 0.5,
        'min_p': 0.1,
        'repetition_penalty': 1.5,
        'presence_penalty': 0.25,
        'frequency_penalty': -0.25,
        'logit_bias': {5: -2.0},
        'allowed_ids': [5, 6],
        'stop': ['END'],
        'min_tokens': 3,
    }
    assert given.keys() == VALUES.keys()
    options = SamplingConfig(**given).request_options({1, 2}, [7])
    assert options == given | {'stop_ids': {1, 2, 7}}
    check_request(Request('r', [1], **options), VOCAB)


def test_ignored_ends_stop_nothing_but_other_ids_still_do():
    options = SamplingConfig(ignore_eos=True).request_options({1, 2}, [7, 2])
    assert options['stop_ids'] == {7}


def test_a_completion_cannot_be_longer_than_its_end():
    [problem] = validate(SamplingOptions, {'min_tokens': 9, 'max_tokens': 8})[1]
    assert problem.sentence == 'min_tokens 9 is more than max_tokens 8'

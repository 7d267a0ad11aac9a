"""Host arrays of the options: one row for each request, and rows that ask for nothing."""

import numpy as np
import pytest

from jaxfm.sampling.options import Extras, bias_row, extras, rows
from jaxfm.sampling.request import MAX_STOP_IDS, Request

DTYPES = {
    **dict.fromkeys(['temperature', 'top_p', 'min_p'], np.float32),
    **dict.fromkeys(['repetition', 'presence', 'frequency'], np.float32),
    **dict.fromkeys(['top_k', 'stop_ids', 'first_end', 'prompt_length', 'num_top'], np.int32),
    'seeds': np.uint32,
}


def make_request(**options) -> Request:
    return Request(**{'id': 'r', 'tokens': [3, 4, 5], 'max_tokens': 8, **options})


def test_a_row_has_the_options_of_its_request():
    request = make_request(
        temperature=0.5,
        top_k=7,
        top_p=0.25,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-1.0,
        frequency_penalty=0.75,
        seed=2**32 - 1,
        sample_index=9,
        stop_ids=frozenset({11}),
        min_tokens=2,
        top_logprobs=4,
    )
    options = rows({1: request}, num_rows=3)
    second = {name: x[1].tolist() for name, x in options.items()}
    assert second.pop('stop_ids') == [11] + [-1] * (MAX_STOP_IDS - 1)
    assert second == dict(
        temperature=0.5,
        top_k=7,
        top_p=0.25,
        min_p=0.125,
        repetition=1.5,
        presence=-1.0,
        frequency=0.75,
        first_end=5,
        prompt_length=3,
        num_top=4,
        seeds=[2**32 - 1, 9],
    )
    assert options['first_end'].tolist() == [0, 5, 0]


def test_a_row_without_a_request_asks_for_nothing():
    options = rows({0: make_request(top_k=4, stop_ids={1, 2})}, num_rows=3)
    assert {name: x.dtype.type for name, x in options.items()} == DTYPES
    assert all(len(x) == 3 for x in options.values())
    for row in (1, 2):
        ones = {name for name, x in options.items() if (x[row] == 1).all()}
        assert ones == {'top_p', 'repetition'}
        assert (options['stop_ids'][row] == -1).all()
        assert not any(options[name][row].any() for name in DTYPES.keys() - ones - {'stop_ids'})


@pytest.mark.parametrize(
    ('changes', 'needed'),
    [
        ({}, Extras.NOTHING),
        (dict(temperature=0.5, top_k=3, top_p=0.5, min_p=0.5), Extras.NOTHING),
        (dict(repetition_penalty=1.1), Extras.HISTORY),
        (dict(presence_penalty=0.1), Extras.HISTORY),
        (dict(frequency_penalty=-0.1), Extras.HISTORY),
        (dict(logit_bias={3: 1.0}), Extras.BIAS),
        (dict(allowed_ids=frozenset({3})), Extras.BIAS),
        (dict(allowed_ids=frozenset({3}), presence_penalty=0.1), Extras.BIAS),
    ],
    ids=str,
)
def test_only_some_options_need_the_history_or_a_bias(changes, needed):
    assert extras(make_request(**changes)) is needed


def test_a_bias_row_has_the_bias_of_allowed_ids():
    request = make_request(logit_bias={1: 2.5, 2: 1.0, 4: -np.inf}, allowed_ids=[1, 3, 4])
    inf = np.inf
    assert bias_row(request, 6).tolist() == [-inf, 2.5, -inf, 0.0, -inf, -inf]
    assert bias_row(make_request(logit_bias={1: 2.5}), 3).tolist() == [0.0, 2.5, 0.0]
    assert bias_row(make_request(), 3).dtype == np.float32

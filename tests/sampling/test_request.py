"""Bad requests are refused with the option, its value, and what would be right."""

import dataclasses
import inspect

import numpy as np
import pytest

from jaxfm.errors import DataError
from jaxfm.sampling.request import Event, Request, check_request

VOCAB = 50


def make_request(**options) -> Request:
    return Request(**{'id': 'r1', 'tokens': [1, 2], 'max_tokens': 8, **options})


NAN, INF = float('nan'), float('inf')
BAD = [
    (dict(tokens=[]), 'the prompt is empty'),
    (dict(tokens=[1, 50]), 'token ids range from 1 to 50, but the vocabulary has 50 ids'),
    (dict(tokens=[-1, 2]), 'token ids range from -1 to 2, but the vocabulary has 50 ids'),
    (dict(tokens=[2**70]), f'token ids range from {2**70} to {2**70}'),
    (dict(tokens='hello'), "tokens is 'hello', but must be a sequence of token ids"),
    (dict(tokens=None), 'tokens is None, but must be a sequence of token ids'),
    (dict(tokens=[1.0, 2.0]), 'tokens is [1.0, 2.0], but must be a sequence of token ids'),
    (dict(tokens=[True, 2]), 'tokens is [True, 2], but must be a sequence of token ids'),
    (dict(tokens=[[1, 2]]), 'tokens is [[1, 2]], but must be a sequence of token ids'),
    (dict(tokens=np.ones(2)), 'tokens is array([1., 1.]), but must be a sequence of token ids'),
    (dict(n=0), 'n is 0, but must be an integer from 1 to 16384'),
    (dict(n=True), 'n is True, but must be an integer'),
    (dict(max_tokens=-1), 'max_tokens is -1, but must be an integer from 0 to'),
    (dict(max_tokens=1.5), 'max_tokens is 1.5, but must be an integer from 0 to'),
    (dict(min_tokens=-1), 'min_tokens is -1, but must be an integer from 0 to'),
    (dict(min_tokens=9), 'min_tokens is 9, but must be at most max_tokens 8'),
    (dict(temperature=NAN), 'temperature is nan, but must be a finite number of at least 0'),
    (dict(temperature=INF), 'temperature is inf, but must be a finite number of at least 0'),
    (dict(temperature=-0.1), 'temperature is -0.1, but must be a finite number of at least 0'),
    (dict(temperature=1e39), 'temperature is 1e+39, but must be a finite number of at least 0'),
    (dict(temperature='1'), "temperature is '1', but must be a finite number of at least 0"),
    (dict(temperature=False), 'temperature is False, but must be a finite number of at least 0'),
    (dict(top_k=-1), 'top_k is -1, but must be an integer from 0 to'),
    (dict(top_p=0), 'top_p is 0, but must be a finite number above 0 and at most 1'),
    (dict(top_p=1.5), 'top_p is 1.5, but must be a finite number above 0 and at most 1'),
    (dict(top_p=NAN), 'top_p is nan, but must be a finite number above 0 and at most 1'),
    (dict(min_p=-0.5), 'min_p is -0.5, but must be a finite number from 0 to 1'),
    (dict(min_p=1.01), 'min_p is 1.01, but must be a finite number from 0 to 1'),
    (dict(repetition_penalty=0.0), 'repetition_penalty is 0.0, but must be a finite number above'),
    (dict(repetition_penalty=INF), 'repetition_penalty is inf, but must be a finite number above'),
    (dict(presence_penalty=2.1), 'presence_penalty is 2.1, but must be a finite number from -2'),
    (dict(frequency_penalty=-3), 'frequency_penalty is -3, but must be a finite number from -2'),
    (dict(frequency_penalty=NAN), 'frequency_penalty is nan, but must be a finite number from -2'),
    (dict(seed=-1), 'seed is -1, but must be an integer from 0 to 4294967295'),
    (dict(seed=2**32), 'seed is 4294967296, but must be an integer from 0 to 4294967295'),
    (dict(sample_index=-1), 'sample_index is -1, but must be an integer from 0 to 4294967295'),
    (dict(sample_index=2**32 - 2, n=3), 'sample_index 4294967294 + n 3 - 1 exceeds 4294967295'),
    (
        dict(stop_ids=range(65), tokens=[1]),
        'an id of stop_ids is 50, but must be an integer from 0 to 49',
    ),
    (dict(stop_ids={-1}), 'an id of stop_ids is -1, but must be an integer from 0 to 49'),
    (dict(stop_ids={1.0}), 'an id of stop_ids is 1.0, but must be an integer from 0 to 49'),
    (dict(stop_ids=3), 'stop_ids is 3, but must be a collection of token ids'),
    (dict(stop_ids='3'), "stop_ids is '3', but must be a collection of token ids"),
    (dict(stop_ids=[1] * 65), 'the number of stop_ids is 65, but must be at most 64'),
    (dict(stop='END'), "stop is 'END', but must be a sequence of strings, such as ('END',)"),
    (dict(stop=[b'END']), "stop is [b'END'], but must be a sequence of strings"),
    (dict(stop=None), 'stop is None, but must be a sequence of strings'),
    (dict(stop=['a'] * 1000), 'the number of stop strings is 1000, but must be at most 64'),
    (dict(stop=['a', '']), "a stop string is '', but must be of 1 to 1000 characters"),
    (dict(stop=['a' * 1001]), 'aaa..., but must be of 1 to 1000 characters'),
    (dict(logit_bias={50: 1.0}), 'an id of logit_bias is 50, but must be an integer from 0 to 49'),
    (dict(logit_bias={'1': 1.0}), "an id of logit_bias is '1', but must be an integer from 0"),
    (dict(logit_bias={1: NAN}), 'logit_bias of id 1 is nan, but must be a finite number, or -inf'),
    (dict(logit_bias={1: INF}), 'logit_bias of id 1 is inf, but must be a finite number, or -inf'),
    (dict(logit_bias={1: -1e39}), 'logit_bias of id 1 is -1e+39, but must be a finite number'),
    (dict(logit_bias={1: '2'}), "logit_bias of id 1 is '2', but must be a finite number, or -inf"),
    (dict(logit_bias=[1]), 'logit_bias is [1], but must be {token id: number}'),
    (dict(allowed_ids=[]), 'allowed_ids is [], but must be None, which allows all ids, or name'),
    (dict(allowed_ids={50}), 'an id of allowed_ids is 50, but must be an integer from 0 to 49'),
    (dict(allowed_ids='abc'), "allowed_ids is 'abc', but must be a collection of token ids"),
    (
        dict(allowed_ids={3}, logit_bias={3: -INF}),
        'allowed_ids and a logit_bias of -inf leave no id to sample',
    ),
    (
        dict(logit_bias=dict.fromkeys(range(VOCAB), -INF)),
        'allowed_ids and a logit_bias of -inf leave no id to sample',
    ),
    (
        dict(allowed_ids={3, 4, 5}, stop_ids={3, 4}, logit_bias={5: -INF}, min_tokens=1),
        'min_tokens is 1, but must be 0, because every allowed id is a stop id',
    ),
    (
        dict(stop_ids=set(range(VOCAB)), min_tokens=3),
        'min_tokens is 3, but must be 0, because every allowed id is a stop id',
    ),
    (dict(top_logprobs=21), 'top_logprobs is 21, but must be an integer from 0 to 20'),
    (dict(top_logprobs=-1), 'top_logprobs is -1, but must be an integer from 0 to 20'),
    (dict(prompt_logprobs=1), 'prompt_logprobs is 1, but must be True or False'),
    (
        dict(prompt_logprobs=True, prompt_logprobs_from=3, tokens=[1, 2, 3]),
        'prompt_logprobs_from is 3, but must be at most 2, the last position',
    ),
    (
        dict(prompt_logprobs_from=1),
        'prompt_logprobs_from is 1, but must be at most 0, without prompt_logprobs',
    ),
    (dict(max_tokens=0), 'max_tokens is 0, but must be at least 1 without prompt_logprobs'),
    (
        dict(n=2, max_tokens=0, prompt_logprobs=True),
        'n is 2, but must be 1 with max_tokens 0, which only scores the prompt',
    ),
]


@pytest.mark.parametrize(('options', 'message'), BAD, ids=[next(iter(x)) for x, _ in BAD])
def test_a_bad_option_is_named_with_its_value_and_what_is_right(options, message):
    with pytest.raises(DataError) as raised:
        check_request(make_request(**options), VOCAB)
    assert str(raised.value).startswith('request r1: ')
    assert message in str(raised.value)
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize('id', [None, 7, ['a']], ids=str)
def test_an_id_is_a_string(id):
    with pytest.raises(DataError, match='id is .*, but must be a string'):
        check_request(make_request(id=id), VOCAB)


def test_every_option_is_checked():
    checked = {name for options, _ in BAD for name in options}
    assert checked == {field.name for field in dataclasses.fields(Request)} - {'id'}


GOOD = [
    {},
    dict(tokens=np.array([0, 49])),
    dict(tokens=(np.int32(3),)),
    dict(tokens=range(3)),
    dict(temperature=0, top_p=1, min_p=1, top_k=10**6, repetition_penalty=np.float32(0.1)),
    dict(presence_penalty=-2, frequency_penalty=2, min_tokens=8),
    dict(seed=2**32 - 1, sample_index=2**32 - 2, n=2),
    dict(stop_ids=set(range(64)) & set(range(VOCAB))),
    dict(stop=['a' * 1000] * 64, top_logprobs=20, prompt_logprobs=True),
    dict(tokens=[1, 2, 3], max_tokens=0, prompt_logprobs=True, prompt_logprobs_from=2),
    dict(logit_bias={0: -INF, 49: 100}, allowed_ids=[0, 1]),
    dict(allowed_ids={3}, stop_ids={3}),
]


@pytest.mark.parametrize('options', GOOD, ids=lambda options: ' '.join(options))
def test_options_at_their_limits_are_accepted(options):
    check_request(make_request(**options), VOCAB)


def test_stop_strings_need_a_tokenizer():
    check_request(make_request(), VOCAB, has_tokenizer=False)
    with pytest.raises(DataError, match='stop strings need a tokenizer.*use stop_ids'):
        check_request(make_request(stop=['a']), VOCAB, has_tokenizer=False)


def test_a_request_needs_only_a_prompt_and_a_length():
    required = [
        name
        for name, parameter in inspect.signature(Request).parameters.items()
        if parameter.default is inspect.Parameter.empty and name != 'logit_bias'
    ]
    assert required == ['id', 'tokens', 'max_tokens']
    event = Event('r1', [1], [-0.5], [-0.25])
    assert (event.finish_reason, event.text, event.top_logprobs) == (None, '', [])

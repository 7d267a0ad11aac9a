"""Long chains: 20 turns with a tool between them, of 8k tokens in the slow test, resumed."""

import json

import jax
import numpy as np
import pytest

from jaxfm.sampling.strategies.base import Problem
from tests.sampling.conftest import new_sampler
from tests.sampling.strategies.conftest import Letters, Runner, config_of
from tests.sampling.strategies.test_strategies import HERE as TOOLS

TURNS, SAMPLED, PAGE = 20, 12, 16
# Letters that the tool says: of a chain of 1.1k tokens, and of one of 8k.
WORDS = [40, pytest.param(410, marks=pytest.mark.slow)]


@pytest.fixture(scope='module', params=WORDS)
def words(request):
    return request.param


@pytest.fixture(scope='module')
def long(words, params, one_device):
    """A sampler that just holds the chain."""
    length = TURNS * (SAMPLED + words + 4)
    options = dict(slots=1, max_length=length, prefill_tokens=256, decode_steps=12)
    with jax.set_mesh(one_device):
        yield Runner(new_sampler(params, one_device, Letters(), page_size=PAGE, **options))


def chain(record=()):
    return Problem('chain', [5, 6, 7], {'max_tokens': SAMPLED, 'seed': 3}, record=record)


def refinement(words, turns=TURNS):
    tool = {'name': f'{TOOLS}:Tool', 'words': words}
    return config_of('refinement', max_turns=turns, before='xy', after='z', checker=tool)


def test_a_chain_of_twenty_turns_goes_on_from_its_middle(long, words):
    whole = long.one(refinement(words), [chain()])
    length = 3 + TURNS * SAMPLED + (TURNS - 1) * (words + 3)
    told = sum(len(note['tokens']) + len(note['appended']) for note in whole.record)
    assert len(whole.samples) == TURNS and told == length - 3
    # A turn computes what is new and what is behind the last whole page, not the whole chain.
    assert length - TURNS <= whole.entry.prefill_tokens + SAMPLED * TURNS < length + PAGE * TURNS
    assert whole.entry.shared_tokens > length * TURNS / 3
    stored = json.loads(json.dumps(whole.record[:9]))
    rest = long.one(refinement(words), [chain(stored)])
    assert [note['tokens'] for note in rest.record] == [note['tokens'] for note in whole.record]
    assert [note['feedback'] for note in rest.record] == [note['feedback'] for note in whole.record]
    assert rest.entry.decoded_tokens == (TURNS - 9) * SAMPLED
    for ours, theirs in zip(rest.samples, whole.samples):
        assert (ours.text, ours.finish_reason) == (theirs.text, theirs.finish_reason)
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=0, atol=1e-4)


def test_a_chain_that_has_ended_samples_nothing_more(long, words):
    whole = long.one(refinement(words, 2), [chain()])
    again = long.one(refinement(words, 2), [chain(whole.record)])
    assert again.entry.decoded_tokens == 0
    assert [turn.tokens for turn in again.samples] == [turn.tokens for turn in whole.samples]
    assert (again.chosen, again.answer) == (whole.chosen, whole.answer)

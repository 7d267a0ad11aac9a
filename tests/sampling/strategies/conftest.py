"""Samplers with text, and strategies run on small problems."""

import dataclasses
import string

import jax
import pytest

from jaxfm.sampling.strategies import STRATEGIES, driver
from jaxfm.sampling.strategies.base import Problem
from jaxfm.sampling.strategies.ledger import total
from tests.sampling.conftest import new_sampler, pages_in_use

PROMPT = [3, 1, 4, 1, 5, 9, 2]
TIGHT = 12  # pages: two requests of 20 tokens in four slots


class Letters:
    """A tokenizer whose ids are letters and digits, and one special token."""

    alphabet = string.ascii_letters + '0123456'
    special_tokens = {'</think>': 59}
    invalid_byte_id = None

    def encode(self, text):
        return [self.alphabet.index(letter) for letter in text]

    def encode_parts(self, parts):
        pieces = [part.split('</think>') for part in parts]
        return [
            [i for n, text in enumerate(texts) for i in [59] * (n > 0) + self.encode(text)]
            for texts in pieces
        ]

    def decode(self, ids):
        return ''.join(self.alphabet[i] for i in ids if i != 59)


def config_of(name, **values):
    """The group of a strategy, as a config gives it."""
    return STRATEGIES.find(name).schema(name=name, **values)


def problems(count=1, **options):
    """Problems with a prompt of eight tokens each."""
    return [
        Problem(f'p{i}', [i, *PROMPT], {'max_tokens': 12, 'seed': i, **options}, prompt=f'q{i}')
        for i in range(count)
    ]


class Runner:
    """Runs strategies on one sampler, and compares every ledger with the sampler's counters."""

    def __init__(self, sampler):
        self.sampler = sampler

    def __call__(self, config, tasks, judge=None, **options):
        before = dataclasses.astuple(self.sampler.counters)[:3]
        outcomes = driver.run(
            self.sampler, config, tasks, self.sampler._params, 0, judge, **options
        )
        after = dataclasses.astuple(self.sampler.counters)[:3]
        found = total(outcome.entry for outcome in outcomes.values())
        counted = found.prefill_tokens, found.shared_tokens, found.decoded_tokens
        assert counted == tuple(new - old for new, old in zip(after, before))
        assert not self.sampler.has_work and not pages_in_use(self.sampler)
        return outcomes

    def one(self, config, *arguments, **options):
        """The outcome of the only problem."""
        [outcome] = self(config, *arguments, **options).values()
        assert outcome.error is None, outcome.error
        return outcome


@pytest.fixture(scope='session')
def _texts(params, one_device):
    return new_sampler(params, one_device, Letters())


@pytest.fixture
def run(_texts, params, one_device):
    """A Runner on four slots, pages of four tokens, at most 40 tokens, without known prefixes."""
    with jax.set_mesh(one_device):
        _texts.lend(params, -1)
        _texts.lend(params, 0)
        yield Runner(_texts)


@pytest.fixture(scope='session')
def _tight(params, one_device):
    return new_sampler(params, one_device, Letters(), pages=TIGHT)


@pytest.fixture
def run_tight(_tight, one_device):
    """The same with few pages, so that samples give way and are computed again."""
    with jax.set_mesh(one_device):
        yield Runner(_tight)

"""Batches of samples and of documents in turn: which steps have which, and going on with both."""

import pytest

from jaxfm.errors import ConfigError
from jaxfm.rollout import RolloutMixtureConfig
from jaxfm.rollout.alternation import Alternation


class Counted:
    """A source of numbers."""

    def __init__(self, bucket, name):
        self.bucket, self.name, self.number, self.is_closed = bucket, name, 0, False
        self.tokens, self.statistics = len(name), {'task': 'sums'}

    def next(self, params, step):
        self.number += 1
        return f'{self.name}{self.number}'

    def progress(self):
        return {f'{self.name}/number': self.number}

    def get_state(self):
        return {'number': self.number}

    def set_state(self, state):
        self.number = state['number']

    def close(self):
        self.is_closed = True


def make(share=0.3, seed=0):
    sources = Counted('generate', 'samples'), Counted('data_wait', 'text')
    return Alternation(*sources, {'train_tokens': 9}, share, seed), *sources


def take(source, count):
    return [source.next(None, step) for step in range(count)]


@pytest.mark.parametrize('share', [0.1, 0.5, 0.9])
def test_the_share_of_steps_with_samples_is_as_asked(share):
    batches = take(make(share)[0], 1000)
    assert sum(each.startswith('samples') for each in batches) == pytest.approx(
        1000 * share, abs=50
    )
    for name in ('samples', 'text'):  # neither leaves a batch out
        numbers = [int(each.removeprefix(name)) for each in batches if each.startswith(name)]
        assert numbers == list(range(1, len(numbers) + 1))


def test_the_order_depends_on_the_seed_alone():
    assert take(make(0.5)[0], 40) == take(make(0.5)[0], 40) != take(make(0.5, seed=1)[0], 40)


def test_it_goes_on_where_it_was():
    whole, part, again = (make()[0] for _ in range(3))
    batches = take(whole, 30)
    take(part, 17)
    again.set_state(part.get_state())
    assert take(again, 13) == batches[17:]


def test_time_and_tokens_are_those_of_the_batch():
    source, samples, text = make(0.5)
    for _ in range(20):
        bucket = source.bucket
        batch = source.next(None, 0)
        wanted = samples if batch.startswith('samples') else text
        assert (bucket, source.tokens) == (wanted.bucket, wanted.tokens)


def test_records_and_tables_have_both():
    source, samples, text = make()
    take(source, 8)
    progress = {'samples/number': samples.number, 'text/number': text.number}
    assert source.progress() == progress and sum(progress.values()) == 8
    assert source.statistics == {'task': 'sums', 'off_policy/train_tokens': 9}
    source.close()
    assert samples.is_closed and text.is_closed


def test_the_position_of_another_kind_of_data_is_refused():
    with pytest.raises(ConfigError, match='it was not a rollout_mixture'):
        make()[0].set_state({'next_prompt': 4, 'reference': None})


def test_samples_are_not_made_ahead():
    """They would be for the next step, which may have documents."""
    problems = RolloutMixtureConfig.find_conflicts({'max_staleness': 1})
    assert any('has documents in between' in problem.sentence for problem in problems)

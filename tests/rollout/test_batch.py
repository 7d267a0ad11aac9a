"""Samples in the rows of a batch."""

import random

import numpy as np

from jaxfm.rollout.batch import DTYPES, Sample, make_batch, num_rows


def sample(prompt, completion, advantage=1.0, **more):
    logprobs = [-0.25 * (1 + i) for i in range(len(completion))]
    return Sample(list(prompt), list(completion), logprobs, advantage, **more)


def test_a_sample_is_learned_from_its_first_sampled_token_on():
    batch = make_batch([sample([5, 6, 7], [8, 9], 0.5)], 1, 6)
    assert {name: array[0].tolist() for name, array in batch.items()} == {
        'tokens': [5, 6, 7, 8, 0, 0],
        'targets': [6, 7, 8, 9, 0, 0],
        'positions': [0, 1, 2, 3, 0, 0],
        'segment_ids': [1, 1, 1, 1, 0, 0],
        'loss_mask': [0, 0, 1, 1, 0, 0],
        'advantages': [0, 0, 0.5, 0.5, 0, 0],
        'lengths': [0, 0, 2, 2, 0, 0],
        'sampler_logprobs': [0, 0, -0.25, -0.5, 0, 0],
    }
    assert {name: array.dtype for name, array in batch.items()} == DTYPES


def test_samples_share_a_row_and_none_is_lost():
    random_ = random.Random(0)
    samples = [
        sample(range(random_.randint(1, 9)), range(random_.randint(1, 12)), advantage=i)
        for i in range(50)
    ]
    batch = make_batch(samples, 50, 20)
    found = set()
    for row in range(50):
        ids = batch['segment_ids'][row]
        for segment in range(1, ids.max() + 1):
            inside = ids == segment
            learned = inside & (batch['loss_mask'][row] == 1)
            (number,) = set(batch['advantages'][row][learned].tolist())
            one = samples[int(number)]
            assert batch['tokens'][row][inside].tolist() == [*one.prompt, *one.completion][:-1]
            assert batch['targets'][row][learned].tolist() == one.completion
            assert batch['sampler_logprobs'][row][learned].tolist() == one.logprobs
            assert set(batch['lengths'][row][learned]) == {len(one.completion)}
            found.add(int(number))
    assert found == set(range(50))
    assert (batch['segment_ids'].max(axis=1) > 0).sum() < 40  # packed


def test_a_sample_that_counts_for_nothing_is_there_without_a_mask():
    samples = [sample([1], [2, 3], is_learned=False), sample([1], [2, 3])]
    batch = make_batch(samples, 2, 4, one_each=True)
    assert batch['loss_mask'].sum(axis=1).tolist() == [0, 2]
    assert batch['segment_ids'].tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]


def test_filled_rows_are_those_of_the_first_microbatches():
    """Row r is of microbatch r % 4: the last two have nothing."""
    batch = make_batch([sample([1], [2, 3, 4, 5]) for _ in range(4)], 8, 4, microbatches=4)
    filled = np.flatnonzero(batch['loss_mask'].any(axis=1))
    assert sorted(filled % 4) == [0, 0, 1, 1]


def test_the_rows_that_are_asked_for_always_suffice():
    random_ = random.Random(1)
    for _ in range(200):
        longest, count = random_.randint(1, 12), random_.randint(1, 30)
        length = random_.randint(longest, 40)
        samples = [sample([1], range(random_.randint(1, longest))) for _ in range(count)]
        make_batch(samples, num_rows(longest, count, length), length)

import time

import grain
import numpy as np
import pytest

from jaxfm.data.order import FEW_ROWS, shuffle

SIZES = [1, 2, 5, 86, FEW_ROWS - 1, FEW_ROWS, 5000]


@pytest.mark.parametrize('size', SIZES)
def test_every_epoch_has_all_rows_and_another_order(size):
    order = shuffle(range(size), seed=7)
    epochs = [[order[n] for n in range(e * size, (e + 1) * size)] for e in range(3)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert size < 5 or len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize('size', [86, 5000])
def test_any_position_is_reached_directly(size):
    straight = shuffle(range(size), seed=7)
    straight = [straight[n] for n in range(3 * size)]
    places = np.random.default_rng(0).permutation(3 * size)[:200].tolist()
    jumping = shuffle(range(size), seed=7)
    assert [jumping[n] for n in places] == [straight[n] for n in places]


@pytest.mark.parametrize('size', [86, 5000])
@pytest.mark.parametrize('other', [8, -1, 2**32 - 1, 2**63])
def test_the_seed_decides_the_order_and_may_be_any_integer(size, other):
    orders = [shuffle(range(size), seed) for seed in (7, 7, other)]
    same, again, different = ([order[n] for n in range(size)] for order in orders)
    assert same == again != different


def test_many_rows_have_the_order_of_grain():
    expected = grain.MapDataset.range(5000).seed(7).shuffle().repeat()
    order = shuffle(range(5000), seed=7)
    assert [order[n] for n in range(4000, 6000)] == [expected[n] for n in range(4000, 6000)]


def test_the_order_of_few_rows_is_pinned():
    order = shuffle(range(10), seed=7)
    assert [order[n] for n in range(10)] == [7, 6, 5, 2, 1, 8, 9, 0, 4, 3]


@pytest.mark.parametrize('size', [86, 5000])
def test_rows_that_begin_elsewhere_have_the_same_order(size):
    order, later = shuffle(range(size), seed=7), shuffle(range(30, 30 + size), seed=7)
    assert [later[n] - 30 for n in range(2 * size)] == [order[n] for n in range(2 * size)]


def test_few_rows_are_at_any_position_equally_often():
    order = shuffle(range(8), seed=7)
    places = np.array([order[n] for n in range(8 * 2000)]).reshape(2000, 8)
    counts = np.stack([np.bincount(column, minlength=8) for column in places.T])
    assert np.abs(counts - 250).max() < 75  # five standard deviations
    pairs = np.bincount(places[:-1, 0] * 8 + places[1:, 0], minlength=64)
    assert np.abs(pairs - 2000 / 64).max() < 30


def test_a_row_takes_microseconds_even_if_there_are_few():
    for size in (1, 5, 100, 1000, 10**9):
        order = shuffle(range(size), seed=0)
        began = time.process_time()
        for n in range(2000):
            order[n]
        assert (time.process_time() - began) / 2000 < 2e-4

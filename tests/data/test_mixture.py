import numpy as np
import pytest

from jaxfm.data.mixture import Mixture

WEIGHTS = [
    {'a': 1.0},
    {'a': 0.7, 'b': 0.3},
    {'a': 1e-4, 'b': 1.0},
    {'a': 0.0001, 'b': 0.0002, 'c': 0.9997},
    {'a': 0.25, 'b': 0.25, 'c': 0.25, 'd': 0.25},
    {'a': 3, 'b': 1e-3, 'c': 17.25, 'd': 0.1},
]


@pytest.mark.parametrize('weights', WEIGHTS)
def test_after_any_number_of_rows_every_source_has_had_its_share(weights):
    mixture = Mixture(weights)
    shares = np.array([*weights.values()]) / sum(weights.values())
    for rows in [*range(2000), 10**6 + 1, 10**9 + 7]:
        counts = mixture.counts(rows)
        assert sum(counts) == rows
        assert (np.abs(counts - shares * rows) <= 1 + 1e-6).all()


@pytest.mark.parametrize('number, bound', [(2, 0.5), (3, 1), (5, 1.5), (10, 1.5), (30, 1.5)])
def test_the_error_of_a_share_hardly_grows_with_the_sources(number, bound):
    draw = np.random.default_rng(number)
    for _ in range(10):
        weights = np.round(10 ** draw.uniform(0, 4, number))
        mixture = Mixture(dict(zip(map(str, range(number)), weights)))
        rows = np.arange(1500)
        counts = np.array([mixture.counts(int(row)) for row in rows])
        assert np.abs(counts - rows[:, None] * weights / weights.sum()).max() <= bound


@pytest.mark.parametrize('weights', WEIGHTS)
def test_the_rows_of_a_source_are_consecutive(weights):
    mixture = Mixture(weights)
    seen = dict.fromkeys(range(len(weights)), 0)
    for row in range(3000):
        source, number = mixture.locate(row)
        assert number == seen[source]
        seen[source] += 1
    assert [*seen.values()] == mixture.counts(3000)


def test_shares_are_exact_after_very_many_rows():
    # Proportions in hundredths of the smallest would be 233 and 100: 70 million rows off.
    assert Mixture({'a': 0.7, 'b': 0.3}).counts(10**12) == [7 * 10**11, 3 * 10**11]
    assert Mixture({'a': 1e-9, 'b': 1 - 1e-9}).counts(10**12)[0] == 1000


def test_only_the_ratio_of_weights_counts():
    one, other = Mixture({'a': 0.1, 'b': 0.3}), Mixture({'a': 5, 'b': 15})
    assert [one.locate(row) for row in range(500)] == [other.locate(row) for row in range(500)]

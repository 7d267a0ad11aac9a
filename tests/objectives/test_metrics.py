"""Metrics that are no means: what they are of, and that parts give the same as the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm.objectives.metrics import Largest, Quantiles

VALUES = np.float32(np.exp(np.random.default_rng(0).normal(-4, 1.5, (16, 50))))
MASK = np.float32(np.random.default_rng(1).random(VALUES.shape) < 0.7)
BIN = 10 ** (1 / 8)  # the upper edge of a bin, over the lower one


def read(metric):
    return {name: float(value) for name, value in metric.read().items()}


def in_parts(kind, count):
    parts = [
        kind.of(values, mask)
        for values, mask in zip(np.split(VALUES, count), np.split(MASK, count), strict=True)
    ]
    total = jax.tree.map(jnp.zeros_like, parts[0])  # microbatches are added to zeros
    for part in parts:
        total = total.merge(part)
    return read(total)


@pytest.mark.parametrize('kind', [Largest, Quantiles])
def test_parts_give_what_the_whole_gives(kind):
    whole = read(kind.of(VALUES, MASK))
    assert in_parts(kind, 4) == whole


def test_the_largest_value_is_exact():
    assert read(Largest.of(VALUES, MASK)) == {'max': VALUES[MASK > 0].max()}


def test_quantiles_are_the_upper_edges_of_their_bins():
    found = read(Quantiles.of(VALUES, MASK))
    kept = np.sort(VALUES[MASK > 0])
    for name, share in {'p50': 0.5, 'p99': 0.99, 'p999': 0.999}.items():
        value = kept[int(np.ceil(share * len(kept))) - 1]
        assert value <= found[name] <= value * BIN * 1.00001, name
    assert found.keys() == {'p50', 'p99', 'p999'}


@pytest.mark.parametrize('kind', [Largest, Quantiles])
def test_what_the_mask_leaves_out_counts_nowhere(kind):
    other = np.where(MASK > 0, VALUES, np.float32(1e9))
    assert read(kind.of(other, MASK)) == read(kind.of(VALUES, MASK))
    nowhere = np.where(MASK > 0, VALUES, np.float32(np.nan))
    assert read(kind.of(nowhere, MASK)) == read(kind.of(VALUES, MASK))


@pytest.mark.parametrize('kind', [Largest, Quantiles])
def test_no_values_are_zero(kind):
    assert set(read(kind.of(VALUES, 0 * MASK)).values()) == {0.0}


def test_zeros_are_zero_and_values_above_the_last_edge_infinite():
    values = np.float32([0.0] * 600 + [3e-8] * 390 + [1e3] * 10)
    assert read(Quantiles.of(values, np.ones(1000))) == {
        'p50': 0.0,
        'p99': pytest.approx(1e-7),
        'p999': np.inf,
    }


@pytest.mark.parametrize('share', [0.5, 0.99, 0.999])
def test_a_quantile_is_not_above_a_value_with_that_share(share):
    """A count that rounding changes must not move the quantile to the next bin."""
    small = round(1000 * share)
    values = np.float32([0.0] * small + [1.0] * (1000 - small))
    name = {0.5: 'p50', 0.99: 'p99', 0.999: 'p999'}[share]
    assert read(Quantiles.of(values, np.ones(1000)))[name] == 0

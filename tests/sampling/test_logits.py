"""Sampling one token from logits: greedy, with temperature, and with per-request noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm.sampling.logits import sample_tokens

LOGITS = np.log([0.1, 0.4, 0.2, 0.3]).astype(np.float32)
sample = jax.jit(sample_tokens)


def rows(count, temperature, seed=0, position=0):
    """`count` draws from LOGITS, each with its own sample index."""
    return (
        np.tile(LOGITS, (count, 1)),
        np.full(count, temperature, np.float32),
        np.stack([np.full(count, seed), np.arange(count)], axis=1).astype(np.uint32),
        np.full(count, position, np.int32),
    )


def test_temperature_zero_takes_the_most_likely_token():
    tokens, logprobs, sampling_logprobs = sample(*rows(4, 0.0))
    assert tokens.tolist() == [1] * 4
    np.testing.assert_allclose(logprobs, np.log(0.4), rtol=1e-6)
    assert not sampling_logprobs.any()


@pytest.mark.parametrize('temperature', [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_at_the_temperature(temperature):
    count = 4000
    tokens, logprobs, sampling_logprobs = sample(*rows(count, temperature))
    scaled = np.exp(LOGITS / temperature) / np.exp(LOGITS / temperature).sum()
    observed = np.bincount(tokens, minlength=4)
    chi_square = np.sum((observed - count * scaled) ** 2 / (count * scaled))
    assert chi_square < 16.3  # 99.9 % of three degrees of freedom; the seed is fixed
    np.testing.assert_allclose(logprobs, LOGITS[tokens], rtol=1e-5)
    np.testing.assert_allclose(sampling_logprobs, np.log(scaled)[tokens], rtol=1e-5)


@pytest.mark.parametrize('changes', [dict(seed=1), dict(position=1)], ids=str)
def test_noise_depends_only_on_seed_sample_index_and_position(changes):
    tokens, *_ = sample(*rows(200, 1.0))
    again, *_ = sample(*(x[::-1].copy() for x in rows(200, 1.0)))
    np.testing.assert_array_equal(again[::-1], tokens)
    other, *_ = sample(*rows(200, 1.0, **changes))
    same = np.mean(np.asarray(other) == np.asarray(tokens))
    assert 0.15 < same < 0.45  # independent draws agree in sum p^2 = 0.3 of all cases


def test_a_token_without_probability_is_never_drawn():
    logits, *rest = rows(1000, 50.0)
    logits[:, 2] = -np.inf
    tokens, logprobs, sampling_logprobs = sample(logits, *rest)
    assert set(tokens.tolist()) == {0, 1, 3}
    assert np.isfinite(logprobs).all() and np.isfinite(sampling_logprobs).all()


@pytest.mark.parametrize('temperature', [1e-6, 2e-38])
def test_a_temperature_near_zero_is_greedy(temperature):
    logits, *rest = rows(8, temperature)
    logits[:, 0] = 90.0
    logits[:, 3] = 100.0
    tokens, logprobs, sampling_logprobs = sample(logits, *rest)
    assert tokens.tolist() == [3] * 8
    np.testing.assert_allclose(logprobs, -np.log1p(np.exp(-10.0)), rtol=1e-3)
    np.testing.assert_allclose(sampling_logprobs, 0.0, atol=1e-6)


def test_greedy_and_sampled_rows_mix_in_a_batch():
    logits, temperature, seeds, positions = rows(400, 1.0)
    temperature[::2] = 0
    tokens, *_ = sample(logits, temperature, seeds, positions)
    assert set(tokens[::2].tolist()) == {1}
    assert set(tokens[1::2].tolist()) == {0, 1, 2, 3}


def test_all_ids_of_a_wide_vocabulary_are_drawn():
    size = 64
    logits = jnp.zeros((2000, size))
    _, temperature, seeds, positions = rows(2000, 1.0)
    tokens, *_ = sample(logits, temperature, seeds, positions)
    assert (np.bincount(tokens, minlength=size) > 0).all()

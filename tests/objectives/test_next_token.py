"""Sums and weights of the next-token objective against float64 references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfm.objectives import OBJECTIVES, NextTokenConfig
from jaxfm.objectives.next_token import NextToken
from jaxfm.ops.logprobs import Unembedding

B, T, D, V = 3, 6, 8, 20


class Model:
    """A model with fixed hidden states and an output projection."""

    def __init__(self, hidden, weight):
        self.hidden, self.weight = hidden, weight

    def __call__(self, tokens, positions, segment_ids):
        assert tokens.shape == positions.shape == segment_ids.shape
        return self.hidden, {}

    def unembed(self):
        return Unembedding(self.weight, V)


@pytest.fixture
def model():
    random = np.random.default_rng(0)
    return Model(
        jnp.asarray(random.normal(size=(B, T, D)), jnp.float32),
        jnp.asarray(random.normal(size=(V + 4, D)), jnp.float32),
    )


@pytest.fixture
def batch():
    random = np.random.default_rng(1)
    ids = np.ones((B, T), np.int32)
    return {
        'tokens': ids,
        'positions': ids,
        'segment_ids': ids,
        'targets': random.integers(0, V, (B, T)).astype(np.int32),
        'loss_mask': (random.random((B, T)) < 0.6).astype(np.float32),
    }


def reference(model, batch):
    """-> sum of -log p(target), sum of squared log-partitions, over the mask."""
    logits = np.asarray(model.hidden, np.float64) @ np.asarray(model.weight, np.float64)[:V].T
    partition = np.log(np.exp(logits).sum(-1))
    chosen = np.take_along_axis(logits, batch['targets'][..., None], axis=-1)[..., 0]
    mask = batch['loss_mask']
    return np.sum((partition - chosen) * mask), np.sum(partition**2 * mask)


def test_terms_are_sums_over_the_mask(model, batch):
    objective = NextToken(NextTokenConfig(z_loss=1e-3))
    sums, metrics, increments = objective(model, batch, None)
    loss, z_loss = reference(model, batch)
    np.testing.assert_allclose(sums['next_token'], loss, rtol=1e-6)
    np.testing.assert_allclose(sums['z_loss'], z_loss, rtol=1e-6)
    assert objective.coefficients == {'next_token': 1.0, 'z_loss': 1e-3}
    assert metrics == increments == {}


def test_z_loss_is_absent_when_it_is_off(model, batch):
    objective = NextToken(NextTokenConfig())
    assert set(objective(model, batch, None)[0]) == {'next_token'}
    assert set(objective.weights(batch)) == set(objective.coefficients) == {'next_token'}


def test_weights_are_the_targets_that_count_and_need_no_model(batch):
    weights = NextToken(NextTokenConfig(z_loss=0.1)).weights(batch)
    assert weights == {name: batch['loss_mask'].sum() for name in ('next_token', 'z_loss')}
    emptied = dict(batch, loss_mask=np.zeros((B, T), np.float32))
    assert NextToken(NextTokenConfig()).weights(emptied) == {'next_token': 0}


def test_sums_and_weights_add_up_over_a_batch_that_is_split(model, batch):
    objective = NextToken(NextTokenConfig(z_loss=0.1))
    whole, _, _ = objective(model, batch, None)
    parts = []
    for row in range(B):
        rows = slice(row, row + 1)
        part = {name: value[rows] for name, value in batch.items()}
        sums, _, _ = objective(Model(model.hidden[rows], model.weight), part, None)
        parts.append((sums, objective.weights(part)))
    for name in whole:
        np.testing.assert_allclose(sum(sums[name] for sums, _ in parts), whole[name], rtol=1e-6)
        weights = [float(weights[name]) for _, weights in parts]
        assert sum(weights) == objective.weights(batch)[name]
        assert len(set(weights)) > 1  # a mean of means would differ


def test_a_batch_without_targets_is_zero_with_finite_gradients(model, batch):
    emptied = dict(batch, loss_mask=np.zeros((B, T), np.float32))
    objective = NextToken(NextTokenConfig(z_loss=0.1))

    def total(hidden, weight):
        sums, _, _ = objective(Model(hidden, weight), emptied, None)
        return sum(sums.values())

    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(model.hidden, model.weight)
    assert value == 0
    assert all(not np.asarray(gradient).any() for gradient in gradients)


def test_a_masked_target_changes_nothing(model, batch):
    objective = NextToken(NextTokenConfig(z_loss=0.1))
    other = np.where(batch['loss_mask'] > 0, batch['targets'], 0).astype(np.int32)
    assert (other != batch['targets']).any()
    sums, changed = (objective(model, b, None)[0] for b in (batch, dict(batch, targets=other)))
    assert {k: float(v) for k, v in sums.items()} == {k: float(v) for k, v in changed.items()}


def test_the_registry_has_the_objective():
    assert OBJECTIVES.load('next_token') is NextToken

"""Scanning, unrolling or recomputing the trunk changes no result; initial weights and dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxfm import state
from jaxfm.models import TransformerConfig
from jaxfm.models.layers import Embedding
from jaxfm.models.transformer import Transformer
from jaxfm.ops.logprobs import logits, token_logprobs


def changed(group, **changes):
    return type(group)(**{**dict(group), **changes})


@pytest.fixture(scope='module')
def loss_and_gradients(build, configs):
    """(config changes) -> loss, {path: gradient} of the `llama` model on a packed row; cached."""
    params = build(configs['llama']).params
    tokens = np.random.default_rng(0).integers(0, 60, (2, 12)).astype(np.int32)
    positions = np.array([[*range(5), *range(5), 0, 0], range(12)], np.int32)
    segment_ids = np.array([[1] * 5 + [2] * 5 + [0] * 2, [1] * 12], np.int32)
    results = {}

    def loss(params, parts):
        model = parts.merge(params)
        hidden, _ = model(tokens, positions, segment_ids)
        logprobs, _ = token_logprobs(hidden.astype(jnp.float32), model.unembed(), tokens[:, ::-1])
        return -jnp.sum(logprobs * (segment_ids > 0))

    def run(**changes):
        key = repr(changes)
        if key not in results:
            config = changed(configs['llama'], **changes)
            parts = state.split(lambda key: Transformer(config, nnx.Rngs(key)))
            function = jax.jit(jax.value_and_grad(lambda params: loss(params, parts)))
            results[key] = jax.device_get(function(params))
        return results[key]

    return run


@pytest.mark.parametrize(
    'changes',
    [
        dict(scan=False),
        dict(remat='dots'),
        dict(remat='full'),
        dict(remat='full', scan=False),
    ],
    ids=str,
)
def test_the_way_the_trunk_is_run_changes_neither_loss_nor_gradients(changes, loss_and_gradients):
    loss, gradients = loss_and_gradients()
    other_loss, other_gradients = loss_and_gradients(**changes)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    for path, gradient in gradients.items():
        size = np.abs(gradient).max()
        assert size > 0, path
        np.testing.assert_allclose(
            other_gradients[path], gradient, rtol=0, atol=2e-5 * size, err_msg=path
        )


def test_bfloat16_compute_is_close_and_gradients_stay_float32(loss_and_gradients):
    loss, gradients = loss_and_gradients()
    half_loss, half_gradients = loss_and_gradients(compute_dtype='bfloat16')
    np.testing.assert_allclose(half_loss, loss, rtol=2e-2)
    for path, gradient in gradients.items():
        assert half_gradients[path].dtype == np.float32
        error = np.linalg.norm(half_gradients[path] - gradient) / np.linalg.norm(gradient)
        assert 0 < error < 0.1, path


def test_segments_equal_the_same_layers_applied_one_by_one(build, configs, batch):
    model = build(configs['gemma'])
    merged = model.parts.merge(model.params)

    @jax.jit
    def one_by_one(params):
        merged = model.parts.merge(params)
        x = merged.embedding(batch[0], jnp.float32) * model.config.embedding_scale
        layers = [(0, 0, 0)] + [(1, place, repeat) for repeat in (0, 1) for place in range(4)]
        for segment, place, repeat in layers:
            graphdef, weights = nnx.split(merged.trunk[segment][place])
            block = nnx.merge(graphdef, jax.tree.map(lambda w, r=repeat: w[r], weights))
            x, _ = block(x, *batch[1:])
        return merged.final_norm(x)

    windows = [b.window for s in model.config.trunk for b in s.pattern]
    assert windows == [0, 4, 4, 4, 0]
    assert merged.trunk[0][0].mlp.down.shape == (1, 40, 16)
    assert merged.trunk[1][0].mlp.down.shape == (2, 24, 16)
    np.testing.assert_allclose(one_by_one(model.params), model(*batch)[0], rtol=1e-5, atol=5e-5)


def test_initial_weights_differ_by_layer_and_seed_and_outputs_may_start_at_zero(configs):
    config = changed(configs['llama'], num_layers=3, zero_init_outputs=True)

    @jax.jit
    def init(seed):
        block = Transformer(config, nnx.Rngs(jax.random.key(seed))).trunk[0][0]
        weights = block.attention.q, block.attention.out, block.mlp.gate_up, block.mlp.down
        return [weight[...] for weight in weights]

    q, out, gate_up, down = init(0)
    assert np.abs(np.corrcoef(q.reshape(3, -1)) - np.eye(3)).max() < 0.2
    np.testing.assert_allclose(np.std(q), 16**-0.5, rtol=0.15)
    assert gate_up.all() and not out.any() and not down.any()
    np.testing.assert_array_equal(init(0)[0], q)
    assert np.abs(init(1)[0] - q).max() > 0.1


def test_tied_embeddings_are_one_parameter_that_learns_from_both_uses(build, configs):
    tied = build(changed(configs['llama'], tie_embeddings=True))
    untied = build(configs['llama'])
    assert set(untied.params) - set(tied.params) == {'head/table'}
    model = tied.parts.merge(tied.params)
    np.testing.assert_array_equal(model.unembed().weight_VD, tied.params['embedding/table'])
    model = untied.parts.merge(untied.params)
    np.testing.assert_array_equal(model.unembed().weight_VD, untied.params['head/table'])

    def gradient(model):
        def total(table):
            merged = model.parts.merge(model.params | {'embedding/table': table})
            ids = np.full((1, 3), 5, np.int32)
            hidden, _ = merged(ids, np.arange(3, dtype=np.int32)[None], ids)
            return jnp.sum(token_logprobs(hidden, merged.unembed(), ids)[0])

        return np.abs(jax.jit(jax.grad(total))(model.params['embedding/table'])).max(axis=1)

    assert (gradient(tied)[:60] > 0).all()  # every output of the softmax
    assert np.flatnonzero(gradient(untied)).tolist() == [5]  # only the token that was looked up


def test_padding_of_the_vocabulary_gets_probability_zero(build, configs):
    model = build(configs['llama'])
    assert model.params['head/table'].shape == (64, 16)
    merged = model.parts.merge(model.params)
    values = logits(jnp.ones((1, 1, 16)), merged.unembed())
    assert np.isneginf(values[..., 60:]).all() and np.isfinite(values[..., :60]).all()
    assert not np.asarray(jax.nn.softmax(values))[..., 60:].any()


def test_hidden_states_are_in_the_compute_dtype_and_weights_stay_as_stored(configs):
    config = changed(configs['mixed'], compute_dtype='bfloat16', param_dtype='bfloat16')
    parts = state.split(lambda key: Transformer(config, nnx.Rngs(key)))
    ids = np.ones((1, 4), np.int32)
    hidden = jax.eval_shape(lambda params: parts.merge(params)(ids, ids, ids)[0], parts.shapes)
    assert hidden.dtype == jnp.bfloat16
    for path, leaf in parts.shapes.items():
        is_float32 = path.endswith(('scale', 'bias')) or '_lora/' in path
        assert leaf.dtype == (jnp.float32 if is_float32 else jnp.bfloat16), path


@pytest.mark.parametrize(
    'changes, message',
    [
        (dict(num_layers=3), 'num_layers is 3'),
        (dict(vocab_size=1), 'vocab_size'),
        (dict(block=dict(num_heads=4, num_kv_heads=3, head_dim=8, mlp_dim=8)), 'num_kv_heads 3'),
        (
            dict(block=dict(num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8, pre_norm=False)),
            'both off',
        ),
    ],
    ids=str,
)
def test_a_config_that_makes_no_sense_says_why(changes, message, configs):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**{**dict(configs['mixed']), **changes})


def test_the_gradient_of_a_frequent_token_is_summed_in_float32():
    embedding = Embedding(8, 4, std=1.0, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(embedding)
    tokens = jnp.zeros((1, 1000), jnp.int32)
    grads = jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p)(tokens, jnp.float32)))(params)
    np.testing.assert_array_equal(grads['table'][...][0].astype(jnp.float32), 1000)

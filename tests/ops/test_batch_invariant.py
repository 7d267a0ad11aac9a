"""Batch-invariant ops: rows and queries have the same bits in any company, and usual gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxfm import sharding
from jaxfm.ops.attention import KeyValues, attention
from jaxfm.ops.batch_invariant import KEYS, QUERIES, ROWS
from jaxfm.ops.linear import linear
from jaxfm.ops.logprobs import Unembedding, log_softmax, logits, token_logprobs
from jaxfm.ops.norm import rms_norm

N, K, H = 4, 2, 8


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@jax.jit
def normed_product(x, scale, weight):
    normed = rms_norm(x, scale, epsilon=1e-6, batch_invariant=True)
    return linear(normed, weight, batch_invariant=True)


def test_a_row_has_the_same_bits_alone_and_among_others():
    x, scale, weight = normal(2, ROWS + 5, 24), normal(24), normal(24, 3, 10)
    among = normed_product(x, scale, weight)
    assert among.shape == (2, ROWS + 5, 3, 10)
    normed = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(among, np.einsum('btd,dno->btno', normed, weight), atol=1e-5)
    for rows in (np.s_[:1, :1], np.s_[1:, 30:], np.s_[:, 5:6], np.s_[:, :ROWS]):
        np.testing.assert_array_equal(normed_product(x[rows], scale, weight), among[rows])


def test_gradients_are_those_of_the_ordinary_op(quick_compilation):
    def total(x, weight, **options):
        return jnp.sum(jnp.sin(linear(x, weight, **options)))

    arguments = normal(2, 9, 6), normal(6, 5)
    ours = jax.grad(functools.partial(total, batch_invariant=True), (0, 1))(*arguments)
    for mine, theirs in zip(ours, jax.grad(total, (0, 1))(*arguments), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


@jax.jit
def score_targets(hidden, weight, targets):
    return token_logprobs(hidden, unembedding(weight), targets)[0]


@jax.jit
def score_all(hidden, weight):
    return log_softmax(logits(hidden, unembedding(weight)), batch_invariant=True)


def unembedding(weight) -> Unembedding:
    return Unembedding(weight, vocab_size=70, softcap=3.0, batch_invariant=True)


def test_log_probs_of_all_ids_have_the_bits_of_those_of_targets():
    hidden, weight = normal(3, 30, 24), normal(80, 24, seed=1)
    targets = np.random.default_rng(2).integers(0, 70, (3, 30))
    expected = score_targets(hidden, weight, targets)
    rows = np.arange(3)
    for column in range(0, 30, 7):
        values = score_all(hidden[:, column : column + 1], weight)
        np.testing.assert_array_equal(values[rows, 0, targets[:, column]], expected[:, column])
        assert np.isneginf(values[:, 0, 70:]).all()
    usual = jax.nn.log_softmax(3.0 * np.tanh(hidden @ weight[:70].T / 3.0))
    np.testing.assert_allclose(
        np.take_along_axis(usual, targets[..., None], 2)[..., 0], expected, atol=1e-5
    )


def documents_in_rows(lengths, first: int, width: int):
    """Positions and segment ids [1, width] of documents one after another from column `first`."""
    positions, segment_ids = np.zeros((2, 1, width), np.int32)
    for number, length in enumerate(lengths):
        positions[0, first : first + length] = np.arange(length)
        segment_ids[0, first : first + length] = number + 1
        first += length
    return positions, segment_ids


@functools.partial(jax.jit, static_argnames=('window', 'softcap', 'batch_invariant'))
def attend(q, k, v, ids, kv_ids, *, window=0, softcap=0.0, batch_invariant=True):
    keys = KeyValues(k, v, *kv_ids)
    how = dict(window=window, softcap=softcap, batch_invariant=batch_invariant)
    return attention(q, keys, *ids, scale=0.5, **how)


LONG = 2 * KEYS + 21


def test_a_query_has_the_same_bits_wherever_its_document_is():
    options = dict(window=70, softcap=2.0)
    q, k, v = normal(1, LONG, N, H), normal(1, LONG, K, H, seed=1), normal(1, LONG, K, H, seed=2)
    ids = documents_in_rows([LONG], 0, LONG)
    alone = attend(q, k, v, ids, ids, **options)
    usual = attend(q, k, v, ids, ids, batch_invariant=False, **options)
    np.testing.assert_allclose(alone, usual, atol=1e-5)

    # Behind padding and another document, with a third one after it.
    first, width = 3 + 40, LONG + 60
    packed = documents_in_rows([40, LONG, 5], 3, width)
    wide = [normal(1, width, *x.shape[2:], seed=9) for x in (q, k, v)]
    for large, small in zip(wide, (q, k, v)):
        large[:, first : first + LONG] = small
    among = attend(*wide, packed, packed, **options)
    np.testing.assert_array_equal(among[:, first : first + LONG], alone)
    np.testing.assert_array_equal(among[:, :3], 0)  # padding

    # A chunk of it, with a longer cache of which the rest holds NaN.
    slots = LONG + 100
    cached = [np.full((1, slots, K, H), np.nan, np.float32) for _ in 'kv']
    for large, small in zip(cached, (k, v)):
        large[:, :LONG] = small
    kv_ids = (
        np.arange(slots, dtype=np.int32)[None],
        (np.arange(slots) < LONG).astype(np.int32)[None],
    )
    for start, end in ((LONG - 1, LONG), (50, 50 + QUERIES + 9)):
        some = [x[:, start:end] for x in ids]
        chunk = attend(q[:, start:end], *cached, some, kv_ids, **options)
        np.testing.assert_array_equal(chunk, alone[:, start:end])


def test_a_document_out_of_order_gives_nan_and_the_others_their_values(quick_compilation):
    q, k, v = normal(1, 30, N, H), normal(1, 30, K, H, seed=1), normal(1, 30, K, H, seed=2)
    positions, segment_ids = documents_in_rows([10, 12], 0, 30)
    swapped = positions.copy()
    swapped[0, 3:5] = 4, 3
    headless = positions + 2 * (segment_ids == 1)  # its first tokens are not in the row
    expected = attend(q, k, v, (positions, segment_ids), (positions, segment_ids))
    for changed in (swapped, headless):
        out = attend(q, k, v, (changed, segment_ids), (changed, segment_ids))
        assert np.isnan(out[segment_ids == 1]).all()
        np.testing.assert_array_equal(out[segment_ids != 1], expected[segment_ids != 1])


def test_on_a_mesh_results_are_sharded_as_usual_and_have_the_same_bits(quick_compilation):
    sizes = dict.fromkeys(sharding.MESH_AXES, 1) | dict(fsdp=2, tensor=2)
    x, weight = normal(2, 9, 24), normal(24, 4, 6)
    expected = jax.jit(functools.partial(linear, batch_invariant=True))(x, weight)
    with jax.set_mesh(sharding.make_mesh(sizes, jax.devices()[:4])):
        placed = sharding.place(x, 'batch', None, None), jax.reshard(weight, P(None, 'tensor'))
        ours = jax.jit(functools.partial(linear, batch_invariant=True))(*placed)
        assert ours.sharding == jax.jit(linear)(*placed).sharding
        assert not ours.sharding.is_fully_replicated
    np.testing.assert_array_equal(ours, expected)

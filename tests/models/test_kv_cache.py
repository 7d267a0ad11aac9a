"""Decoding with the cache equals one forward over the whole text."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxfm.models.kv_cache import LayerCache, copy_pages
from jaxfm.ops.paged_attention import paged_attention

LENGTH = 20  # tokens, more than any text here needs


def assert_close(result, expected):
    # A change of one ulp in the weights moves the nine-layer model's outputs by 2e-5.
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=5e-5)


def decode(model, tokens, starts, cache):
    """Feeds tokens[b, starts[b]:] one by one -> (hidden, log-probs) by position, and the cache.

    Rows that have ended are fed padding until all have.
    """
    B, T = tokens.shape
    rows = np.arange(B)
    found = [np.zeros((B, T, 16)), np.zeros((B, T, 60))]
    for step in range(T - min(starts)):
        at = np.array(starts) + step
        running = at < T
        one = tokens[rows, np.minimum(at, T - 1)]
        *values, cache = model(
            one[:, None],
            np.where(running, at, -1).astype(np.int32)[:, None],
            running.astype(np.int32)[:, None],
            cache,
        )
        for result, value in zip(found, values, strict=True):
            result[rows[running], at[running]] = value[running, 0]
    return found, cache


def prefill(model, tokens, lengths, cache):
    """Prefills the first lengths[b] tokens of each row, padded at the end."""
    positions = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (tokens.shape[0], 1))
    inside = (positions < np.array(lengths)[:, None]).astype(np.int32)
    return model(tokens * inside, positions, inside, cache)


def test_token_by_token_equals_the_full_forward(model, batch):
    full = model(*batch)
    (hidden, logprobs), _ = decode(model, batch[0], [0] * 4, model.new_cache(LENGTH))
    assert_close(hidden, full[0])
    assert_close(logprobs, full[1])


def test_in_one_go_equals_the_full_forward(model, batch):
    full, cached = model(*batch), model(*batch, model.new_cache(LENGTH))
    assert_close(cached[0], full[0])
    assert_close(cached[1], full[1])


def test_prompts_of_unequal_lengths_then_tokens_equal_the_full_forward(model, batch):
    full, lengths = model(*batch), [3, 16, 9, 1]
    *prompt, cache = prefill(model, batch[0], lengths, model.new_cache(LENGTH))
    rest, _ = decode(model, batch[0], lengths, cache)
    for prompt_values, rest_values, expected in zip(prompt, rest, full[:2], strict=True):
        for row, length in enumerate(lengths):
            assert_close(prompt_values[row, :length], expected[row, :length])
            assert_close(rest_values[row, length:], expected[row, length:])


def test_a_reused_slot_hides_the_previous_request(model, batch):
    lengths, new = [2, 5, 1, 7], np.roll(batch[0], 1, axis=0)
    *_, used = model(*batch, model.new_cache(LENGTH))
    results = []
    for cache in (used, model.new_cache(LENGTH)):
        *_, cache = prefill(model, new, lengths, cache)
        results.append(decode(model, new, lengths, cache)[0])
    for after_another, fresh in zip(*results, strict=True):
        np.testing.assert_array_equal(after_another, fresh)


def test_a_row_without_new_tokens_keeps_its_cache(model, batch):
    *_, cache = prefill(model, batch[0], [4, 4, 4, 4], model.new_cache(LENGTH))
    *_, admitted = prefill(model, batch[0][::-1].copy(), [0, 6, 0, 0], cache)
    alone, _ = decode(model, batch[0], [4] * 4, cache)
    beside, _ = decode(model, batch[0], [4] * 4, admitted)
    for row in (0, 2, 3):
        np.testing.assert_array_equal(beside[0][row], alone[0][row])
    assert np.abs(beside[0][1, 5:] - alone[0][1, 5:]).max() > 1e-3


def layer_cache(table):
    """Three layers of seven pages of two slots."""
    return LayerCache(*(jnp.zeros((3, 7, 2, 1, 1)) for _ in 'kv'), jnp.asarray(table))


def test_an_update_stores_at_positions_and_throws_padding_away():
    new = jnp.asarray([[1.0, 2, 3], [4, 5, 6]])[..., None, None]
    positions = jnp.asarray([[3, 0, 1], [2, 1, 0]])
    segment_ids = jnp.asarray([[1, 1, 0], [1, 0, 1]])
    cache = layer_cache([[5, 2], [1, 6]]).update(1, new, -new, positions, segment_ids)
    pages = [[0, 0], [6, 0], [0, 1], [0, 0], [0, 0], [2, 0], [4, 0]]
    np.testing.assert_array_equal(cache.k[1, 1:, :, 0, 0], pages[1:])  # page 0 holds anything
    assert not cache.k[0].any() and not cache.k[2].any()  # other layers: untouched
    np.testing.assert_array_equal(cache.v, -cache.k)


def test_copied_pages_hold_the_same_in_all_layers():
    random = np.random.default_rng(0)
    cache = [[LayerCache(*(jnp.asarray(random.normal(size=(3, 7, 2, 1, 1))) for _ in 'kv'))]]
    copied = copy_pages(cache, jnp.asarray([[5, 0]]), jnp.asarray([[2, 0]]))
    for after, before in zip(jax.tree.leaves(copied), jax.tree.leaves(cache), strict=True):
        expected = np.array(before)
        expected[:, 2] = expected[:, 5]
        np.testing.assert_array_equal(after, expected)


@pytest.mark.parametrize('rows', [1, 2])
def test_one_new_token_does_not_copy_the_pool(rows):
    """Not even if it is the only one: XLA writes that in another way. The table has two blocks."""
    shape = (3, 40, 16, 2, 8)

    @functools.partial(jax.jit, donate_argnums=0)
    def decode(cache, table, position):
        def layer(index, carry):
            cache, x = carry
            at, ones = jnp.full((rows, 1), position), jnp.ones((rows, 1), jnp.int32)
            cache = cache.update(index, x, x, at, ones)
            return cache, paged_attention(x, cache.pages(index), at, ones, scale=1.0)

        carry = dataclasses.replace(cache, page_table_BM=table), jnp.ones((rows, 1, 2, 8))
        cache, x = lax.fori_loop(0, 3, layer, carry)
        return dataclasses.replace(cache, page_table_BM=None), x

    cache = LayerCache(*(jnp.zeros(shape) for _ in 'kv'))
    program = decode.lower(cache, jnp.ones((rows, 8), jnp.int32), 100).compile().as_text()
    pool = 'f32[{}]'.format(','.join(map(str, shape)))
    copies = [line for line in program.splitlines() if pool in line and ' copy(' in line]
    assert pool in program and not copies

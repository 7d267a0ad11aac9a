"""Samples a token from logits: options of each row, its own noise, and two kinds of log-probs.

B rows, V ids of the padded vocabulary, S positions of the history.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxfm import sharding
from jaxfm.sampling.request import MAX_TOP_LOGPROBS

_INFINITY_BITS = 0x7F800000  # of a float32
_SMALLEST_TEMPERATURE = jnp.finfo(jnp.float32).tiny  # below, devices may flush to zero


class Sampled(NamedTuple):
    """A token per row, and what is known about it."""

    tokens: jax.Array  # [B] int32; 0 if the row is bad
    logprobs: jax.Array  # [B] under the full softmax of the raw logits at temperature 1
    sampling_logprobs: jax.Array  # [B] under the distribution sampled from; 0 for greedy rows
    top_ids: jax.Array  # [B, MAX_TOP_LOGPROBS] likeliest first; -1 past the vocabulary's end
    top_logprobs: jax.Array  # [B, MAX_TOP_LOGPROBS] as `logprobs`; zeros if no row asks
    is_bad: jax.Array  # [B] there was nothing to sample from


def sample_tokens(
    logits_BV, options, positions_B, history_BS=None, bias_BV=None, logprobs_BV=None
) -> Sampled:
    """Samples one token per row.

    The order is that of transformers' warpers: bias and masks (min_tokens among them), repetition,
    presence and frequency penalties, temperature, top-k, top-p, min-p. Each sees what the one
    before left. Top-k and top-p keep all ids that tie with the last one kept. A greedy row takes
    the likeliest id after the penalties.

    The noise depends only on (request seed, sample index, position), so other requests in the batch
    and the time of sampling do not change the result. A row is bad if its logits have a NaN, +inf,
    or no finite value, raw or after the penalties; it leaves the other rows alone.

    Args:
      logits_BV: float32; a token with logit -inf is never sampled.
      options: the arrays that `options.rows` makes.
      positions_B: position of the token to sample.
      history_BS: tokens of the row by position, -1 where there is none; needed if any row has a
        penalty. None makes a cheaper program.
      bias_BV: float32, is added to the logits; needed if any row has logit_bias or allowed_ids.
        None makes a cheaper program.
      logprobs_BV: log-softmax of the logits, if the results shall have its bits.
    """
    arrays = dict(logits=logits_BV, positions=positions_B, history=history_BS, bias=bias_BV)
    arrays['logprobs'] = logprobs_BV
    arrays = {'options': options} | {k: x for k, x in arrays.items() if x is not None}
    arrays = jax.tree.map(lambda x: sharding.place(x, 'batch', *(None,) * (x.ndim - 1)), arrays)
    # Each shard samples its own rows: under vmap, per-row keys lose their sharding (jax 0.11), and
    # a shard skips what none of its rows ask for.
    results = [('batch',)] * 3 + [('batch', None)] * 2 + [('batch',)]
    shard = sharding.per_shard(lambda arrays: tuple(_sample(**arrays)), [('batch',)], results)
    return Sampled(*shard(arrays))


def _sample(logits, options, positions, history=None, bias=None, logprobs=None) -> Sampled:
    largest_B1 = jnp.max(logits, axis=-1, keepdims=True)
    logsumexp_B = jnp.log(jnp.sum(jnp.exp(logits - largest_B1), axis=-1))

    def score(found_BK):
        return found_BK - largest_B1 - logsumexp_B[:, None] if logprobs is None else found_BK

    adjusted_BV = _adjust(logits, options, positions, history, bias)
    tokens_B, sampling_logprobs_B = _draw(adjusted_BV, options, positions)
    # The sum is finite unless a logit is NaN or +inf, or all are -inf.
    is_bad_B = ~jnp.isfinite(logsumexp_B)
    is_bad_B |= ~jnp.isfinite(_pick(adjusted_BV, tokens_B[:, None])[:, 0])
    tokens_B = jnp.where(is_bad_B, 0, tokens_B)
    scored_BV = logits if logprobs is None else logprobs
    top_ids, top_logprobs = _rank(scored_BV, score, options['num_top'])
    logprobs_B = score(_pick(scored_BV, tokens_B[:, None]))[:, 0]
    return Sampled(tokens_B, logprobs_B, sampling_logprobs_B, top_ids, top_logprobs, is_bad_B)


def _adjust(logits_BV, options, positions_B, history_BS, bias_BV):
    """Logits after bias, masks and penalties."""
    if bias_BV is not None:
        logits_BV += bias_BV
    logits_BV = _forbid_early_ends(logits_BV, options, positions_B)
    if history_BS is not None:
        logits_BV = _penalize(logits_BV, options, history_BS)
    return logits_BV


def _forbid_early_ends(logits_BV, options, positions_B):
    """Gives -inf to the stop ids of rows that have not reached their min_tokens."""
    is_early_B = positions_B < options['first_end']

    def forbid():
        ids = options['stop_ids']
        ids = jnp.where(is_early_B[:, None] & (ids >= 0), ids, logits_BV.shape[1])  # or drop it
        return logits_BV.at[_row_numbers(logits_BV), ids].set(-jnp.inf, mode='drop')

    return lax.cond(jnp.any(is_early_B), forbid, lambda: logits_BV)


def _penalize(logits_BV, options, history_BS):
    """Repetition penalty (Keskar et al. 2019, CTRL), then OpenAI's presence and frequency.

    Repetition counts prompt and completion, the other two count the completion alone.
    """
    positions_1S = lax.broadcasted_iota(jnp.int32, (1, history_BS.shape[1]), 1)
    is_completion_BS = positions_1S >= options['prompt_length'][:, None]
    seen_BV = _count(logits_BV, history_BS) > 0
    count_BV = _count(logits_BV, jnp.where(is_completion_BS, history_BS, -1))
    factor_B1 = options['repetition'][:, None]
    repeated_BV = jnp.where(logits_BV > 0, logits_BV / factor_B1, logits_BV * factor_B1)
    logits_BV = jnp.where(seen_BV, repeated_BV, logits_BV)
    presence_BV = jnp.where(count_BV > 0, options['presence'][:, None], 0.0)
    return logits_BV - presence_BV - options['frequency'][:, None] * count_BV


def _count(logits_BV, tokens_BS):
    """How often each id of the vocabulary occurs in a row; negative ids do not count."""
    ids_BS = jnp.where(tokens_BS >= 0, tokens_BS, logits_BV.shape[1])  # past the end: dropped
    counts_BV = jnp.zeros_like(logits_BV)
    return counts_BV.at[_row_numbers(logits_BV), ids_BS].add(1.0, mode='drop')


def _row_numbers(x_BV):
    return lax.broadcasted_iota(jnp.int32, (x_BV.shape[0], 1), 0)


def _draw(logits_BV, options, positions_B):
    """-> tokens, and their log-probs under the distribution sampled from."""
    is_greedy_B = options['temperature'] < _SMALLEST_TEMPERATURE

    def take_likeliest():
        tokens_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        return tokens_B, jnp.zeros(tokens_B.shape)

    def draw():
        scaled_BV = _scale(logits_BV, jnp.where(is_greedy_B, 1.0, options['temperature']))
        threshold_B = _threshold(scaled_BV, options, ~is_greedy_B)
        scaled_BV = jnp.where(scaled_BV >= threshold_B[:, None], scaled_BV, -jnp.inf)
        noise_BV = _noise(options['seeds'], positions_B, logits_BV.shape[1])
        # Inside the argmax it would cost twice as much.
        noise_BV = lax.optimization_barrier(noise_BV)
        noisy_BV = jnp.where(is_greedy_B[:, None], logits_BV, scaled_BV + noise_BV)
        tokens_B = jnp.argmax(noisy_BV, axis=-1).astype(jnp.int32)
        logsumexp_B = jnp.log(jnp.sum(jnp.exp(scaled_BV), axis=-1))
        logprobs_B = _pick(scaled_BV, tokens_B[:, None])[:, 0] - logsumexp_B
        return tokens_B, jnp.where(is_greedy_B, 0.0, logprobs_B)

    # The noise costs more than all the rest, so an all-greedy batch skips it.
    return lax.cond(jnp.all(is_greedy_B), take_likeliest, draw)


def _scale(logits_BV, temperature_B):
    # Shifted to at most 0, the logits cannot overflow, however small the temperature.
    return (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / temperature_B[:, None]


def _threshold(scaled_BV, options, is_sampled_B):
    """The smallest scaled logit of each row that top-k, top-p and min-p all keep."""
    nothing_B = jnp.full(is_sampled_B.shape, -jnp.inf)
    has_k_B = is_sampled_B & (options['top_k'] > 0)
    has_p_B = is_sampled_B & (options['top_p'] < 1)

    def top_k():
        found_B = _reach(scaled_BV, 1.0, options['top_k'].astype(jnp.float32))
        return jnp.where(has_k_B, found_B, -jnp.inf)

    def top_p():
        weights_BV = jnp.where(scaled_BV >= threshold_B[:, None], jnp.exp(scaled_BV), 0.0)
        found_B = _reach(scaled_BV, weights_BV, options['top_p'] * jnp.sum(weights_BV, axis=-1))
        return jnp.where(has_p_B, jnp.maximum(threshold_B, found_B), threshold_B)

    threshold_B = lax.cond(jnp.any(has_k_B), top_k, lambda: nothing_B)
    threshold_B = lax.cond(jnp.any(has_p_B), top_p, lambda: threshold_B)
    return jnp.maximum(threshold_B, jnp.log(options['min_p']))  # the likeliest id has 0 = log 1


def _reach(scaled_BV, weights_BV, target_B):
    """The largest t for which ids with scaled logit >= t have a sum of weights >= the target.

    The bits of floats that are not negative, read as integers, have the order of the floats. So
    31 sums find the bits of -t from the highest to the lowest: exact, and no sort. -inf if no t
    reaches the target.
    """
    bits_BV = lax.bitcast_convert_type(jnp.abs(scaled_BV), jnp.int32)

    def find_bit(index, found_B):
        tried_B = found_B | (1 << (30 - index))
        sum_B = jnp.sum(jnp.where(bits_BV < tried_B[:, None], weights_BV, 0.0), axis=-1)
        return jnp.where(sum_B < target_B, tried_B, found_B)

    found_B = lax.fori_loop(0, 31, find_bit, jnp.zeros(target_B.shape, jnp.int32))
    return -lax.bitcast_convert_type(jnp.minimum(found_B, _INFINITY_BITS), jnp.float32)


def _noise(seeds_B2, positions_B, size):
    return jax.vmap(lambda seed_2, position: _gumbel(seed_2, position, size))(seeds_B2, positions_B)


def _gumbel(seed_2, position, size):
    key = jax.random.fold_in(jax.random.key(seed_2[0]), seed_2[1])
    return jax.random.gumbel(jax.random.fold_in(key, position), (size,))


def _rank(scored_BV, score, num_top_B):
    """-> ids and log-probs of the likeliest tokens, if any row asks for them."""

    def rank():
        ids, found = find_top(scored_BV)
        return ids, score(found)

    shape = scored_BV.shape[0], MAX_TOP_LOGPROBS
    nothing = jnp.zeros(shape, jnp.int32), jnp.zeros(shape)
    return lax.cond(jnp.any(num_top_B > 0), rank, lambda: nothing)


def find_top(values):
    """[..., V] -> ids and values of the MAX_TOP_LOGPROBS largest; past the last id -1 and -inf."""
    count = min(MAX_TOP_LOGPROBS, values.shape[-1])
    values, ids = lax.top_k(values, count)
    missing = *((0, 0),) * (values.ndim - 1), (0, MAX_TOP_LOGPROBS - count)
    return (
        jnp.pad(ids, missing, constant_values=-1),
        jnp.pad(values, missing, constant_values=-jnp.inf),
    )


def _pick(values_BV, ids_BK):
    return jnp.take_along_axis(values_BV, ids_BK, axis=1)

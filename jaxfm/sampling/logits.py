"""Samples a token from logits: temperature, per-request noise, and two kinds of log-probs."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxfm import sharding


def sample_tokens(logits_BV, temperature_B, seeds_B2, positions_B):
    """Samples one token per row, with the log-probs that a trainer needs.

    The noise depends only on (request seed, sample index, position), so other requests in the batch
    and the time of sampling do not change the result.

    Args:
      logits_BV: float32; a token with logit -inf is never sampled.
      temperature_B: 0 means greedy.
      seeds_B2: uint32 request seed and sample index.
      positions_B: position of the token to sample.

    Returns:
      (tokens, logprobs, sampling_logprobs), each [B]: int32 tokens, their log-probs under the full
      softmax at temperature 1, and under the sampling distribution (0 for greedy rows).
    """
    logprobs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    greedy_B = temperature_B <= 0
    # Shifted to at most 0, the logits cannot overflow, however small the temperature.
    scaled_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    scaled_BV /= jnp.where(greedy_B, 1.0, temperature_B)[:, None]
    # Making the noise costs more than all the rest, so an all-greedy batch skips it.
    noisy_BV = lax.cond(
        jnp.all(greedy_B),
        lambda: logits_BV,
        lambda: jnp.where(
            greedy_B[:, None],
            logits_BV,
            scaled_BV + _noise(seeds_B2, positions_B, logits_BV.shape[-1]),
        ),
    )
    tokens_B = jnp.argmax(noisy_BV, axis=-1).astype(jnp.int32)
    processed_B = _pick(jax.nn.log_softmax(scaled_BV, axis=-1), tokens_B)
    return tokens_B, _pick(logprobs_BV, tokens_B), jnp.where(greedy_B, 0.0, processed_B)


def _noise(seeds_B2, positions_B, size):
    # Each shard makes its own noise: under vmap, per-row keys lose their sharding (jax 0.11).
    rows = jax.vmap(lambda seed_2, position: _gumbel(seed_2, position, size))
    names = ('batch', None), ('batch',)
    return sharding.per_shard(rows, names, ('batch', None))(seeds_B2, positions_B)


def _gumbel(seed_2, position, size):
    key = jax.random.fold_in(jax.random.key(seed_2[0]), seed_2[1])
    return jax.random.gumbel(jax.random.fold_in(key, position), (size,))


def _pick(values_BV, tokens_B):
    ids = lax.broadcasted_iota(jnp.int32, (1, values_BV.shape[-1]), 1)
    return jnp.sum(jnp.where(ids == tokens_B[:, None], values_BV, 0.0), axis=-1)

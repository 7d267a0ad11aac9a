"""The programs that the engine compiles: store chunks of prompts, decode, copy pages.

Weights are arguments, so new ones need no recompilation, and the pools of pages are donated. A
program is compiled once for each shape of its rows. B rows, T tokens of a chunk, M pages of a row,
K decode steps, V padded vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxfm import sharding
from jaxfm.models import TransformerConfig, kv_cache
from jaxfm.models.transformer import compute_dtype
from jaxfm.ops.logprobs import log_softmax, logits
from jaxfm.sampling.logits import Sampled, find_top, sample_tokens
from jaxfm.sampling.packed import pack_columns, unpack, unpack_columns
from jaxfm.sampling.request import MAX_TOP_LOGPROBS as NUM_TOP

# (numbers of a row or None, dtype) of what a step samples, and of how many steps there were.
_SAMPLED = Sampled(
    tokens=(None, np.int32),
    logprobs=(None, np.float32),
    sampling_logprobs=(None, np.float32),
    top_ids=(NUM_TOP, np.int32),
    top_logprobs=(NUM_TOP, np.float32),
    is_bad=(None, bool),
)
_STEPS = None, np.int32
_SCORED = 64  # tokens of prompts whose log-probs are computed together


class Programs:
    """Jitted functions over (weights, pools of pages, rows).

    Args:
      merge: {path: array} -> model, such as `Parts.merge`.
      num_pages: of the pools, over all shards of the batch.
      steps: most decode steps of a call.
    """

    def __init__(
        self, merge, model_config: TransformerConfig, *, num_pages: int, page_size: int, steps: int
    ):
        self._merge, self._steps = merge, steps
        self._is_exact = model_config.batch_invariant
        dtype = compute_dtype(model_config)
        self.new_cache = jax.jit(
            lambda: kv_cache.init_cache(model_config, num_pages, page_size, dtype)
        )
        self.store = jax.jit(self._store, donate_argnums=1)
        self.decode = jax.jit(self._decode, donate_argnums=1)
        self.copy = jax.jit(self._copy, donate_argnums=0)

    @property
    def num_compiled(self) -> int:
        """How many programs have been compiled."""
        return sum(f._cache_size() for f in (self.new_cache, self.store, self.decode, self.copy))

    def _copy(self, cache, rows):
        rows = unpack(rows)
        return kv_cache.copy_pages(cache, rows['source'], rows['target'])

    def _store(self, params, cache, rows):
        """Stores the keys and values of chunks -> (cache, log-probs of the tokens that follow).

        rows: tokens, positions [B, T] (-1: padding), page_table [B, M], targets [B, T] (the tokens
          one further on), num_top [B] (of the likeliest tokens at each position; -1: not even the
          log-probs of the targets).
        """
        with sharding.whole_positions():
            rows, model = unpack(rows), self._merge(params)
            positions_BT = rows['positions']
            is_token_BT = (positions_BT >= 0).astype(jnp.int32)
            cache = kv_cache.with_table(cache, rows['page_table'])
            hidden_BTD, extras = model(
                rows['tokens'], jnp.maximum(positions_BT, 0), is_token_BT, cache
            )
            scores = self._prompt_logprobs(model, hidden_BTD, rows['targets'], rows['num_top'])
            cache = kv_cache.with_table(extras['cache'], None)
            return cache, jax.tree.map(sharding.replicate, scores)

    def _prompt_logprobs(self, model, hidden_BTD, targets_BT, num_top_B):
        """-> log-probs [B, T], likeliest ids and their log-probs [B, T, NUM_TOP]; or zeros."""
        B, T = targets_BT.shape
        unembedding = model.unembed()

        # A few positions at a time: with all of them, the logits would take gigabytes; with one,
        # the unembedding is read again for each.
        count = next(n for n in range(T, 0, -1) if T % n == 0 and (n * B <= _SCORED or n == 1))

        def some(arguments):
            hidden_BCD, targets_BC = arguments
            logprobs_BCV = self._log_softmax(_logits(hidden_BCD, unembedding))
            return _pick(logprobs_BCV, targets_BC), *find_top(logprobs_BCV)

        def compute():
            def split(x):
                return jnp.swapaxes(x.reshape(B, T // count, count, *x.shape[2:]), 0, 1)

            def join(x):
                joined = jnp.swapaxes(x, 0, 1).reshape(B, T, *x.shape[3:])
                # With one row, the reshapes lose over which axes of the mesh the rows are split.
                return sharding.place(joined, 'batch', *(None,) * (joined.ndim - 1))

            return jax.tree.map(join, lax.map(some, (split(hidden_BTD), split(targets_BT))))

        def nothing():
            spec = sharding.activation('batch', None, None)
            top = jnp.zeros((B, T, NUM_TOP), jnp.int32, out_sharding=spec)
            return top[..., 0].astype(jnp.float32), top, top.astype(jnp.float32)

        return lax.cond(jnp.any(num_top_B >= 0), compute, nothing)

    def _decode(self, params, cache, rows):
        """Feeds the last token of each row and samples the next, up to K times.

        rows: last, positions [B] (-1: an empty row), page_table [B, M], limits [B] (the length at
          which a row ends), patience [B] (how many rows may end before the call does, in each),
          options (see `sample_tokens`) and, where needed, history [B, S] and bias [B, V].

        Returns:
          cache, and what `read_sampled` takes. A row that has ended gives anything.
        """
        with sharding.whole_positions():
            rows, model = unpack(rows), self._merge(params)
            options, patience = rows['options'], jnp.max(rows['patience'])
            is_row_B = rows['positions'] >= 0
            num_rows = jnp.sum(is_row_B)

            def goes_on(carry):
                step, runs_B = carry[0], carry[4]
                num_running = jnp.sum(runs_B)
                is_patient = num_rows - num_running < patience
                return (step < self._steps) & (num_running > 0) & is_patient

            def body(carry):
                step, cache, last_B, positions_B, runs_B, history, found = carry
                cache = kv_cache.with_table(cache, rows['page_table'])
                hidden_B1D, extras = model(
                    last_B[:, None],
                    jnp.maximum(positions_B, 0)[:, None],
                    runs_B.astype(jnp.int32)[:, None],
                    cache,
                )
                at_B = positions_B + 1
                logits_BV = _logits(hidden_B1D, model.unembed())[:, 0]
                # What the trainer computes, in its own way.
                exact = self._log_softmax(logits_BV[:, None])[:, 0] if self._is_exact else None
                sampled = sample_tokens(logits_BV, options, at_B, history, rows.get('bias'), exact)
                found = jax.tree.map(functools.partial(_put, step), found, sampled)
                tokens_B = sampled.tokens
                ends_B = jnp.any(tokens_B[:, None] == options['stop_ids'], axis=1)
                ends_B |= (at_B + 1 >= rows['limits']) | sampled.is_bad
                cache = kv_cache.with_table(extras['cache'], None)
                if history is not None:
                    history = _note(history, at_B, jnp.where(runs_B, tokens_B, -1))
                return step + 1, cache, tokens_B, at_B, runs_B & ~ends_B, history, found

            found = self._nothing(rows['last'].shape[0])
            state = rows['last'], rows['positions'], is_row_B, rows.get('history'), found
            step, cache, *_, found = lax.while_loop(goes_on, body, (jnp.int32(0), cache, *state))
            # Every process reads all sampled tokens, so that all of them make the same schedule.
            steps = jnp.full_like(found.tokens, step)
            return cache, sharding.replicate(pack_columns([*found, steps]))

    def _log_softmax(self, logits_BTV):
        return log_softmax(logits_BTV, batch_invariant=self._is_exact)

    def _nothing(self, num_rows: int) -> Sampled:
        def zeros(width, dtype):
            more = () if width is None else (width,)
            spec = sharding.activation(None, 'batch', *(None for _ in more))
            return jnp.zeros((self._steps, num_rows, *more), dtype, out_sharding=spec)

        return Sampled(*(zeros(*column) for column in _SAMPLED))


def read_sampled(data) -> Sampled:
    """The host arrays [steps, B, ...] of a call of `Programs.decode`."""
    like = [*_SAMPLED, _STEPS]
    *sampled, steps_KB = unpack_columns(np.asarray(jax.device_get(data)), like)
    return Sampled(*(x[: steps_KB[0, 0]] for x in sampled))


def _logits(hidden_BTD, unembedding):
    """[B, T, V] float32, not split over the vocabulary."""
    return sharding.place(logits(hidden_BTD, unembedding), 'batch', None, None)


def _pick(values, ids):
    """values [..., V] at ids [...]."""
    shape = *(1 for _ in ids.shape), values.shape[-1]
    is_picked = lax.broadcasted_iota(jnp.int32, shape, ids.ndim) == ids[..., None]
    return jnp.sum(jnp.where(is_picked, values, 0.0), axis=-1)


def _put(step, all_KB, new_B):
    return lax.dynamic_update_index_in_dim(all_KB, new_B, step, 0)


def _note(history_BS, at_B, tokens_B):
    """Writes each row's new token at its position."""
    is_here_BS = lax.broadcasted_iota(jnp.int32, history_BS.shape, 1) == at_B[:, None]
    return jnp.where(is_here_BS, tokens_B[:, None], history_BS)

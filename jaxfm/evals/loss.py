"""Held-out loss: nats per token and bits per UTF-8 byte, over every held-out target once."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm import sharding
from jaxfm.data.corpus import xz_bits_per_byte
from jaxfm.data.loader import evaluation_batches
from jaxfm.evals import LossConfig
from jaxfm.evals.base import Cadence, Context
from jaxfm.ops.logprobs import token_logprobs


class HeldOutLoss(Cadence):
    """Bits per byte do not depend on the tokenizer: nats of all targets / ln 2 / bytes of text."""

    def __init__(self, config: LossConfig, context: Context):
        super().__init__(config)
        self._config, self._corpus, self._mesh = config, context.corpus, context.mesh
        self._length = config.sequence_length or context.sequence_length
        self._rows = sharding.whole_rows(config.batch_size, context.mesh)

        @jax.jit
        def sums(params, batch):
            model = context.merge(params)
            hidden, _ = model(batch['tokens'], batch['positions'], batch['segment_ids'])
            logprobs, _ = token_logprobs(hidden, model.unembed(), batch['targets'])
            mask = batch['loss_mask']
            return jnp.stack([-jnp.sum(logprobs * mask), jnp.sum(mask)])

        self._sums = sums

    def run(self, params, step: int) -> dict[str, float]:
        """{'loss': nats per token, and bits_per_byte, xz_bits_per_byte if all text is read}."""
        del step
        totals = np.zeros(2)
        batches = evaluation_batches(
            self._corpus.heldout, self._length, self._rows, self._config.stride or None
        )
        pending = None
        for index, batch in enumerate(batches):
            if index == (self._config.max_batches or math.inf):
                break
            new = self._sums(params, sharding.distribute(batch, self._mesh))
            totals += 0 if pending is None else jax.device_get(pending)  # one behind: two in flight
            pending = new
        nats, tokens = totals + jax.device_get(pending)
        values = {'loss': float(nats / tokens)}
        if not self._config.max_batches:
            values['bits_per_byte'] = float(nats / math.log(2) / self._corpus.heldout.num_bytes)
        if self._config.xz_baseline:
            values['xz_bits_per_byte'] = self._xz_bits_per_byte
        return values

    @functools.cached_property
    def _xz_bits_per_byte(self) -> float:
        return xz_bits_per_byte(text for _, text in self._corpus.heldout_documents)

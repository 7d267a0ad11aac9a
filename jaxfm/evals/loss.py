"""Held-out loss in nats per token and bits per UTF-8 byte; every held-out target counts once."""

import functools
import itertools
import lzma
import math
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxfm import sharding
from jaxfm.data.documents import KIND_NAMES
from jaxfm.data.loader import evaluation_batches
from jaxfm.data.packing.rows import is_compared
from jaxfm.errors import DataError
from jaxfm.evals import LossConfig
from jaxfm.evals.base import Context, Periodic
from jaxfm.ops.logprobs import token_logprobs


class HeldOutLoss(Periodic):
    """The loss on a phase's held-out documents: overall, and for each source of a mixture.

    Bits per byte are (nats of all targets) / ln 2 / (bytes of text), so they do not depend on the
    tokenizer. They are not defined for chats, where only assistant tokens are targets.

    Raises:
      DataError: no held-out token of a source counts in the loss.
    """

    def __init__(self, config: LossConfig, context: Context):
        super().__init__(config.every, config.at_start)
        self._config, self._dataset, self._mesh = config, context.dataset, context.mesh
        self._length = config.sequence_length or context.dataset.sequence_length
        self._rows = sharding.whole_rows(config.batch_size, context.mesh)
        for source, cache in context.dataset.heldout.items():
            if is_compared(cache):
                remedy = 'which it does not measure; give it another phase'
                if cache.kind == 'pair':
                    remedy = f'measure them with {context.where}.name=preference'
                raise DataError(
                    f'{context.where}: a held-out document of {source} is '
                    f'{KIND_NAMES[cache.kind]}: {remedy}'
                )
            if not any(batch['loss_mask'].any() for batch in self._batches(cache)):
                raise DataError(_no_targets(context.name, source, cache, config.max_batches))

        @jax.jit
        def sums(params, batch):
            model = context.merge(params)
            hidden, _ = model(batch['tokens'], batch['positions'], batch['segment_ids'])
            logprobs, _ = token_logprobs(hidden, model.unembed(), batch['targets'])
            mask = batch['loss_mask']
            return jnp.stack([-jnp.sum(logprobs * mask), jnp.sum(mask)])

        self._sums = sums

    def run(self, params, step: int) -> dict[str, float]:
        """{'loss': nats per token, 'loss/<source>', 'bits_per_byte', 'xz_bits_per_byte'}.

        'loss/<source>' only for a mixture; 'bits_per_byte' only if all of the held-out text is read
        and none of it is chats; 'xz_bits_per_byte' only if the config asks for it.
        """
        del step
        heldout = self._dataset.heldout
        totals = {name: self._totals(params, cache) for name, cache in heldout.items()}
        nats, tokens = sum(totals.values())
        values = {'loss': float(nats / tokens)}
        if len(totals) > 1:
            values |= {f'loss/{name}': float(n / t) for name, (n, t) in totals.items()}
        is_text = not any(cache.is_chat for cache in heldout.values())
        if is_text and not self._config.max_batches:
            num_bytes = sum(cache.num_bytes for cache in heldout.values())
            values['bits_per_byte'] = float(nats / math.log(2) / num_bytes)
        if is_text and self._config.xz_baseline:
            values['xz_bits_per_byte'] = self._xz_bits_per_byte
        return values

    def _totals(self, params, cache) -> np.ndarray:
        """[nats, number of targets] of one source's held-out documents."""
        totals = np.zeros(2)
        pending = None
        for batch in self._batches(cache):
            new = self._sums(params, sharding.distribute(batch, self._mesh))
            # Fetch the previous batch only now, so that two batches are in flight.
            totals += 0 if pending is None else jax.device_get(pending)
            pending = new
        return totals if pending is None else totals + jax.device_get(pending)

    def _batches(self, cache) -> Iterator[dict[str, np.ndarray]]:
        """The batches of one source that are read: all, or the first `max_batches`."""
        batches = evaluation_batches(cache, self._length, self._rows, self._config.stride or None)
        return itertools.islice(batches, self._config.max_batches or None)

    @functools.cached_property
    def _xz_bits_per_byte(self) -> float:
        return xz_bits_per_byte(document.text for document in self._dataset.heldout_documents)


def _no_targets(name: str, source: str, cache, max_batches: int) -> str:
    what = (
        f'the batches that are read (max_batches {max_batches})'
        if max_batches
        else f'{cache.num_tokens:,} tokens'
    )
    remedy = f'raise config.evals.{name}.max_batches or ' if max_batches else 'raise '
    reason = ', where only what the assistant says counts' if cache.is_chat else ''
    return (
        f'config.evals.{name}: no token in {what} of the held-out data of {source} counts in the '
        f'loss{reason}; {remedy}the heldout_fraction of the data, or remove config.evals.{name}'
    )


def xz_bits_per_byte(texts: Iterable[str]) -> float:
    """Bits per UTF-8 byte of the concatenated texts compressed with `xz -9e`: a baseline."""
    content = ''.join(texts).encode()
    return 8 * len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)) / len(content)

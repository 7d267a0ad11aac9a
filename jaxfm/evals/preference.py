"""How often the model prefers the better chat of a held-out pair."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxfm import sharding
from jaxfm.data.documents import KIND_NAMES
from jaxfm.data.loader import pad_rows
from jaxfm.data.packing.rows import BestFit
from jaxfm.errors import DataError
from jaxfm.evals import PreferenceEvaluatorConfig, statistics
from jaxfm.evals.base import Context, Periodic
from jaxfm.ops.logprobs import token_logprobs


class HeldOutPreference(Periodic):
    """Ranks the two chats of each of a phase's held-out pairs by the log-probs of their answers.

    Raises:
      DataError: the held-out documents are no pairs, or none fits a row.
    """

    def __init__(self, config: PreferenceEvaluatorConfig, context: Context):
        super().__init__(config.every, config.at_start)
        self._mesh, self._rows = context.mesh, sharding.whole_rows(config.batch_size, context.mesh)
        length = config.sequence_length or context.dataset.sequence_length
        self._packings = {}
        for name, cache in context.dataset.heldout.items():
            if cache.kind != 'pair':
                raise DataError(
                    f'{context.where}: {config.name} ranks pairs of chosen and rejected, but a '
                    f'held-out document of {name} is {KIND_NAMES[cache.kind]}'
                )
            self._packings[name] = BestFit(cache, length, too_long='drop')
            if not self._packings[name].num_rows:
                raise DataError(
                    f'{context.where}: no held-out pair of {name} fits a row of {length} tokens; '
                    f'raise {context.where}.sequence_length'
                )

        def score(params, batch):
            model = context.merge(params)
            hidden, _ = model(batch['tokens'], batch['positions'], batch['segment_ids'])
            logprobs, _ = token_logprobs(hidden, model.unembed(), batch['targets'])
            return jnp.where(batch['loss_mask'] > 0, logprobs, 0.0)

        # Whole on every process.
        self._score = jax.jit(score, out_shardings=NamedSharding(context.mesh, P()))

    def run(self, params, step: int) -> dict[str, float]:
        """{'accuracy', 'mean_accuracy', 'margin', and the ends of their 95 % intervals}.

        A pair is right if the log-prob of the better answer is higher (accuracy), or its mean over
        tokens (mean_accuracy); equal ones are half right. The margin is the difference of the
        log-probs, in nats. 'left_out' is the share of pairs that no row has room for.
        """
        del step
        pairs = np.concatenate([self._pairs(params, each) for each in self._packings.values()])
        # [pairs, 2]: the sum and the mean of the better answer less those of the worse.
        values = {}
        for name, margins in zip(('accuracy', 'mean_accuracy'), pairs.T):
            is_right = (np.sign(margins) + 1) / 2
            values |= statistics.mean(is_right).values(name)
        values |= statistics.mean(pairs[:, 0]).values('margin')
        total = sum(packing.cache.num_documents for packing in self._packings.values())
        return values | {'left_out': 1 - len(pairs) / total}

    def _pairs(self, params, packing: BestFit) -> np.ndarray:
        found = []
        for batch in self._batches(packing):
            placed = sharding.distribute(batch, self._mesh)
            found.append(_margins(batch, jax.device_get(self._score(params, placed))))
        return np.concatenate(found)

    def _batches(self, packing: BestFit) -> Iterator[dict[str, np.ndarray]]:
        for first in range(0, packing.num_rows, self._rows):
            numbers = np.arange(first, min(first + self._rows, packing.num_rows))
            yield pad_rows(packing.rows(numbers), self._rows)


def _margins(batch: dict[str, np.ndarray], logprobs_BT: np.ndarray) -> np.ndarray:
    """[pairs, 2]: sum and mean of the log-probs of the better answer less those of the worse."""
    _, length = batch['pair_ids'].shape
    # Pairs are numbered through all rows.
    pair_BT = batch['pair_ids'] + (length + 1) * np.arange(len(batch['pair_ids']))[:, None]
    sums = []
    for side in (1, -1):
        where = batch['sides'] == side
        count = np.bincount(pair_BT[where], minlength=pair_BT.max() + 1)
        total = np.bincount(pair_BT[where], logprobs_BT[where], minlength=pair_BT.max() + 1)
        sums.append(np.stack([total, total / np.maximum(count, 1)], axis=1))
    is_pair = np.zeros(len(sums[0]), bool)
    is_pair[pair_BT[batch['sides'] == 1]] = True
    return (sums[0] - sums[1])[is_pair]

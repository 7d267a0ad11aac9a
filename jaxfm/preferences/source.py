"""The source of preference learning: batches of chats that are compared, and their reference.

The log-probs of a row under the reference depend on the row alone, so they are computed once and
kept in the work directory. The weights of the reference, those with which the phase begins or those
of another model, are then no longer needed.
"""

import json
import logging
import secrets
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from jaxfm.data.loader import PackedBatches
from jaxfm.data.packing.rows import Packing
from jaxfm.distributed import agree
from jaxfm.objectives import NO_REFERENCE, LoadReference, PreferenceConfig
from jaxfm.preferences.mismatched import mismatched_rows
from jaxfm.storage import whole

log = logging.getLogger('jaxfm')

# Names of arrays that are only for the estimate of the divergence.
_MISMATCHED = 'mismatched/'


class ReferencedRows:
    """The rows of a packing, with their log-probs under the reference.

    Attributes:
      reference: {name of an array in the batch: [num_rows, T]}; empty until it is computed.
    """

    def __init__(self, packing: Packing, has_mismatched: bool):
        self._packing, self._has_mismatched = packing, has_mismatched
        self.name, self.cache = packing.name, packing.cache
        self.num_rows, self.sequence_length = packing.num_rows, packing.sequence_length
        self.fingerprint = packing.fingerprint
        self.reference: dict[str, np.ndarray] = {}

    def rows(self, row_numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The batch of rows with these numbers [n]; all arrays are [n, T]."""
        batch = self._packing.rows(row_numbers)
        if self._has_mismatched:
            other = mismatched_rows(batch)
            batch |= {f'{_MISMATCHED}{name}': array for name, array in other.items()}
        return batch | {name: array[row_numbers] for name, array in self.reference.items()}


class Preferences:
    """Batches of chats that are compared; `jaxfm.train.Source` is its interface.

    Args:
      packings, weights: as in PackedBatches.
      steps: of the phase; rows that it does not reach get no reference.
      rows: the rows of a batch that this process makes.
      put: puts a batch on the devices.
      score: (weights of the reference, batch) -> log-probs [B, T] of the targets, whole on every
        process.
      divergence: (params, batch of mismatched chats) -> [B, T], the same value everywhere.
      reference: loads the weights of the reference.
      path: the file in which its log-probs are kept.

    Raises:
      DataError: a source has no rows.
    """

    bucket = 'data_wait'

    def __init__(
        self,
        packings: Mapping[str, Packing],
        weights: Mapping[str, float],
        objective: PreferenceConfig,
        *,
        batch_size: int,
        seed: int,
        steps: int,
        rows: np.ndarray,
        put: Callable[[dict], dict],
        score: Callable,
        divergence: Callable,
        reference: LoadReference,
        path: Path,
    ):
        self._has_reference = objective.reference != NO_REFERENCE
        self._is_other = objective.names_reference
        self._has_divergence = objective.loss == 'kto'
        self._packings = {
            name: ReferencedRows(packing, self._has_divergence)
            for name, packing in packings.items()
        }
        self._batches = PackedBatches(self._packings, weights, batch_size, seed, rows, put)
        self._rows, self._put, self._steps = rows, put, steps
        self._score, self._divergence = score, divergence
        self._load_reference, self._path = reference, path
        self._origin: dict | None = None  # where the weights of the reference are from
        self._kept = ''  # which file of log-probs this phase began with

    @property
    def tokens(self) -> int:
        """Tokens in the rows of a batch, over all hosts."""
        return self._batches.tokens

    def next(self, params, step: int) -> dict[str, jax.Array]:
        """The next batch, on the devices."""
        batch = self._batches.next(params, step)
        if not self._has_divergence:
            return batch
        other = {n: batch.pop(n) for n in list(batch) if n.startswith(_MISMATCHED)}
        other = {name.removeprefix(_MISMATCHED): array for name, array in other.items()}
        return batch | {'kl': self._divergence(params, other)}

    def prepare(self, params: dict | None) -> None:
        """Computes the log-probs under the reference, or reads those of an earlier process.

        Args:
          params: the weights with which the phase begins, if it begins now.

        Raises RunError if the reference cannot be loaded.
        """
        is_ready = all(packing.reference for packing in self._packings.values())
        if not self._has_reference or (params is None and (is_ready or self._read())):
            return
        if params is None or self._is_other:
            params, self._origin = self._load_reference(self._origin)
        self._compute(params)

    def _compute(self, params: dict) -> None:
        began = time.monotonic()
        wanted = self._batches.rows_of(self._steps)
        for name, packing in self._packings.items():
            packing.reference = self._score_rows(packing, wanted[name], params)
        # A phase that begins again, with other weights, must not find those of its first beginning.
        self._kept = agree.from_primary(lambda: secrets.token_hex(8))
        if agree.is_primary():
            self._write()
        count = sum(map(len, wanted.values()))
        log.info(
            'log-probs of %d rows under the reference: %.1f s', count, time.monotonic() - began
        )

    def _score_rows(self, packing: ReferencedRows, numbers: np.ndarray, params) -> dict:
        """{name in the batch: [num_rows, T]}, 0 in the rows that are not asked for."""
        prefixes = ['', _MISMATCHED] if self._has_divergence else ['']
        shape, size = (packing.num_rows, packing.sequence_length), self._batches.batch_size
        found = {f'{p}reference_logprobs': np.zeros(shape, np.float32) for p in prefixes}
        for first in range(0, len(numbers), size):
            some = numbers[first : first + size]
            padded = np.resize(some, size)  # the last batch repeats its rows
            batch = self._put(packing.rows(padded[self._rows]))
            for prefix in prefixes:
                part = {
                    name.removeprefix(prefix): array
                    for name, array in batch.items()
                    if name.startswith(_MISMATCHED) == bool(prefix)
                }
                scores = jax.device_get(self._score(params, part))
                found[f'{prefix}reference_logprobs'][some] = scores[: len(some)]
        return found

    def _write(self) -> None:
        arrays = {
            f'{source}/{name}': array
            for source, packing in self._packings.items()
            for name, array in packing.reference.items()
        }
        whole.make_directory(self._path.parent)
        with whole.write_file(self._path) as file:
            np.savez(file, about=json.dumps(self._about()), **arrays)

    def _read(self) -> bool:
        """Takes the log-probs from their file, if every process can."""
        try:
            with np.load(self._path) as file:
                is_same = json.loads(str(file['about'])) == self._about()
                arrays = {name: file[name] for name in file.files} if is_same else {}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            arrays = {}
        every = agree.exchange(f'reference/{self._path.name}', str(bool(arrays)))
        # The primary sees all; the others learn from it whether one of them lacks the file.
        is_there = agree.from_primary(lambda: set(every.values()) == {'True'})
        if is_there:
            for source, packing in self._packings.items():
                prefix = f'{source}/'
                packing.reference = {
                    name.removeprefix(prefix): array
                    for name, array in arrays.items()
                    if name.startswith(prefix)
                }
        return is_there

    def _about(self) -> dict:
        """What the log-probs in the file are of."""
        return {'kept': self._kept, 'steps': self._steps, 'data': self._batches.identity()}

    def progress(self) -> dict[str, float]:
        """{name of a metric: value} of what has been delivered."""
        return self._batches.progress()

    def get_state(self) -> dict:
        """The position, what it is a position in, and the reference, as JSON."""
        about = {'reference': self._origin, 'kept': self._kept}
        return self._batches.get_state() | about

    def set_state(self, state: dict) -> None:
        """Continues from a state. Raises ConfigError if it is a position in other data."""
        self._batches.set_state(position_in_data(state))
        self._origin, self._kept = state.get('reference'), state.get('kept', '')

    def close(self) -> None:
        """Ends the thread that makes batches."""
        self._batches.close()


def position_in_data(state: dict) -> dict:
    """The part of a source's state that `jaxfm.data.loader` understands."""
    return {key: value for key, value in state.items() if key not in ('reference', 'kept')}

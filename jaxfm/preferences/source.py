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
from jaxfm.errors import DataError
from jaxfm.objectives import NO_REFERENCE, LoadReference, PreferenceConfig
from jaxfm.preferences.mismatched import mismatched_rows
from jaxfm.storage import whole

log = logging.getLogger('jaxfm')

# Names of arrays that are only for the estimate of the divergence.
_MISMATCHED = 'mismatched/'
# In the file: which rows have log-probs.
_SCORED = 'is_scored'


class ReferencedRows:
    """The rows of a packing, with their log-probs under the reference.

    Attributes:
      reference: {name of an array in the batch: [num_rows, T]}; empty until some are computed.
      is_scored: [num_rows], which rows have them.
    """

    def __init__(self, packing: Packing, has_mismatched: bool):
        self._packing, self._has_mismatched = packing, has_mismatched
        self.name, self.cache = packing.name, packing.cache
        self.num_rows, self.sequence_length = packing.num_rows, packing.sequence_length
        self.fingerprint = packing.fingerprint
        self.reference: dict[str, np.ndarray] = {}
        self.is_scored = np.zeros(packing.num_rows, bool)

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
      last: the step of the run at which the phase ends.
      has_skips: whether the phase may leave out rows, so that any row may be reached.
      rows: the rows of a batch that this process makes.
      put: puts a batch on the devices.
      score: (weights of the reference, batch) -> log-probs [B, T] of the targets, whole on every
        process.
      divergence: (params, batch of mismatched chats) -> [B, T], the same value everywhere.
      reference: loads the weights of the reference.
      origin: tells where the weights with which the phase begins are from, as `reference` does.
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
        last: int,
        has_skips: bool,
        rows: np.ndarray,
        put: Callable[[dict], dict],
        score: Callable,
        divergence: Callable,
        reference: LoadReference,
        origin: Callable[[], dict | None],
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
        self._rows, self._put = rows, put
        self._num_rows, self._last, self._has_skips = steps * batch_size, last, has_skips
        self._score, self._divergence = score, divergence
        self._load_reference, self._first_origin, self._path = reference, origin, path
        self._origin: dict | None = None  # where the weights of the reference are from
        self._is_complete = False  # whether every row up to the end has its reference
        # The name of this beginning, as the file of its log-probs tells it; and that of those here.
        self._kept = self._in_memory = ''

    @property
    def tokens(self) -> int:
        """Tokens in the rows of a batch, over all hosts."""
        return self._batches.tokens

    def next(self, params, step: int) -> dict[str, jax.Array]:
        """The next batch, on the devices."""
        if self._has_reference and not self._is_complete:
            # More than was foreseen, if the size of a batch has changed, or the number of steps.
            with jax.transfer_guard('allow'):
                left = (self._last - step) * self._batches.batch_size
                self._complete(self._batches.next_row + left)
            self._is_complete = True
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

        Raises:
          RunError: the reference cannot be loaded.
          DataError: no row has two documents, as loss kto needs them.
        """
        if not self._has_reference:
            return
        if params is not None:
            self._begin()
            if self._is_other:
                params = None  # those of the other model are loaded
            else:
                self._origin = self._first_origin()
            self._complete(self._num_rows, params)
        elif not self._kept_is_here and not self._read():
            self._begin()
            self._complete(self._num_rows)

    def _begin(self) -> None:
        """Forgets all log-probs: those to come are of other weights, or of other data.

        A phase that begins again, with other weights, must not find those of its first beginning.
        """
        self._kept = self._in_memory = agree.from_primary(lambda: secrets.token_hex(8))
        for packing in self._packings.values():
            packing.reference, packing.is_scored[:] = {}, False

    def _complete(self, num_rows: int, params: dict | None = None) -> None:
        """Computes those log-probs of the first `num_rows` rows of all that are not there yet.

        params: the weights of the reference; None loads them, if they are needed.
        """
        began = time.monotonic()
        wanted = self._batches.rows_of(num_rows)
        if self._has_skips:
            wanted = {name: np.arange(each.num_rows) for name, each in self._packings.items()}
        lacking = {n: rows[~self._packings[n].is_scored[rows]] for n, rows in wanted.items()}
        count = sum(map(len, lacking.values()))
        is_first = not any(packing.is_scored.any() for packing in self._packings.values())
        if count:
            if params is None:
                params, self._origin = self._load_reference(self._origin)
            empty = sum(
                self._score_rows(self._packings[name], numbers, params)
                for name, numbers in lacking.items()
            )
            if empty:
                self._tell_of_lone_documents(empty, count, is_first)
            if agree.is_primary():
                self._write()
            seconds = time.monotonic() - began
            log.info('log-probs of %d rows under the reference: %.1f s', count, seconds)

    def _tell_of_lone_documents(self, empty: int, count: int, is_first: bool) -> None:
        """Says how many rows have no mismatched answers.

        is_first: no others have been computed. Then it raises DataError if none has some.
        """
        told = f'{empty} of {count} rows hold one document, and tell nothing of the divergence'
        length = self._batches.sequence_length
        remedy = f'raise config.data.sequence_length, which is {length}'
        if is_first and empty == count:
            raise DataError(f'{told}: {remedy}')
        log.warning('%s; %s, to have fewer of them', told, remedy)

    def _score_rows(self, packing: ReferencedRows, numbers: np.ndarray, params) -> int:
        """Computes the log-probs of the rows with these numbers.

        Returns how many of them are without mismatched answers, although they should have some.
        """
        prefixes = ['', _MISMATCHED] if self._has_divergence else ['']
        shape, size = (packing.num_rows, packing.sequence_length), self._batches.batch_size
        found = {f'{p}reference_logprobs': np.zeros(shape, np.float32) for p in prefixes}
        found |= packing.reference
        packing.reference = {}  # not part of the batches below
        empty = 0
        for first in range(0, len(numbers), size):
            some = numbers[first : first + size]
            if self._has_divergence:
                segments = packing.rows(some)[f'{_MISMATCHED}segment_ids']
                empty += int((segments.max(axis=1) == 0).sum())
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
        packing.reference = found
        packing.is_scored[numbers] = True
        return empty

    @property
    def _kept_is_here(self) -> bool:
        """Whether the log-probs in memory are those that this phase began with."""
        return bool(self._kept) and self._kept == self._in_memory

    def _write(self) -> None:
        arrays = {
            f'{source}/{name}': array
            for source, packing in self._packings.items()
            for name, array in [*packing.reference.items(), (_SCORED, packing.is_scored)]
        }
        whole.make_directory(self._path.parent)
        with whole.write_file(self._path) as file:
            np.savez(file, about=json.dumps(self._about()), **arrays)

    def _read(self) -> bool:
        """Takes the log-probs from their file, if every process can."""
        try:
            with open(self._path, 'rb') as opened, np.load(opened) as file:
                is_same = json.loads(str(file['about'])) == self._about()
                arrays = {name: file[name] for name in file.files} if is_same else {}
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            arrays = {}
        every = agree.exchange(f'reference/{self._path.name}', str(bool(arrays)))
        # The primary sees all; the others learn from it whether one of them lacks the file.
        is_there = agree.from_primary(lambda: set(every.values()) == {'True'})
        if is_there:
            self._in_memory = self._kept
            for source, packing in self._packings.items():
                prefix = f'{source}/'
                packing.reference = {
                    name.removeprefix(prefix): array
                    for name, array in arrays.items()
                    if name.startswith(prefix)
                }
                packing.is_scored = packing.reference.pop(_SCORED)
        return is_there

    def _about(self) -> dict:
        """What the log-probs in the file are of."""
        rows = {name: packing.num_rows for name, packing in self._packings.items()}
        return {'kept': self._kept, 'rows': rows, 'data': self._batches.identity()}

    def progress(self) -> dict[str, float]:
        """{name of a metric: value} of what has been delivered."""
        return self._batches.progress()

    def get_state(self) -> dict:
        """The position, what it is a position in, and the reference, as JSON."""
        about = {'reference': self._origin, 'kept': self._kept}
        return self._batches.get_state() | about

    def set_state(self, state: dict) -> None:
        """Continues from a state. Raises ConfigError if it is a position in other data."""
        # Also if the data differs: then its log-probs are computed, with the same weights.
        self._origin, self._kept, self._is_complete = state.get('reference'), '', False
        self._batches.set_state(position_in_data(state))
        self._kept = state.get('kept', '')

    def close(self) -> None:
        """Ends the thread that makes batches."""
        self._batches.close()


def position_in_data(state: dict) -> dict:
    """The part of a source's state that `jaxfm.data.loader` understands."""
    return {key: value for key, value in state.items() if key not in ('reference', 'kept')}

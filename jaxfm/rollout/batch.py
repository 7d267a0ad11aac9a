"""Packs samples into the rows of a batch."""

import dataclasses

import numpy as np

from jaxfm.data.packing import best_fit

# What the objective reads of a sample (`jaxfm.objectives.policy_gradient`), besides the tokens.
DTYPES = {
    'tokens': np.int32,
    'targets': np.int32,
    'positions': np.int32,
    'segment_ids': np.int32,
    'loss_mask': np.float32,
    'advantages': np.float32,
    'lengths': np.float32,
    'sampler_logprobs': np.float32,
}


@dataclasses.dataclass(frozen=True)
class Sample:
    """A completion to learn from, with its advantage; others may have written parts of it."""

    prompt: list[int]  # ids
    completion: list[int]  # ids
    # Of the ids of the completion, when they were sampled; None for those that others wrote.
    logprobs: list[float | None]
    advantage: float
    is_learned: bool = True  # False: it is in the batch, but counts for nothing

    @property
    def length(self) -> int:
        """The inputs that it has in a row: all ids but the last, which is only a target."""
        return len(self.prompt) + len(self.completion) - 1


def num_rows(longest: int, samples: int, sequence_length: int) -> int:
    """Rows that hold any `samples` samples of at most `longest` inputs each."""
    return -(-samples // (sequence_length // longest))


def make_batch(
    samples: list[Sample],
    batch_size: int,
    sequence_length: int,
    *,
    one_each: bool = False,
    microbatches: int = 1,
) -> dict[str, np.ndarray]:
    """The batch [batch_size, T] of these samples; padding is 0 in all arrays.

    Args:
      one_each: one sample per row.
      microbatches: into how many the step splits the batch. Filled rows go to the first ones, so
        that the others are empty and can be left out.
    """
    lengths = np.array([sample.length for sample in samples], np.int64)
    if one_each:
        order, offsets = np.arange(len(samples)), np.arange(len(samples) + 1)
    else:
        order, offsets = best_fit.pack(lengths, sequence_length)
    shape = (batch_size, sequence_length)
    batch = {name: np.zeros(shape, dtype) for name, dtype in DTYPES.items()}
    for number, row in enumerate(_row_order(batch_size, microbatches)[: len(offsets) - 1]):
        start = 0
        members = order[offsets[number] : offsets[number + 1]]
        for segment, member in enumerate(members, start=1):
            sample = samples[member]
            place = row, slice(start, start + sample.length)
            _write(sample, segment, {name: array[place] for name, array in batch.items()})
            start += sample.length
    return batch


def _row_order(batch_size: int, microbatches: int) -> np.ndarray:
    """The rows of the first microbatch, then those of the second, and so on.

    Row r belongs to microbatch r % microbatches (`jaxfm.state`).
    """
    return np.arange(batch_size).reshape(-1, microbatches).T.reshape(-1)


def _write(sample: Sample, segment: int, out: dict[str, np.ndarray]) -> None:
    """Writes a sample into its slots, views of the batch's arrays."""
    ids = [*sample.prompt, *sample.completion]
    out['tokens'][:], out['targets'][:] = ids[:-1], ids[1:]
    out['positions'][:] = np.arange(sample.length)
    out['segment_ids'][:] = segment
    if sample.is_learned:
        first = len(sample.prompt) - 1  # the last id of the prompt predicts the first sampled one
        places = first + np.flatnonzero([logprob is not None for logprob in sample.logprobs])
        out['loss_mask'][places] = 1
        out['advantages'][places] = sample.advantage
        out['lengths'][places] = len(places)
        out['sampler_logprobs'][places] = [x for x in sample.logprobs if x is not None]

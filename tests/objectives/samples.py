"""The samples of tests/goldens/policy_gradient, laid out in the rows of a batch."""

import dataclasses

import numpy as np

from tests.models.goldens import Golden

GOLDEN = Golden('policy_gradient')
ROWS, LENGTH = 8, 20


@dataclasses.dataclass
class Samples:
    """N samples of at most L tokens each, after a prompt; arrays are [N, L] or [N]."""

    mask: np.ndarray  # the tokens that the policy sampled
    policy: np.ndarray
    sampler: np.ndarray
    old: np.ndarray
    reference: np.ndarray
    advantages: np.ndarray  # [N]
    prompt_lengths: np.ndarray  # [N]
    lengths: np.ndarray  # [N]: with the tokens of tools

    def pack(self, rows: int = ROWS, length: int = LENGTH) -> 'Packed':
        """Several samples a row, or one in each of N rows."""
        count, most = self.mask.shape
        segment_ids = np.zeros((rows, length), np.int32)
        positions = np.zeros((rows, length), np.int32)
        row = np.zeros((count, most), np.int32)
        column = np.zeros((count, most), np.int32)
        ends, alone = np.zeros(rows, np.int32), rows == count
        for i in range(count):
            size = self.prompt_lengths[i] + self.lengths[i] - 1  # of the inputs, or the targets
            r = i if alone else int(np.argmax(ends + size <= length))
            start, ends[r] = ends[r], ends[r] + size
            assert ends[r] <= length
            segment_ids[r, start : ends[r]] = segment_ids[r].max() + 1
            positions[r, start : ends[r]] = np.arange(size)
            row[i] = r
            column[i] = np.minimum(start + self.prompt_lengths[i] - 1 + np.arange(most), length - 1)
        return Packed(self, segment_ids, positions, row, column)


@dataclasses.dataclass
class Packed:
    """Where each token of the samples is in a batch."""

    samples: Samples
    segment_ids: np.ndarray
    positions: np.ndarray
    row: np.ndarray  # [N, L]
    column: np.ndarray

    def spread(self, values, elsewhere=np.nan):
        """Values [N, L] or [N] of samples -> [B, T], with nonsense at prompts and padding."""
        mask = self.samples.mask > 0
        values = values if values.ndim == 2 else np.repeat(values[:, None], mask.shape[1], 1)
        result = np.full(self.segment_ids.shape, elsewhere, np.float32)
        result[self.row[mask], self.column[mask]] = values[mask]
        return result

    def collect(self, values):
        """Values [B, T] -> [N, L], 0 where a sample has no token; all others must be 0."""
        values = np.asarray(values)
        result = np.where(self.samples.mask > 0, values[self.row, self.column], 0.0)
        assert np.count_nonzero(values) == np.count_nonzero(result)
        return result

    def batch(self) -> dict[str, np.ndarray]:
        """What the objective gets, but for the policy's log-probs."""
        samples = self.samples
        ids = np.arange(self.segment_ids.size, dtype=np.int32).reshape(self.segment_ids.shape)
        return {
            'tokens': ids * 5 % 23,
            'targets': ids * 7 % 23,
            'segment_ids': self.segment_ids,
            'positions': self.positions,
            'loss_mask': self.spread(samples.mask, 0.0),
            'lengths': self.spread(samples.mask.sum(1), 0.0),
            'advantages': self.spread(samples.advantages),
            'sampler_logprobs': self.spread(samples.sampler),
            'old_logprobs': self.spread(samples.old),
            'reference_logprobs': self.spread(samples.reference),
        }


def golden_samples(advantages, *, tools: bool = True, apart: bool = True) -> Samples:
    """The samples with these advantages.

    Args:
      tools: tokens of tools are not samples.
      apart: the sampler's log-probs differ from the old ones.
    """
    arrays = GOLDEN.arrays
    most = arrays['policy'].shape[1]
    mask = (np.arange(most) < arrays['lengths'][:, None]).astype(np.int32)
    return Samples(
        mask=mask * arrays['tool_mask'] if tools else mask,
        policy=arrays['policy'],
        sampler=arrays['sampler' if apart else 'old'],
        old=arrays['old'],
        reference=arrays['reference'],
        advantages=np.asarray(advantages, np.float32).ravel(),
        prompt_lengths=arrays['prompt_lengths'],
        lengths=arrays['lengths'],
    )

import dataclasses
import time

import numpy as np
import pytest

from jaxfm.data import packing
from jaxfm.errors import DataError


@dataclasses.dataclass
class Stream:
    """What packing reads of a cache."""

    tokens: np.ndarray
    offsets: np.ndarray
    vocab_size: int = 2048
    path: str = 'train.tokens'

    @property
    def num_tokens(self):
        return len(self.tokens)

    @property
    def num_documents(self):
        return len(self.offsets) - 1


def stream(lengths, seed=0):
    """Random tokens in documents of these lengths."""
    tokens = np.random.default_rng(seed).integers(2, 2048, sum(lengths)).astype(np.uint16)
    return Stream(tokens, np.concatenate([[0], np.cumsum(lengths)]))


def all_rows(cache, length):
    return packing.rows(cache, length * np.arange(packing.num_rows(cache, length)), length)


def by_hand(cache, start, length):
    """One row, token by token."""
    row = {name: [] for name in ('tokens', 'targets', 'positions', 'segment_ids', 'loss_mask')}
    document = first = None
    for where in range(start, start + length):
        if where >= cache.num_tokens:
            values = 0, 0, 0, 0, 0
        else:
            here = max(d for d in range(cache.num_documents) if cache.offsets[d] <= where)
            if here != document:
                document, first = here, where
            segment = row['segment_ids'][-1] + (where == first) if row['tokens'] else 1
            last = where + 1 == cache.offsets[here + 1]
            target = 0 if last else cache.tokens[where + 1]
            values = cache.tokens[where], target, where - first, segment, not last
        for name, value in zip(row, values):
            row[name].append(value)
    return row


LENGTHS = [5, 2, 2, 31, 1, 16, 8, 64, 3, 7, 2]


@pytest.mark.parametrize('length', [2, 3, 8, 16, 141, 200])
def test_rows_are_those_made_token_by_token(length):
    cache = stream(LENGTHS)
    batch = all_rows(cache, length)
    for row in range(packing.num_rows(cache, length)):
        expected = by_hand(cache, row * length, length)
        for name, values in expected.items():
            np.testing.assert_array_equal(batch[name][row], values, err_msg=name)


def test_rows_one_after_the_other_are_the_stream(small_corpus):
    cache = small_corpus.train
    batch = all_rows(cache, 32)
    inside = batch['segment_ids'] > 0
    np.testing.assert_array_equal(batch['tokens'][inside], cache.tokens)
    assert not batch['tokens'][~inside].any() and not batch['loss_mask'][~inside].any()
    assert inside.sum() == cache.num_tokens and 0 < (~inside).sum() < 32


def test_every_token_but_the_first_of_a_document_is_a_target_once(small_corpus):
    cache, tokenizer = small_corpus.train, small_corpus.tokenizer
    batch = all_rows(cache, 32)
    targets = batch['targets'][batch['loss_mask'] == 1]
    tokens = np.asarray(cache.tokens)
    np.testing.assert_array_equal(targets, tokens[tokens != tokenizer.bos_id])
    # The last input of a document learns nothing; the target before it is the end.
    assert not batch['loss_mask'][batch['tokens'] == tokenizer.eos_id].any()
    assert (targets == tokenizer.eos_id).sum() == cache.num_documents


def test_no_target_crosses_a_document(small_corpus):
    batch = all_rows(small_corpus.train, 32)
    same = batch['segment_ids'][:, 1:] == batch['segment_ids'][:, :-1]
    learned = batch['loss_mask'][:, :-1] == 1
    assert same[learned].all()
    follows = batch['targets'][:, :-1] == batch['tokens'][:, 1:]
    assert follows[learned].all()


def test_positions_and_segments_restart_in_every_row(small_corpus):
    batch = all_rows(small_corpus.train, 32)
    assert (batch['positions'][:, 0] == 0).all() and (batch['segment_ids'][:, 0] == 1).all()
    segments, positions = batch['segment_ids'][:-1], batch['positions'][:-1]
    new = np.diff(segments) == 1
    assert ((np.diff(segments) == 0) | new).all()
    assert (positions[:, 1:][new] == 0).all()
    assert (np.diff(positions)[~new] == 1).all()


def test_arrays_have_the_dtypes_of_a_batch(small_corpus):
    batch = packing.rows(small_corpus.train, np.array([0, 7]), 32)
    dtypes = {name: array.dtype.name for name, array in batch.items()}
    integers = dict.fromkeys(('tokens', 'targets', 'positions', 'segment_ids'), 'int32')
    assert dtypes == integers | {'loss_mask': 'float32'}
    assert all(array.shape == (2, 32) for array in batch.values())


def test_a_token_outside_the_vocabulary_is_an_error_and_not_an_index():
    cache = stream(LENGTHS)
    cache.tokens[17] = 2048
    with pytest.raises(DataError, match='token 2048 of 2048'):
        all_rows(cache, 16)


def test_a_batch_takes_less_than_a_millisecond_a_row():
    cache = stream(np.random.default_rng(0).integers(2, 20_000, 500))
    starts = np.random.default_rng(0).integers(0, cache.num_tokens, (20, 16))
    seconds = []
    for batch in starts:
        began = time.perf_counter()
        packing.rows(cache, batch, 128)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 16e-3

import json

import numpy as np
import pytest

from jaxfm.data import loader, packing
from jaxfm.errors import ConfigError


@pytest.fixture
def batches(small_corpus):
    """Makes a source of 6 rows of 32 tokens over the train side."""

    def make(rows=None, seed=3, sequence_length=32, batch_size=6, cache=None):
        cache = cache or small_corpus.train
        return loader.PackedBatches(cache, sequence_length, batch_size, seed, rows)

    return make


def take(source, count):
    return [source.next(None, step) for step in range(count)]


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others):
        assert batch.keys() == other.keys()
        for name, array in batch.items():
            np.testing.assert_array_equal(array, other[name])


def test_an_epoch_has_every_row_once_and_the_next_one_in_another_order(batches, small_corpus):
    rows = packing.num_rows(small_corpus.train, 32)
    source = batches(batch_size=1)
    epochs = [[batch['tokens'].tobytes() for batch in take(source, rows)] for _ in range(2)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])
    in_order = packing.rows(small_corpus.train, 32 * np.arange(rows), 32)['tokens']
    assert sorted(epochs[0]) == sorted(row.tobytes() for row in in_order)


def test_the_seed_decides_the_order(batches):
    assert_equal(take(batches(seed=3), 4), take(batches(seed=3), 4))
    first, other = take(batches(seed=3), 1)[0], take(batches(seed=4), 1)[0]
    assert (first['tokens'] != other['tokens']).any()


@pytest.mark.parametrize('seed', [-1, 2**32, 2**63])
def test_any_integer_is_a_seed(batches, seed):
    assert_equal(take(batches(seed=seed), 1), take(batches(seed=seed), 1))


def test_resumed_equals_straight_over_an_epoch_end(batches, small_corpus):
    total = packing.num_rows(small_corpus.train, 32) // 6 + 8
    straight = take(batches(), total)
    for stop in (0, 1, total // 2, total - 3):
        source = batches()
        take(source, stop)
        resumed = batches()
        resumed.set_state(json.loads(json.dumps(source.get_state())))
        assert_equal(take(resumed, total - stop), straight[stop:])


def test_any_number_of_processes_makes_the_same_global_batches(batches):
    straight = take(batches(), 9)
    state = None
    for processes, steps in ((1, range(0, 3)), (3, range(3, 5)), (2, range(5, 9))):
        sources = [batches(rows=rows) for rows in np.split(np.arange(6), processes)]
        for source in sources:
            if state:
                source.set_state(state)
        for step in steps:
            parts = [source.next(None, step) for source in sources]
            whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            assert_equal([whole], [straight[step]])
        states = [source.get_state() for source in sources]
        state = states[0]
        assert all(other == state for other in states)


def test_a_row_does_not_depend_on_the_batch_it_is_in(batches):
    wide = np.concatenate([batch['tokens'] for batch in take(batches(batch_size=12), 3)])
    narrow = np.concatenate([batch['tokens'] for batch in take(batches(batch_size=4), 9)])
    np.testing.assert_array_equal(wide, narrow)


@pytest.mark.parametrize(
    'change, named', [({'seed': 4}, 'seed'), ({'sequence_length': 16}, 'sequence_length')]
)
def test_a_state_of_other_rows_is_refused(batches, change, named):
    with pytest.raises(ConfigError, match=named):
        batches(**change).set_state(batches().get_state())


def test_a_state_of_another_corpus_is_refused(batches):
    state = batches().get_state() | {'fingerprint': 'other'}
    with pytest.raises(ConfigError, match='data changed .* fingerprint .* was other'):
        batches().set_state(state)


@pytest.mark.parametrize('stride', [None, 32, 31, 16, 7, 1])
def test_every_heldout_target_counts_once(small_corpus, stride):
    cache = small_corpus.heldout
    tokens = np.asarray(cache.tokens, np.int64)
    counted = []
    for batch in loader.evaluation_batches(cache, 32, 4, stride):
        assert all(array.shape == (4, 32) for array in batch.values())
        counted.append(batch['targets'][batch['loss_mask'] == 1])
    expected = tokens[tokens != small_corpus.tokenizer.bos_id]
    # In order: rows follow the stream, and of a later row only its last targets are new.
    np.testing.assert_array_equal(np.concatenate(counted), expected)


def test_with_a_stride_a_counted_target_has_all_the_context_there_is(small_corpus):
    stride, length = 8, 32
    batches = list(loader.evaluation_batches(small_corpus.heldout, length, 4, stride))
    rows = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    _, column = np.nonzero(rows['loss_mask'][1:])
    position = rows['positions'][1:][rows['loss_mask'][1:] == 1]
    segment = rows['segment_ids'][1:][rows['loss_mask'][1:] == 1]
    in_first = segment == 1
    assert in_first.any() and (position[in_first] == column[in_first]).all()
    assert (column >= length - stride).all()


def test_a_cache_shorter_than_a_row_is_one_padded_batch(small_corpus):
    cache = small_corpus.heldout
    (batch,) = loader.evaluation_batches(cache, cache.num_tokens + 5, 3)
    assert batch['loss_mask'].sum() == cache.num_tokens - cache.num_documents
    assert not batch['segment_ids'][1:].any() and not batch['segment_ids'][0, -5:].any()


@pytest.mark.parametrize('stride', [-1, 33])
def test_a_stride_that_would_skip_targets_is_refused(small_corpus, stride):
    with pytest.raises(ConfigError, match='stride'):
        next(loader.evaluation_batches(small_corpus.heldout, 32, 4, stride))

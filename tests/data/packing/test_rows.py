import time

import numpy as np
import pytest

from jaxfm.data import BatchConfig
from jaxfm.data.packing import best_fit, rows
from jaxfm.data.packing.rows import BestFit, Concat, OneEach, make_packing
from jaxfm.errors import ConfigError, DataError
from tests.data.streams import BOS, EOS, stream

LENGTHS = [5, 2, 2, 31, 7, 16, 8, 64, 3, 7, 2]
NAMES = ('tokens', 'targets', 'positions', 'segment_ids', 'loss_mask')
KINDS = {'concat': Concat, 'best_fit': BestFit, 'none': OneEach}


@pytest.fixture
def make(tmp_path):
    """Makes a stream whose index is kept in the test's directory."""
    return lambda lengths=LENGTHS, **kwargs: stream(lengths, tmp_path, **kwargs)


def short_lengths(number, longest, seed=0):
    return np.random.default_rng(seed).integers(2, longest + 1, number)


def all_rows(packed):
    return packed.rows(np.arange(packed.num_rows))


def pieces_of(batch):
    """Yields {name: array} of every segment of every row."""
    for row in range(len(batch['tokens'])):
        segments = batch['segment_ids'][row]
        for segment in range(1, segments.max() + 1):
            yield {name: array[row][segments == segment] for name, array in batch.items()}


def by_hand(cache, start, length):
    """One row of the stream, computed token by token."""
    row = {name: [] for name in NAMES}
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
            counts = not last and (cache.mask is None or cache.mask[where + 1])
            values = cache.tokens[where], target, where - first, segment, counts
        for name, value in zip(row, values):
            row[name].append(value)
    return row


@pytest.mark.parametrize('is_chat', [False, True], ids=['text', 'chat'])
@pytest.mark.parametrize('dtype', [np.uint16, np.uint32])
@pytest.mark.parametrize('length', [2, 3, 8, 16, 147, 200])
def test_rows_of_the_stream_are_those_made_token_by_token(make, length, dtype, is_chat):
    cache = make(dtype=dtype, is_chat=is_chat)
    packed = Concat(cache, length)
    batch = all_rows(packed)
    for row in range(packed.num_rows):
        expected = by_hand(cache, row * length, length)
        for name, values in expected.items():
            np.testing.assert_array_equal(batch[name][row], values, err_msg=name)


def test_rows_of_the_stream_may_begin_anywhere(make):
    cache = make()
    starts = np.array([3, 140, 0, 146, 147, 500])
    batch = Concat(cache, 16).rows_from(starts)
    for row, start in enumerate(starts):
        for name, values in by_hand(cache, start, 16).items():
            np.testing.assert_array_equal(batch[name][row], values, err_msg=name)


@pytest.mark.parametrize('kind', KINDS)
def test_rows_do_not_depend_on_the_rest_of_their_batch(make, kind, monkeypatch):
    packed = KINDS[kind](make(short_lengths(60, 24)), 32)
    together = all_rows(packed)
    order = np.random.default_rng(0).permutation(packed.num_rows)
    monkeypatch.setattr(rows, 'FILLED_AT_ONCE', 96)
    shuffled = packed.rows(order)
    for name in NAMES:
        np.testing.assert_array_equal(shuffled[name], together[name][order])
        np.testing.assert_array_equal(packed.rows(order[:1])[name], together[name][order[:1]])


@pytest.mark.parametrize('kind', KINDS)
def test_every_token_except_the_first_of_a_text_is_a_target_once(make, kind):
    cache = make()
    batch = all_rows(KINDS[kind](cache, 16))
    targets = batch['targets'][batch['loss_mask'] == 1]
    expected = cache.tokens[cache.tokens != BOS]
    np.testing.assert_array_equal(np.sort(targets), np.sort(expected))
    assert not batch['loss_mask'][batch['tokens'] == EOS].any()


@pytest.mark.parametrize('kind', KINDS)
def test_no_target_crosses_a_document(make, kind):
    batch = all_rows(KINDS[kind](make(short_lengths(200, 20)), 32))
    learned = batch['loss_mask'][:, :-1] == 1
    same = batch['segment_ids'][:, 1:] == batch['segment_ids'][:, :-1]
    follows = batch['targets'][:, :-1] == batch['tokens'][:, 1:]
    assert same[learned].all() and follows[learned].all()


@pytest.mark.parametrize('kind', KINDS)
def test_positions_count_from_the_beginning_of_every_segment(make, kind):
    batch = all_rows(KINDS[kind](make(short_lengths(200, 20)), 32))
    for piece in pieces_of(batch):
        np.testing.assert_array_equal(piece['positions'], np.arange(len(piece['tokens'])))
    padding = batch['segment_ids'] == 0
    assert not any(batch[name][padding].any() for name in NAMES)
    # All padding is at the end of a row.
    assert (np.diff(padding.astype(int)) >= 0).all()


@pytest.mark.parametrize('kind', ['best_fit', 'none'])
def test_documents_that_fit_a_row_are_never_cut(make, kind):
    cache = make(short_lengths(300, 32), is_chat=True)
    packed = KINDS[kind](cache, 32)
    found = sorted(
        (piece['tokens'].tobytes(), piece['loss_mask'].sum())
        for piece in pieces_of(all_rows(packed))
    )
    documents = [
        (cache.tokens[a:b].astype(np.int32).tobytes(), cache.mask[a:b].sum())
        for a, b in zip(cache.offsets, cache.offsets[1:])
    ]
    assert found == sorted(documents)
    assert packed.statistics['cut_documents'] == 0
    assert kind == 'best_fit' or packed.num_rows == cache.num_documents


def test_a_target_counts_if_its_own_token_is_in_the_mask(make):
    cache = make(is_chat=True)
    batch = all_rows(BestFit(cache, 64))
    assert batch['loss_mask'].sum() == cache.mask.sum()
    counted = batch['targets'][batch['loss_mask'] == 1]
    np.testing.assert_array_equal(np.sort(counted), np.sort(cache.tokens[cache.mask == 1]))


@pytest.mark.parametrize('kind', ['best_fit', 'none'])
def test_a_text_longer_than_a_row_is_cut_into_full_rows_first(make, kind):
    cache = make([40, 3, 33])
    packed = KINDS[kind](cache, 16)
    lengths = sorted(len(piece['tokens']) for piece in pieces_of(all_rows(packed)))
    # The last token of 33 would be a piece without a target, so it is in no row.
    assert lengths == [3, 8, 16, 16, 16, 16]
    assert packed.statistics['cut_documents'] == 2
    assert packed.num_rows == (5 if kind == 'best_fit' else 6)


@pytest.mark.parametrize('kind', [BestFit, OneEach])
def test_a_chat_longer_than_a_row_is_an_error_that_says_what_to_change(make, kind):
    with pytest.raises(DataError) as error:
        kind(make(is_chat=True), 16)
    message = str(error.value)
    assert '2 of 11 chats' in message and 'longest has 64' in message
    assert 'config.data.sequence_length=64' in message and 'config.data.too_long' in message


@pytest.mark.parametrize('kind', [BestFit, OneEach])
def test_a_chat_that_truncation_leaves_without_targets_is_dropped(make, kind):
    cache = make([20, 30, 10], is_chat=True)
    cache.mask = np.zeros(60, np.uint8)
    cache.mask[[16, 20 + 17, 55]] = 1  # the target of the 16th input, one too late, one in a row
    packed = kind(cache, 16, 'truncate')
    assert packed.statistics['truncated_documents'] == 1
    assert packed.statistics['dropped_documents'] == 1
    assert sorted(len(piece['tokens']) for piece in pieces_of(all_rows(packed))) == [10, 16]
    assert all_rows(packed)['loss_mask'].sum() == 2


@pytest.mark.parametrize('kind', [BestFit, OneEach])
def test_a_chat_longer_than_a_row_is_dropped_or_truncated(make, kind):
    cache = make(is_chat=True)
    dropped, truncated = kind(cache, 16, 'drop'), kind(cache, 16, 'truncate')
    assert dropped.statistics['dropped_documents'] == 2
    assert truncated.statistics['truncated_documents'] == 2
    assert truncated.statistics['truncated_tokens'] == (31 - 16) + (64 - 16)
    dropped = [piece['tokens'] for piece in pieces_of(all_rows(dropped))]
    truncated = [piece['tokens'] for piece in pieces_of(all_rows(truncated))]
    assert len(dropped) == 9 and len(truncated) == 11
    assert sorted(map(len, truncated)) == sorted(np.minimum(LENGTHS, 16))
    begins = {cache.tokens[a : a + 16].astype(np.int32).tobytes() for a in cache.offsets[:-1]}
    assert all(piece.tobytes() in begins for piece in truncated if len(piece) == 16)


def naive_best_fit(lengths, capacity):
    rows = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= capacity]
        if not fitting:
            rows.append(fitting := [])
        else:
            fitting = max(fitting, key=sum)
        fitting.append(length)
    return rows


@pytest.mark.parametrize('seed', range(20))
def test_best_fit_equals_the_textbook_algorithm(seed):
    draw = np.random.default_rng(seed)
    capacity = int(draw.integers(2, 40))
    lengths = draw.integers(1, capacity + 1, draw.integers(1, 300))
    row_of, num_rows = best_fit.best_fit_decreasing(lengths, capacity)
    assert num_rows == row_of.max() + 1
    # Which of two equally full rows is taken does not matter.
    filled = np.bincount(row_of, lengths)
    assert sorted(filled) == sorted(map(sum, naive_best_fit(lengths, capacity)))


def test_packing_efficiency_is_the_share_of_slots_that_hold_a_token(make):
    cache = make(short_lengths(2000, 100))
    for kind in KINDS.values():
        packed = kind(cache, 128)
        inside = (all_rows(packed)['segment_ids'] > 0).mean()
        assert packed.statistics['packing_efficiency'] == pytest.approx(inside)
    assert BestFit(cache, 128).statistics['packing_efficiency'] > 0.99
    assert OneEach(cache, 128).statistics['packing_efficiency'] < 0.5


def test_best_fit_in_groups_packs_every_document_once(make, monkeypatch):
    cache = make(short_lengths(1000, 30))
    monkeypatch.setattr(best_fit, 'GROUP', 64)
    batch = all_rows(BestFit(cache, 32))
    assert (batch['segment_ids'] > 0).sum() == cache.num_tokens
    assert (batch['tokens'] == EOS).sum() == cache.num_documents


def test_the_index_is_stored_and_read_again(make, tmp_path, monkeypatch):
    cache = make(is_chat=True)
    first = BestFit(cache, 64)
    monkeypatch.setattr(best_fit, 'pack', None)
    again = BestFit(cache, 64)
    np.testing.assert_array_equal(all_rows(first)['tokens'], all_rows(again)['tokens'])
    assert first.statistics == again.statistics
    assert [path.name for path in tmp_path.iterdir()] == ['train0.best_fit-64-error.npy']


def test_every_length_and_every_too_long_has_its_own_index(make, tmp_path):
    cache = make(is_chat=True)
    for length, too_long in ((64, 'error'), (32, 'drop'), (32, 'truncate')):
        BestFit(cache, length, too_long)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize('damage', ['empty', 'short', 'garbage', 'sizes', 'flat'])
def test_a_damaged_index_is_built_again(make, tmp_path, damage):
    cache = make()
    expected = all_rows(BestFit(cache, 64))['tokens']
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    if damage == 'sizes':
        array = np.load(path)
        array[2] += 1
        np.save(path, array)
    elif damage == 'flat':
        np.save(path, np.zeros((2, 2), np.int64))
    else:
        path.write_bytes({'empty': b'', 'short': content[:-40], 'garbage': b'x' * 99}[damage])
    np.testing.assert_array_equal(all_rows(BestFit(cache, 64))['tokens'], expected)
    assert path.read_bytes() == content


def test_an_index_of_other_tokens_is_built_again(make):
    BestFit(make(), 64)
    other = make()
    other.tokens[3] += 1
    other.offsets = np.array([0, 100, 147])
    assert BestFit(other, 64).statistics['tokens'] == 147
    assert BestFit(other, 64).statistics['cut_documents'] == 1


@pytest.mark.parametrize('where', ['row_offsets', 'starts', 'sizes'])
def test_an_index_whose_numbers_are_bad_is_an_error_and_not_other_text(make, where):
    cache = make()
    packed = BestFit(cache, 64)
    bad = np.array(getattr(packed._index, where))
    bad[1:] = 10**7
    object.__setattr__(packed._index, where, bad)
    with pytest.raises(DataError, match='remove'):
        all_rows(packed)


def test_an_index_that_cannot_be_written_stays_in_memory(make, tmp_path):
    cache = make()
    kept = BestFit(cache, 64)
    cache.path = tmp_path / 'absent' / 'train.tokens'
    in_memory = BestFit(cache, 64)
    np.testing.assert_array_equal(all_rows(in_memory)['tokens'], all_rows(kept)['tokens'])


def config(**kwargs):
    return BatchConfig(sequence_length=64, batch_size=1, **kwargs)


def test_auto_is_concat_for_texts_and_best_fit_for_chats(make):
    assert isinstance(make_packing(make(), config()), Concat)
    assert isinstance(make_packing(make(is_chat=True), config()), BestFit)
    for name, kind in KINDS.items():
        assert isinstance(make_packing(make(), config(packing=name)), kind)


def test_chats_are_not_concatenated(make):
    with pytest.raises(ConfigError, match="packing='concat' would cut chats"):
        make_packing(make(is_chat=True), config(packing='concat'))


def test_arrays_have_the_dtypes_of_a_batch(make):
    for kind in KINDS.values():
        batch = kind(make(), 64).rows(np.array([0, 1]))
        dtypes = {name: array.dtype.name for name, array in batch.items()}
        assert dtypes == dict.fromkeys(NAMES, 'int32') | {'loss_mask': 'float32'}
        assert all(array.shape == (2, 64) for array in batch.values())


@pytest.mark.parametrize('kind', KINDS)
def test_a_token_outside_the_vocabulary_is_an_error_and_not_an_index(make, kind):
    cache = make()
    cache.tokens[17] = 2048
    with pytest.raises(DataError, match='token id 2048, but the vocabulary ends at 2047'):
        all_rows(KINDS[kind](cache, 16))


@pytest.mark.parametrize('kind', ['concat', 'best_fit'])
@pytest.mark.parametrize('lengths', [(20, 200, 30_000), (20_000, 200_000, 30)])
def test_rows_are_read_at_many_million_tokens_a_second(make, kind, lengths):
    shortest, longest, number = lengths
    cache = make(np.random.default_rng(0).integers(shortest, longest, number))
    packed = KINDS[kind](cache, 2048)
    order = np.random.default_rng(0).permutation(packed.num_rows)[:256].reshape(8, 32)
    seconds = []
    for numbers in order:
        began = time.process_time()
        packed.rows(numbers)
        seconds.append(time.process_time() - began)
    # Measured: 100 million per core; Python work for every token would be below 2 million.
    assert order[0].size * 2048 / min(seconds) > 1e7


def test_a_million_documents_are_packed_in_seconds():
    lengths = np.exp(np.random.default_rng(0).normal(5, 1.2, 1_000_000)).astype(np.int64)
    began = time.process_time()
    row_of, num_rows = best_fit.best_fit_decreasing(np.clip(lengths, 1, 2048), 2048)
    assert time.process_time() - began < 5
    assert np.clip(lengths, 1, 2048).sum() / (num_rows * 2048) > 0.999

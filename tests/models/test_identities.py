"""Outputs do not depend on the future, other documents, padding or the order of a row."""

import numpy as np


def assert_close(result, expected):
    # A change of one ulp in the weights moves the nine-layer model's outputs by 2e-5.
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=5e-5)


def test_a_future_token_does_not_change_past_hidden_states(model, batch):
    tokens, positions, segment_ids = batch
    before, *_ = model(*batch)
    for t in (1, 9, 15):
        other = tokens.copy()
        other[:, t] = (tokens[:, t] + 1) % 60
        after, *_ = model(other, positions, segment_ids)
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert (np.abs(after[:, t:] - before[:, t:]).max(axis=-1)[:, 0] > 1e-2).all()


def test_a_past_token_changes_the_future(model, batch):
    tokens, positions, segment_ids = batch
    other = tokens.copy()
    other[:, 0] = (tokens[:, 0] + 1) % 60
    difference = np.abs(model(other, positions, segment_ids)[0] - model(*batch)[0])
    assert (difference.max(axis=-1) > 1e-5).any(axis=1).all()
    assert (difference[:, 3].max(axis=-1) > 1e-3).all()


def test_a_packed_row_equals_its_documents_alone(model, batch):
    source = batch[0]
    tokens, positions, segment_ids = (np.zeros_like(x) for x in batch)
    places = []
    begin = 0
    for row, length in enumerate((7, 3, 5), start=1):
        document = slice(begin, begin + length)
        tokens[0, document] = tokens[row, :length] = source[0, document]
        positions[0, document] = positions[row, :length] = np.arange(length)
        segment_ids[0, document], segment_ids[row, :length] = row, 1
        places.append((document, row, length))
        begin += length
    hidden, logprobs, _ = model(tokens, positions, segment_ids)
    for document, row, length in places:
        assert_close(hidden[0, document], hidden[row, :length])
        assert_close(logprobs[0, document], logprobs[row, :length])


def test_the_content_of_padding_changes_nothing(model, batch):
    tokens, positions, segment_ids = (x.copy() for x in batch)
    segment_ids[:, 10:] = segment_ids[:2, :2] = 0
    before = model(tokens, positions, segment_ids)[0]
    real = segment_ids > 0
    tokens[~real] = (tokens[~real] + 7) % 60
    positions[~real] = 0
    after = model(tokens, positions, segment_ids)[0]
    np.testing.assert_array_equal(after[real], before[real])
    assert np.isfinite(after).all()


def test_padding_before_a_document_changes_nothing(model, batch):
    tokens, positions, segment_ids = batch
    rolled = [np.roll(x, 5, axis=1) for x in batch]
    rolled[2][:, :5] = 0
    before, after = model(tokens, positions, segment_ids)[0], model(*rolled)[0]
    assert_close(after[:, 5:], before[:, :-5])


def test_a_permuted_row_gives_the_permuted_result(model, batch):
    tokens, positions, segment_ids = (x.copy() for x in batch)
    segment_ids[1, 6:], positions[1, 6:] = 2, np.arange(10)
    order = np.random.default_rng(1).permutation(tokens.shape[1])
    straight = model(tokens, positions, segment_ids)
    permuted = model(*(x[:, order] for x in (tokens, positions, segment_ids)))
    assert_close(permuted[0], straight[0][:, order])
    assert_close(permuted[1], straight[1][:, order])


def test_the_value_of_a_segment_id_does_not_matter(model, batch):
    tokens, positions, segment_ids = batch
    np.testing.assert_array_equal(
        model(tokens, positions, 5 * segment_ids)[0], model(tokens, positions, segment_ids)[0]
    )


def test_rows_do_not_see_each_other(model, batch):
    before = model(*batch)[0]
    tokens = batch[0].copy()
    tokens[1:] = 0
    np.testing.assert_array_equal(model(tokens, *batch[1:])[0][0], before[0])

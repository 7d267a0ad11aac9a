"""Prompts with the answers to other prompts."""

import numpy as np

from jaxfm.preferences.mismatched import mismatched_rows


def row(documents, width):
    """[[(prompt, answer) of each chat] of each document] -> the arrays of a row, [1, width]."""
    names = ('tokens', 'targets', 'positions', 'segment_ids', 'pair_ids', 'loss_mask', 'sides')
    batch = {name: np.zeros((1, width), np.int32) for name in names}
    start = segment = 0
    for number, chats in enumerate(documents, start=1):
        for side, (prompt, answer) in zip((1, -1), chats):
            ids, segment = [*prompt, *answer], segment + 1
            stop = start + len(ids)
            batch['tokens'][0, start:stop] = ids
            batch['targets'][0, start : stop - 1] = ids[1:]
            batch['positions'][0, start:stop] = np.arange(len(ids))
            batch['segment_ids'][0, start:stop], batch['pair_ids'][0, start:stop] = segment, number
            answer_at = slice(start + len(prompt) - 1, stop - 1)
            batch['loss_mask'][0, answer_at] = 1
            batch['sides'][0, answer_at] = side
            start = stop
    return batch


def chats_of(batch):
    found = []
    segments = batch['segment_ids'][0]
    for segment in range(1, segments.max() + 1):
        slots = np.flatnonzero(segments == segment)
        tokens, targets = batch['tokens'][0, slots], batch['targets'][0, slots]
        np.testing.assert_array_equal(targets[:-1], tokens[1:])
        np.testing.assert_array_equal(batch['positions'][0, slots], np.arange(len(slots)))
        counts = batch['loss_mask'][0, slots] > 0
        assert not counts[-1]
        first = int(np.argmax(counts)) + 1
        assert counts[first - 1 : -1].all() and not counts[: first - 1].any()
        found.append((tokens[:first].tolist(), tokens[first:].tolist()))
    return found


def test_each_document_gets_the_answers_of_the_next_one():
    pairs = [
        [([1, 2], [11, 12, 13]), ([1, 2], [14])],
        [([3], [15]), ([3], [16, 17])],
        [([4, 5, 6], [18, 19]), ([4, 5, 6], [20])],
    ]
    batch = row(pairs, 40)
    made = mismatched_rows(batch)
    assert chats_of(made) == [
        ([1, 2], [15]),
        ([1, 2], [16, 17]),
        ([3], [18, 19]),
        ([3], [20]),
        ([4, 5, 6], [11, 12, 13]),
        ([4, 5, 6], [14]),
    ]
    # As many tokens as before, so they always fit.
    assert (made['segment_ids'] > 0).sum() == (batch['segment_ids'] > 0).sum()


def test_chats_with_labels_are_exchanged_too():
    made = mismatched_rows(row([[([1], [2])], [([3], [4, 5])]], 6))
    assert chats_of(made) == [([1], [4, 5]), ([3], [2])]


def test_a_row_with_one_document_is_empty():
    made = mismatched_rows(row([[([1], [2]), ([1], [3])]], 6))
    assert not any(array.any() for array in made.values())

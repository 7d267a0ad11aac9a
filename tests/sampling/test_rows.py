"""The sizes of calls fit the prompts."""

import pytest

from jaxfm.sampling import SamplingConfig
from jaxfm.sampling.request import Request
from jaxfm.sampling.rows import Rows
from jaxfm.sampling.scheduler import Sequence


def sequences(count: int, length: int) -> list[Sequence]:
    """Running ones, of which all but the last token is to be stored."""
    tokens = list(range(length + 1))
    request = Request('r', tokens, max_tokens=1)
    return [Sequence(request, tokens, len(tokens), 1, shard=0) for _ in range(count)]


def test_short_prompts_do_not_wait_for_a_long_one():
    rows = Rows(SamplingConfig(slots=64, max_length=9000), num_shards=1, slots=64, vocab_size=9)
    missing = [*sequences(1, 8000), *sequences(8, 10)]
    _, pieces = rows.store(rows.best_chunk(missing), missing)
    assert {id(sequence) for _, sequence, *_ in pieces} == set(map(id, missing))


def test_many_prompts_get_calls_that_fit_short_ones():
    rows = Rows(SamplingConfig(slots=8), num_shards=1, slots=8, vocab_size=9)
    few = sequences(3, 4)
    assert rows.best_chunk(few) == (16, 32)
    counts = list(rows.counts)
    rows.use_all_chunks()
    assert rows.best_chunk(few) == (16, 4)
    assert rows.counts == counts  # decoding stays as it was


@pytest.mark.parametrize('length,calls', [(12, 2), (16, 2), (40, 6), (250, 32)])
def test_prompts_are_stored_in_few_calls(length, calls):
    """Rows stay empty while prompts are stored: 64 short prompts once took eight calls."""
    rows = Rows(SamplingConfig(slots=64), num_shards=1, slots=64, vocab_size=300)
    missing, done = sequences(64, length), 0
    while missing:
        _, pieces = rows.store(rows.best_chunk(missing), missing)
        for _, sequence, start, stored in pieces:
            sequence.num_stored = start + stored
        missing = [sequence for sequence in missing if sequence.num_missing]
        done += 1
    assert done <= calls

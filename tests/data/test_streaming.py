import json

import numpy as np
import pytest

from jaxfm.data import BatchConfig, streaming
from jaxfm.data.documents import Document
from jaxfm.data.packing.rows import Concat
from jaxfm.data.streaming import OnTheFly, Stream
from jaxfm.errors import ConfigError, DataError
from tests.data.streams import BOS, EOS, VOCAB_SIZE, stream

T = 16


class Source:
    """A source of made-up documents in shards; every fifth document is held out."""

    def __init__(self, prefix='', shards=(4, 0, 9, 1, 7), is_chat=False, longest=40):
        self.prefix, self.sizes, self.is_chat, self.longest = prefix, shards, is_chat, longest
        self.reads = []

    def shards(self):
        return list(range(len(self.sizes)))

    def read(self, shard):
        self.reads.append(shard)
        for number in range(self.sizes[shard]):
            draw = np.random.default_rng([len(self.prefix), shard, number])
            name = f'{self.prefix}{shard}:{number}'
            text = ' '.join(map(str, draw.integers(2, VOCAB_SIZE, draw.integers(0, self.longest))))
            is_heldout = (shard + number) % 5 == 4
            if self.is_chat:
                turns = ({'role': 'user', 'content': name}, {'role': 'assistant', 'content': text})
                yield is_heldout, Document(name, messages=turns)
            else:
                yield is_heldout, Document(name, text=text)


def encode(chunk):
    """Encodes numbers as themselves; the second half of a chat is supervised."""
    for place, document in chunk:
        text = document.messages[-1]['content'] if document.messages else document.text
        ids = np.array([BOS, *map(int, text.split()), EOS], np.int32)
        mask = np.arange(len(ids)) >= len(ids) / 2
        yield place, document, ids, mask if document.messages else None


def config(**kwargs):
    return BatchConfig(**{'sequence_length': T, 'batch_size': 6} | kwargs)


def texts(**kwargs):
    return Stream(lambda: Source(**kwargs), encode, config())


def chats(too_long='error', packing='auto', **kwargs):
    source = {'prefix': 'chat', 'is_chat': True, 'longest': T - 2} | kwargs
    return Stream(lambda: Source(**source), encode, config(too_long=too_long, packing=packing))


def batches(rows=None, names=('texts', 'chats'), batch_size=6, put=None):
    makers = {'texts': texts, 'chats': chats}
    return OnTheFly(
        {name: makers[name]() for name in names},
        {name: f'fingerprint of {name}' for name in names},
        {'texts': 0.6, 'chats': 0.4},
        config(batch_size=batch_size),
        VOCAB_SIZE,
        rows,
        put,
    )


def take(source, count):
    return [source.next(None, step) for step in range(count)]


def assert_equal(batches, others):
    for batch, other in zip(batches, others, strict=True):
        for name, array in batch.items():
            np.testing.assert_array_equal(array, other[name])


def train_documents(source, epochs=1):
    documents = [
        (None, document)
        for _ in range(epochs)
        for shard in source.shards()
        for is_heldout, document in source.read(shard)
        if not is_heldout
    ]
    return [(ids, mask) for _, _, ids, mask in encode(documents)]


def test_texts_are_the_rows_of_the_stream_in_the_order_of_the_files(tmp_path):
    encoded = [ids for ids, _ in train_documents(Source(), epochs=3)]
    cache = stream([len(ids) for ids in encoded], tmp_path)
    cache.tokens = np.concatenate(encoded)
    expected = Concat(cache, T).rows(np.arange(30))
    found = take(batches(names=['texts']), 5)
    for name, array in expected.items():
        np.testing.assert_array_equal(np.concatenate([b[name] for b in found]), array)


def test_chats_are_whole_in_order_and_side_by_side():
    found = take(batches(names=['chats']), 5)
    segments = []
    for batch in found:
        for row in range(6):
            ids = batch['segment_ids'][row]
            for segment in range(1, ids.max() + 1):
                where = ids == segment
                segments.append((batch['tokens'][row][where], batch['loss_mask'][row][where]))
    expected = train_documents(Source('chat', is_chat=True, longest=T - 2), epochs=5)
    assert len(segments) > 40
    for (tokens, counted), (ids, mask) in zip(segments, expected):
        np.testing.assert_array_equal(tokens, ids)
        np.testing.assert_array_equal(counted[:-1], mask[1:])
        assert not counted[-1]
    assert max(batch['segment_ids'].max() for batch in found) > 1


@pytest.mark.parametrize('names', [['texts'], ['chats'], ['texts', 'chats']])
@pytest.mark.parametrize('stop', [0, 1, 7, 18])
def test_resumed_equals_straight(names, stop, monkeypatch):
    straight = take(batches(names=names), 20)
    monkeypatch.setattr(streaming, 'FIRST_CHUNK_BYTES', 50)
    source = batches(names=names)
    take(source, stop)
    resumed = batches(names=names)
    resumed.set_state(json.loads(json.dumps(source.get_state())))
    assert_equal(take(resumed, 20 - stop), straight[stop:])


def test_any_number_of_processes_makes_the_same_global_batches():
    straight = take(batches(), 9)
    state, done = None, 0
    for processes, steps in ((2, 2), (1, 3), (3, 4)):
        sources = [batches(rows) for rows in np.split(np.arange(6), processes)]
        for source in sources:
            if state:
                source.set_state(state)
        parts = [take(source, steps) for source in sources]
        for step in range(steps):
            whole = {
                name: np.concatenate([part[step][name] for part in parts]) for name in straight[0]
            }
            assert_equal([whole], [straight[done + step]])
        states = [source.get_state() for source in sources]
        state, done = states[0], done + steps
        assert all(other == state for other in states)


def test_another_batch_size_continues_with_the_next_row():
    rows = np.concatenate([batch['tokens'] for batch in take(batches(batch_size=1), 20)])
    source = batches()
    take(source, 2)
    resumed = batches(batch_size=4)
    resumed.set_state(source.get_state())
    np.testing.assert_array_equal(resumed.next(None, 0)['tokens'], rows[12:16])


def test_documents_before_the_position_are_not_tokenised_again(monkeypatch):
    monkeypatch.setattr(streaming, 'FIRST_CHUNK_BYTES', 1)
    monkeypatch.setattr(streaming, 'CHUNK_BYTES', 1)
    tokenised = []

    def counting(chunk):
        tokenised.extend(document.name for _, document in chunk)
        return encode(chunk)

    sources = []

    def make_source():
        sources.append(Source(shards=(50, 50, 50)))
        return sources[-1]

    straight = Stream(make_source, counting, config())
    for _ in range(80):
        straight.next_row()
    epoch, shard, document, _ = straight.position
    assert (epoch, shard) == (0, 1)
    tokenised.clear(), sources.clear()
    resumed = Stream(make_source, counting, config())
    resumed.position = straight.position
    resumed.next_row()
    assert tokenised[0] == f'1:{document}'
    # The first shard was opened only to see whether the source has texts or chats.
    assert [source.reads for source in sources] == [[], [0], [1]]


def test_too_long_chats_stop_the_run_or_are_dropped_or_truncated():
    long = {'longest': 40}
    with pytest.raises(DataError, match=r'chat\d:\d has \d+ tokens, but a row has 16.*too_long'):
        [chats('error', **long).next_row() for _ in range(20)]
    dropping, truncating = chats('drop', **long), chats('truncate', **long)
    dropped = [piece for _ in range(20) for piece in dropping.next_row()]
    truncated = [piece for _ in range(20) for piece in truncating.next_row()]
    assert all(piece.length == len(piece.ids) for piece in dropped)
    assert any(piece.length == T < len(piece.ids) for piece in truncated)


def test_packing_none_puts_one_chat_in_a_row():
    alone = chats(packing='none')
    assert [len(alone.next_row()) for _ in range(30)] == [1] * 30


def test_no_chat_that_fits_is_an_error_and_not_an_endless_search():
    def long(chunk):
        ids, mask = np.full(T + 1, 5, np.int32), np.ones(T + 1, bool)
        return [(place, document, ids, mask) for place, document in chunk]

    endless = Stream(lambda: Source(is_chat=True), long, config(too_long='drop'))
    with pytest.raises(DataError, match='no chat fits a row of 16'):
        endless.next_row()


@pytest.mark.parametrize('sizes', [(), (0, 0)])
def test_a_source_without_documents_is_an_error(sizes):
    with pytest.raises(DataError, match='no document to train on'):
        texts(shards=sizes)


def test_texts_can_only_be_concatenated():
    with pytest.raises(ConfigError, match="best_fit.*tokenize='cached'"):
        Stream(Source, encode, config(packing='best_fit'))


def test_a_state_of_other_data_is_refused():
    state = batches().get_state()
    state['chats/fingerprint'] = 'other'
    with pytest.raises(ConfigError, match='chats/fingerprint is fingerprint of chats, was other'):
        batches().set_state(state)


def test_rows_and_epochs_are_counted_by_source():
    source = batches()
    assert not any(source.delivered().values())
    take(source, 10)
    progress = source.delivered()
    assert progress['texts/rows'] == 36 and progress['chats/rows'] == 24
    assert progress['texts/epochs'] > 1


def test_a_template_that_refuses_every_chat_stops_the_run():
    refused = Stream(lambda: Source('chat', is_chat=True), lambda chunk: iter(()), config())
    with pytest.raises(DataError, match='the chat template refuses every chat'):
        refused.next_row()

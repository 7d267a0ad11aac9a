import json

import numpy as np
import pytest

from jaxfm.data import FilesConfig, FilesData, MixtureData, ProblemsConfig, ProblemsData
from jaxfm.data.corpus.bpe import make_tokenizer
from jaxfm.data.corpus.build import make_corpus
from jaxfm.data.dataset import open_dataset
from jaxfm.data.packing.rows import BestFit, Concat
from jaxfm.errors import ConfigError, DataError
from jaxfm.tokenizer import BPEConfig, BytesConfig
from jaxfm.tokenizer.build import build_tokenizer, load_tokenizer

T = 64


@pytest.fixture(scope='module')
def bytes_tokenizer():
    return build_tokenizer(BytesConfig(), ())


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """{'texts': path, 'chats': path} of .jsonl files with 200 records."""
    directory = tmp_path_factory.mktemp('files')
    draw = np.random.default_rng(0)
    words = [f'{n:x}' for n in draw.integers(0, 10**6, 500)]
    texts = [{'text': ' '.join(draw.choice(words, draw.integers(1, 60)))} for _ in range(200)]
    chats = [
        {
            'messages': [
                {'role': 'user', 'content': str(n)},
                {'role': 'assistant', 'content': str(draw.choice(words))},
            ]
        }
        for n in range(200)
    ]
    paths = {'texts': directory / 'texts.jsonl', 'chats': directory / 'chats.jsonl'}
    for name, records in (('texts', texts), ('chats', chats)):
        paths[name].write_text(''.join(json.dumps(record) + '\n' for record in records))
    return {name: str(path) for name, path in paths.items()}


@pytest.fixture
def open_data(files, bytes_tokenizer, tmp_path):
    """Opens texts, chats or a mixture of both and problems, with the byte tokenizer."""

    def make(name, tokenize='cached', **kwargs):
        batch = {'sequence_length': T, 'batch_size': 8, 'tokenize': tokenize} | kwargs
        if name != 'mixture':
            config = FilesData(path=files[name], heldout_fraction=0.1, **batch)
        else:
            sources = {
                key: FilesConfig(path=path, heldout_fraction=0.1) for key, path in files.items()
            }
            sources['sums'] = ProblemsConfig(form='chat', num_problems=60, num_heldout=12)
            weights = {'texts': 2, 'chats': 1, 'sums': 1}
            config = MixtureData(sources=sources, weights=weights, **{'too_long': 'drop'} | batch)
        return open_dataset(config, bytes_tokenizer, tmp_path / 'cache')

    return make


def take(source, count):
    return [source.next(None, step) for step in range(count)]


def assert_equal(batches, others):
    for batch, other in zip(batches, others, strict=True):
        for name, array in batch.items():
            np.testing.assert_array_equal(array, other[name])


def test_one_source_has_flat_statistics(open_data):
    data = open_data('texts')
    statistics = data.statistics
    assert statistics['train_documents'] + statistics['heldout_documents'] == 200
    assert statistics['rows_per_epoch'] == -(-statistics['train_tokens'] // T)
    assert statistics['packing'] == 'concat' and statistics['packing_efficiency'] > 0.99
    assert statistics['vocab_size'] == 258
    assert all(isinstance(value, int | float | str) for value in statistics.values())
    histogram = {k: n for k, n in statistics.items() if k.startswith('train_length_histogram/')}
    assert sum(histogram.values()) == statistics['train_documents']


def test_every_source_of_a_mixture_has_its_own_statistics(open_data):
    data = open_data('mixture')
    statistics = data.statistics
    assert statistics['texts/packing'] == 'concat' and statistics['chats/packing'] == 'best_fit'
    assert [statistics[f'{name}/share'] for name in data.sources] == [0.5, 0.25, 0.25]
    assert statistics['chats/train_supervised_tokens'] > 0
    assert statistics['sums/dropped_documents'] >= 0


def test_texts_are_concatenated_and_chats_are_packed_whole(open_data):
    data = open_data('mixture')
    assert isinstance(data.packings['texts'], Concat)
    assert isinstance(data.packings['chats'], BestFit)
    batch = data.batches(seed=0).next(None, 0)
    assert {name: array.shape for name, array in batch.items()} == dict.fromkeys(batch, (8, T))
    assert 0 < batch['loss_mask'].sum() < (batch['segment_ids'] > 0).sum()


def test_only_tokens_of_the_assistant_count(open_data, bytes_tokenizer):
    data = open_data('chats')
    for batch in take(data.batches(seed=0), 3):
        for row in range(8):
            counted = batch['targets'][row][batch['loss_mask'][row] == 1]
            text = bytes_tokenizer.decode(counted.tolist(), skip_special_tokens=False)
            answers = text.split('<|eos|>')
            assert len(answers) > 1 and all(len(answer.strip()) < 9 for answer in answers)


@pytest.mark.parametrize('name', ['texts', 'mixture'])
@pytest.mark.parametrize('tokenize', ['cached', 'on_the_fly'])
def test_resuming_with_another_process_count_continues_with_the_same_rows(
    open_data, name, tokenize
):
    data = open_data(name, tokenize)
    straight = take(data.batches(seed=1), 12)
    halves = [data.batches(1, rows) for rows in np.split(np.arange(8), 2)]
    for source in halves:
        take(source, 5)
    states = [json.loads(json.dumps(source.get_state())) for source in halves]
    assert states[0] == states[1]
    resumed = open_data(name, tokenize).batches(1, np.arange(2, 6))
    resumed.set_state(states[0])
    expected = [{key: array[2:6] for key, array in batch.items()} for batch in straight[5:]]
    assert_equal(take(resumed, 7), expected)


def test_on_the_fly_texts_are_the_rows_of_the_cache_in_order(open_data):
    cached, streamed = open_data('texts'), open_data('texts', 'on_the_fly')
    packing = cached.packings['files']
    rows = packing.num_rows // 8 * 8
    expected = packing.rows(np.arange(rows))
    found = take(streamed.batches(seed=0), rows // 8)
    for name, array in expected.items():
        np.testing.assert_array_equal(np.concatenate([b[name] for b in found]), array)


@pytest.mark.parametrize('name', ['texts', 'chats', 'mixture'])
def test_the_held_out_documents_do_not_depend_on_how_the_others_are_read(open_data, name):
    cached, streamed = open_data(name), open_data(name, 'on_the_fly')
    assert cached.heldout_documents == streamed.heldout_documents
    assert cached.num_heldout_bytes == streamed.num_heldout_bytes > 0
    assert cached.heldout.keys() == streamed.heldout.keys()
    for source, cache in cached.heldout.items():
        other = streamed.heldout[source]
        assert cache.is_chat == other.is_chat
        np.testing.assert_array_equal(cache.tokens, other.tokens)
        np.testing.assert_array_equal(cache.offsets, other.offsets)
    assert streamed.statistics.keys() <= cached.statistics.keys()


def test_names_of_held_out_documents_are_unique_in_a_mixture(open_data):
    names = [document.name for document in open_data('mixture').heldout_documents]
    assert len(set(names)) == len(names)
    assert {name.split('/')[0] for name in names} == {'texts', 'chats', 'sums'}


def test_a_chat_longer_than_a_row_stops_the_opening(open_data):
    with pytest.raises(DataError, match=r'longer than a row of 16 .*config.data.too_long'):
        open_data('chats', sequence_length=16)


def test_a_packing_that_cannot_be_made_stops_the_opening(open_data):
    with pytest.raises(ConfigError, match='cut chats'):
        open_data('chats', packing='concat')
    with pytest.raises(ConfigError, match="tokenize='cached'"):
        open_data('texts', 'on_the_fly', packing='best_fit')


def test_the_fingerprint_depends_on_the_tokens_and_the_shares(open_data, bytes_tokenizer, tmp_path):
    first = open_data('mixture')
    assert first.fingerprint == open_data('mixture').fingerprint
    weights = first.config.weights | {'texts': 3}
    other = open_dataset(
        first.config.model_copy(update={'weights': weights}), bytes_tokenizer, tmp_path / 'cache'
    )
    assert other.fingerprint != first.fingerprint != open_data('texts').fingerprint


def test_the_caches_of_a_mixture_are_inside_the_given_directory(
    open_data, bytes_tokenizer, tmp_path
):
    first = open_data('mixture')
    for name, source in first.config.sources.items():
        make_corpus(source, bytes_tokenizer, tmp_path / 'given' / name)
    given = open_data('mixture', cache=str(tmp_path / 'given'))
    assert given.sources['texts'].directory == tmp_path / 'given' / 'texts'
    assert_equal(take(given.batches(seed=0), 3), take(first.batches(seed=0), 3))


def test_a_bpe_learns_from_every_source_of_a_mixture(open_data, tmp_path):
    data = open_data('mixture')
    config = data.config
    made = make_tokenizer(BPEConfig(vocab_size=600), config, tmp_path)
    assert made.vocab_size == 600
    documents = {document.name.split('/')[0]: document for document in data.heldout_documents}
    for text in (documents['texts'].text, documents['sums'].messages[0]['content']):
        assert len(made.encode(text)) < 0.7 * len(text)
    (kept,) = (tmp_path / 'tokenizers').iterdir()
    again = make_tokenizer(BPEConfig(vocab_size=600), config, tmp_path)
    assert again.fingerprint == made.fingerprint == load_tokenizer(kept).fingerprint


def test_generated_problems_are_data_like_any_other(bytes_tokenizer, tmp_path):
    config = ProblemsData(
        sequence_length=128, batch_size=4, form='chat', num_problems=50, num_heldout=12
    )
    data = open_dataset(config, bytes_tokenizer, tmp_path)
    assert len(data.heldout_documents) == 12
    assert data.chat.prompt(data.heldout_documents[0].messages[:-1])
    assert data.batches(seed=0).next(None, 0)['loss_mask'].any()

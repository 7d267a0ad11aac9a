import numpy as np
import pytest

from jaxfm.data.corpus import token_cache
from jaxfm.data.corpus.token_cache import TokenCache, Writer
from jaxfm.data.documents import Document
from jaxfm.errors import DataError

VOCAB_SIZE = 100


def part(directory, train=(), heldout=(), with_mask=False, has_digest=False):
    """Writes a part whose documents are lists of ids; a document's text is its list."""
    directory.mkdir()
    for side, documents in (('train', train), ('heldout', heldout)):
        with Writer(directory, side, VOCAB_SIZE) as writer:
            for number, ids in enumerate(documents):
                ids = np.array(ids, np.int32)
                mask = ids % 2 == 1 if with_mask else None
                document = Document(f'{directory.name}:{number}', text=str(ids))
                writer.add(document, ids, mask, has_digest)
    return directory


def joined(tmp_path, *parts):
    directory = tmp_path / 'joined'
    directory.mkdir()
    statistics = token_cache.join(parts, directory, VOCAB_SIZE)
    return directory, statistics


def documents(cache):
    return [cache.tokens[a:b].tolist() for a, b in zip(cache.offsets, cache.offsets[1:])]


def test_ids_are_stored_in_the_smallest_type_that_holds_them():
    assert token_cache.token_dtype(1 << 16) == np.uint16
    assert token_cache.token_dtype((1 << 16) + 1) == np.uint32


def test_joined_parts_have_their_documents_one_after_another(tmp_path):
    parts = [
        part(tmp_path / 'a', train=[[1, 2, 3], [4]], heldout=[[5, 5]]),
        part(tmp_path / 'b', heldout=[[7]]),
        part(tmp_path / 'c', train=[[8, 9]]),
    ]
    directory, statistics = joined(tmp_path, *parts)
    train = TokenCache(directory, 'train', VOCAB_SIZE, 'f')
    heldout = TokenCache(directory, 'heldout', VOCAB_SIZE, 'f')
    assert documents(train) == [[1, 2, 3], [4], [8, 9]]
    assert documents(heldout) == [[5, 5], [7]]
    assert train.mask is None and train.num_tokens == 6 and train.num_documents == 3
    names = [document.name for document in token_cache.read_documents(directory)]
    assert names == ['a:0', 'b:0']
    assert train.num_bytes == sum(len(str(np.array(ids))) for ids in documents(train))
    assert statistics['train_tokens'] == 6 and statistics['heldout_documents'] == 2
    assert [statistics[f'train_length_histogram/{to}'] for to in (1, 2, 4)] == [1, 1, 1]
    assert 'train_supervised_tokens' not in statistics


def test_masks_are_joined_with_their_tokens(tmp_path):
    parts = [
        part(tmp_path / 'a', train=[[1, 2, 3]], with_mask=True),
        part(tmp_path / 'b', train=[[4, 5]], heldout=[[7, 6]], with_mask=True),
    ]
    directory, statistics = joined(tmp_path, *parts)
    train = TokenCache(directory, 'train', VOCAB_SIZE, 'f', kind='chat')
    np.testing.assert_array_equal(train.mask, [1, 0, 1, 0, 1])
    np.testing.assert_array_equal(train.tokens % 2, train.mask)
    assert statistics['train_supervised_tokens'] == 3


def test_duplicates_are_left_out_of_every_file(tmp_path):
    parts = [
        part(tmp_path / 'a', train=[[1, 1], [2], [3, 3, 3], [4]], has_digest=True),
        part(tmp_path / 'b', train=[[2], [5]], heldout=[[4], [6], [6]], has_digest=True),
        part(tmp_path / 'c', train=[[1, 1], [1, 1]], has_digest=True),
    ]
    directory, statistics = joined(tmp_path, *parts)
    train = TokenCache(directory, 'train', VOCAB_SIZE, 'f')
    heldout = TokenCache(directory, 'heldout', VOCAB_SIZE, 'f')
    assert documents(train) == [[1, 1], [2], [3, 3, 3], [5]]
    assert documents(heldout) == [[4], [6]]
    assert [d.name for d in token_cache.read_documents(directory)] == ['b:0', 'b:1']
    assert statistics['duplicates_dropped'] == 5


def test_a_truncated_part_is_named(tmp_path):
    broken = part(tmp_path / 'a', train=[[1, 2, 3]], heldout=[[1]])
    (broken / 'train.tokens').write_bytes(b'12')
    with pytest.raises(DataError, match='train.tokens has 2 bytes instead of 6'):
        joined(tmp_path, broken)


@pytest.mark.parametrize('token', [-1, VOCAB_SIZE])
def test_an_id_outside_the_vocabulary_is_an_error_that_names_the_document(tmp_path, token):
    with pytest.raises(DataError, match=r'a:1: a token id is outside \[0, 100\)'):
        part(tmp_path / 'a', train=[[1], [token]])
